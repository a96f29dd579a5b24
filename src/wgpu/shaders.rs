//! The WGSL files and the template that makes variants of them.
//!
//! A line that begins with `//#` is for the template: `//#if NAME`, `//#elif NAME`, `//#else`, `//#endif`,
//! `//#include "FILE"`, and `//#for v COUNT` to `//#endfor`, which repeats lines with $v replaced by 0, 1, ..: matrices
//! need names, since an array of them that a compiler indexes at run time lies in memory. The web example has the same
//! few lines in JavaScript.

use crate::problem::Problem;
use crate::tensor::DType;

/// Name and text of every shader file.
pub const FILES: &[(&str, &str)] = &[
    ("params.wgsl", include_str!("../../shaders/params.wgsl")),
    ("load.wgsl", include_str!("../../shaders/load.wgsl")),
    ("store.wgsl", include_str!("../../shaders/store.wgsl")),
    ("schedule.wgsl", include_str!("../../shaders/schedule.wgsl")),
    ("prepare.wgsl", include_str!("../../shaders/prepare.wgsl")),
    ("decode.wgsl", include_str!("../../shaders/decode.wgsl")),
    ("vector.wgsl", include_str!("../../shaders/vector.wgsl")),
    ("matrix.wgsl", include_str!("../../shaders/matrix.wgsl")),
    ("keys.wgsl", include_str!("../../shaders/keys.wgsl")),
    ("values.wgsl", include_str!("../../shaders/values.wgsl")),
    ("range.wgsl", include_str!("../../shaders/range.wgsl")),
    ("multiply.wgsl", include_str!("../../shaders/multiply.wgsl")),
    ("combine.wgsl", include_str!("../../shaders/combine.wgsl")),
];

/// Names a folder with shader files to use in place of those of the same name: kernels can be tuned without a rebuild.
pub const FOLDER_VARIABLE: &str = "POLYMLA_SHADER_DIR";

/// Tokens of a step of the matrix paths: `TOKENS` of matrix.wgsl.
const STEP_TOKENS: usize = 16;

/// The kernels: file, entry point, and whether each storage binding from 1 on is only read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Cuts the batch over parts.
    Schedule,
    /// Checks lengths and tables.
    Prepare,
    /// Attention of parts.
    Decode,
    /// Merges parts.
    Combine,
}

impl Kernel {
    /// All of them, in the order of a step.
    pub const ALL: [Kernel; 4] = [Kernel::Schedule, Kernel::Prepare, Kernel::Decode, Kernel::Combine];

    /// The entry point, which is also the file's name.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Schedule => "schedule",
            Kernel::Prepare => "prepare",
            Kernel::Decode => "decode",
            Kernel::Combine => "combine",
        }
    }

    /// For each storage binding, from 1 on, whether it is only read.
    pub fn read_only(self) -> &'static [bool] {
        match self {
            Kernel::Schedule => &[true, false],
            Kernel::Prepare => &[true, true, true, false, false],
            Kernel::Decode => &[true, true, true, true, true, true, false],
            Kernel::Combine => &[true, true, false, false],
        }
    }
}

/// What a variant makes use of. All have the same entry points and bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// What every WebGPU implementation has.
    Plain,
    /// Reductions by subgroup shuffles.
    Subgroups,
    /// f16 tensors as f16, not as halves of words; subgroups too.
    NativeF16,
    /// Products by cooperative matrices of 16 x 16, 16 query rows a workgroup.
    Matrix16,
    /// The same, 32 query rows a workgroup.
    Matrix32,
    /// The same, 64 query rows a workgroup, by loads that a compiler does not move.
    Matrix64,
    /// `Matrix16` with matrices emulated by plain arithmetic: for tests on adapters without them.
    EmulatedMatrix16,
    /// `Matrix32`, likewise.
    EmulatedMatrix32,
    /// `Matrix64`, likewise.
    EmulatedMatrix64,
}

impl Path {
    /// All of them, plainest first, what is only for tests last.
    pub const ALL: [Path; 9] = [
        Path::Plain,
        Path::Subgroups,
        Path::NativeF16,
        Path::Matrix16,
        Path::Matrix32,
        Path::Matrix64,
        Path::EmulatedMatrix16,
        Path::EmulatedMatrix32,
        Path::EmulatedMatrix64,
    ];

    /// Whether the path exists for an element type.
    pub fn takes(self, dtype: DType) -> bool {
        match self {
            Path::Plain | Path::Subgroups => dtype != DType::I32,
            Path::NativeF16 => dtype == DType::F16,
            _ => matches!(dtype, DType::F16 | DType::Bf16),
        }
    }

    /// Whether the path multiplies matrices of 16 x 16, cooperative or emulated.
    pub fn is_matrix(self) -> bool {
        !matches!(self, Path::Plain | Path::Subgroups | Path::NativeF16)
    }

    /// Whether the path is only for tests.
    pub fn is_emulated(self) -> bool {
        matches!(self, Path::EmulatedMatrix16 | Path::EmulatedMatrix32 | Path::EmulatedMatrix64)
    }

    /// The name, as `polymla info` and the environment have it.
    pub fn name(self) -> &'static str {
        match self {
            Path::Plain => "plain",
            Path::Subgroups => "subgroups",
            Path::NativeF16 => "f16",
            Path::Matrix16 => "matrix16",
            Path::Matrix32 => "matrix32",
            Path::Matrix64 => "matrix64",
            Path::EmulatedMatrix16 => "emulated-matrix16",
            Path::EmulatedMatrix32 => "emulated-matrix32",
            Path::EmulatedMatrix64 => "emulated-matrix64",
        }
    }

    fn defines(self, build: Build) -> Vec<&'static str> {
        let mut defines = match self {
            Path::Plain => return vec![],
            Path::Subgroups if build == Build::Remains => return vec!["SUBGROUPS", "REMAINS"],
            Path::Subgroups => return vec!["SUBGROUPS"],
            Path::NativeF16 => return vec!["SUBGROUPS", "NATIVE_F16"],
            Path::Matrix16 | Path::EmulatedMatrix16 => vec![],
            Path::Matrix32 | Path::EmulatedMatrix32 => vec!["ROWS_32"],
            Path::Matrix64 | Path::EmulatedMatrix64 => vec!["ROWS_64"],
        };
        defines.extend(["SUBGROUPS", "NATIVE_F16", "COOPERATIVE_MATRIX"]);
        defines.extend(self.is_emulated().then_some("EMULATED"));
        defines.extend((self == Path::Matrix64).then_some("VOLATILE"));
        defines.extend((build == Build::Full).then_some("FULL"));
        defines
    }

    /// Whether a matrix path may do without a test of each load: a problem has all the columns that it takes, and pages, of
    /// whole steps.
    pub(super) fn is_full(self, problem: &Problem) -> bool {
        self.is_matrix()
            && self.most_columns() == (problem.head_dim_k(), problem.head_dim_v())
            && problem.page_size().is_multiple_of(STEP_TOKENS)
            && problem.num_pages() > 0
            && problem.max_pages_per_seq() > 0
    }

    /// The most columns of K and of V that the path takes: `K_COLUMNS` and `COLUMNS` of matrix.wgsl. Others take any
    /// number, V in slices.
    pub(super) fn most_columns(self) -> (usize, usize) {
        match self {
            _ if self.is_emulated() => (192, 128),
            _ if self.is_matrix() => (576, 512),
            _ => (usize::MAX, usize::MAX),
        }
    }

    /// Columns of V of a workgroup: `COLUMNS` of vector.wgsl and matrix.wgsl.
    pub(super) fn columns(self) -> usize {
        self.most_columns().1.min(512)
    }

    /// Query rows of a workgroup: `ROWS` of params.wgsl.
    pub(super) fn rows(self) -> usize {
        match self {
            Path::Plain | Path::Subgroups | Path::NativeF16 | Path::Matrix16 | Path::EmulatedMatrix16 => 16,
            Path::Matrix32 | Path::EmulatedMatrix32 => 32,
            Path::Matrix64 | Path::EmulatedMatrix64 => 64,
        }
    }

    /// How often the template repeats what is done for each matrix: the numbers of matrix.wgsl.
    fn counts(self) -> Vec<(&'static str, usize)> {
        if !self.is_matrix() {
            return vec![];
        }
        let rows = self.rows();
        let (subgroups, shares, chains) = match rows {
            16 => (4, 4, 3),
            32 => (8, 4, 3),
            _ => (8, 2, 1),
        };
        let (k_columns, columns) = self.most_columns();
        vec![
            ("MATRIX_ROWS", rows / 16),
            ("MATRIX_COLUMNS", columns / 16 / subgroups),
            ("CHAINS", chains),
            ("QUERY_TILES", k_columns / 16 / shares / chains),
            ("QUERY_LOADS", rows * k_columns / 8 / (subgroups * 32)),
            ("LOADS", STEP_TOKENS * columns / 8 / (subgroups * 32) + 1),
        ]
    }
}

/// What a kernel is built for, beside its path and element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Build {
    /// Any problem.
    Any,
    /// `Decode` by matrices: all columns that the path takes, pages of whole steps, one window of them. `Combine`: head_dim_v is a multiple of 4.
    Full,
    /// `Decode` by [`Path::Subgroups`]: the splits that matrices left, since their numbers do not fit f16.
    Remains,
}

/// The WGSL of a kernel.
pub fn source(kernel: Kernel, path: Path, dtype: DType, build: Build) -> String {
    let element = match dtype {
        DType::Bf16 => "BF16",
        DType::F16 => "F16",
        DType::F32 => "F32",
        DType::I32 => "I32",
    };
    let mut defines = path.defines(build);
    defines.push(element);
    defines.extend((kernel == Kernel::Combine && build == Build::Full).then_some("QUADS"));
    let template = Template { defines, counts: path.counts() };
    let mut lines = Vec::new();
    template.include(&format!("{}.wgsl", kernel.name()), &mut lines);
    template.unroll(&lines)
}

struct Template {
    defines: Vec<&'static str>,
    counts: Vec<(&'static str, usize)>,
}

impl Template {
    /// Appends a file's lines, conditions and includes carried out.
    fn include(&self, file: &str, lines: &mut Vec<String>) {
        let built_in = FILES.iter().find(|(name, _)| *name == file).map(|(_, body)| (*body).to_string());
        let folder = std::env::var_os(FOLDER_VARIABLE).filter(|folder| !folder.is_empty());
        if let Some(absent) = folder.as_ref().filter(|folder| !std::path::Path::new(folder).is_dir()) {
            // Refused by the compiler: whoever names a folder means it.
            lines.push(format!("{FOLDER_VARIABLE} names {}, which is no folder", absent.display()));
            return;
        }
        let on_disk = folder.and_then(|folder| std::fs::read_to_string(std::path::Path::new(&folder).join(file)).ok());
        let Some(body) = on_disk.or(built_in) else {
            // Refused by the compiler.
            lines.push("#include of a file that does not exist".into());
            return;
        };
        // For every open `if`: whether its present branch is taken, and whether one was.
        let mut open: Vec<(bool, bool)> = Vec::new();
        for line in body.lines() {
            let [directive, argument, _] = words(line);
            let holds = match argument.strip_prefix('!') {
                Some(name) => !self.defines.contains(&name),
                None => self.defines.contains(&argument),
            };
            let skipped = open.iter().any(|(taken, _)| !taken);
            match (directive, open.last_mut()) {
                ("if", _) => open.push((holds, holds)),
                ("elif", Some((taken, done))) => {
                    *taken = !*done && holds;
                    *done |= *taken;
                }
                ("else", Some((taken, done))) => {
                    *taken = !*done;
                    *done = true;
                }
                ("endif", _) => {
                    open.pop();
                }
                _ if skipped => {}
                ("include", _) => self.include(argument.trim_matches('"'), lines),
                _ => lines.push(line.into()),
            }
        }
    }

    /// The lines with those between `//#for` and `//#endfor` repeated.
    fn unroll(&self, lines: &[String]) -> String {
        let mut text = String::new();
        let mut rest = lines.iter().enumerate();
        while let Some((i, line)) = rest.next() {
            let [directive, name, count] = words(line);
            if directive != "for" {
                text.push_str(line);
                text.push('\n');
                continue;
            }
            let mut depth = 1;
            let inside = lines[i + 1..].iter().take_while(|line| {
                match words(line)[0] {
                    "for" => depth += 1,
                    "endfor" => depth -= 1,
                    _ => {}
                }
                depth > 0
            });
            let body = &lines[i + 1..i + 1 + inside.count()];
            rest.nth(body.len());
            let named = self.counts.iter().find(|(n, _)| *n == count).map(|(_, count)| *count);
            let once = self.unroll(body);
            for n in 0..named.or_else(|| count.parse().ok()).unwrap_or(0) {
                text.push_str(&once.replace(&format!("${name}"), &n.to_string()));
            }
        }
        text
    }
}

/// The first words of a template line; empty ones of any other.
fn words(line: &str) -> [&str; 3] {
    let mut words = line.trim_start().strip_prefix("//#").unwrap_or("").split_whitespace();
    std::array::from_fn(|_| words.next().unwrap_or(""))
}
