//! The WGSL files and the template that makes variants of them.
//!
//! A line that begins with `//#` is for the template: `//#if NAME`, `//#elif NAME`, `//#else`, `//#endif`, and
//! `//#include "FILE"`. The web example has the same few lines in JavaScript.

use std::fmt::Write as _;

use crate::tensor::DType;

/// Name and text of every shader file.
pub const FILES: &[(&str, &str)] = &[
    ("params.wgsl", include_str!("../../shaders/params.wgsl")),
    ("load.wgsl", include_str!("../../shaders/load.wgsl")),
    ("store.wgsl", include_str!("../../shaders/store.wgsl")),
    ("schedule.wgsl", include_str!("../../shaders/schedule.wgsl")),
    ("prepare.wgsl", include_str!("../../shaders/prepare.wgsl")),
    ("decode.wgsl", include_str!("../../shaders/decode.wgsl")),
    ("combine.wgsl", include_str!("../../shaders/combine.wgsl")),
];

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
    /// Products by cooperative matrices of 16 x 16.
    CooperativeMatrix,
}

impl Path {
    /// All of them, plainest first.
    pub const ALL: [Path; 4] = [Path::Plain, Path::Subgroups, Path::NativeF16, Path::CooperativeMatrix];

    /// Whether the path exists for an element type.
    pub fn takes(self, dtype: DType) -> bool {
        match self {
            Path::Plain | Path::Subgroups => dtype != DType::I32,
            Path::NativeF16 => dtype == DType::F16,
            Path::CooperativeMatrix => matches!(dtype, DType::Bf16 | DType::F16),
        }
    }

    /// The name, as `polymla info` and the environment have it.
    pub fn name(self) -> &'static str {
        match self {
            Path::Plain => "plain",
            Path::Subgroups => "subgroups",
            Path::NativeF16 => "f16",
            Path::CooperativeMatrix => "matrix",
        }
    }

    fn defines(self) -> &'static [&'static str] {
        match self {
            Path::Plain => &[],
            Path::Subgroups => &["SUBGROUPS"],
            Path::NativeF16 => &["SUBGROUPS", "NATIVE_F16"],
            Path::CooperativeMatrix => &["SUBGROUPS", "NATIVE_F16", "COOPERATIVE_MATRIX"],
        }
    }

    /// Query rows of a workgroup: `ROWS` of params.wgsl.
    pub(super) fn rows(self) -> usize {
        if self == Path::CooperativeMatrix { 64 } else { 16 }
    }
    /// Columns of V of a workgroup: `COLUMNS` of decode.wgsl.
    pub(super) fn columns(self) -> usize {
        512
    }
}

/// The WGSL of a kernel.
pub fn source(kernel: Kernel, path: Path, dtype: DType) -> String {
    let element = match dtype {
        DType::Bf16 => "BF16",
        DType::F16 => "F16",
        DType::F32 => "F32",
        DType::I32 => "I32",
    };
    let defines: Vec<&str> = path.defines().iter().copied().chain([element]).collect();
    let mut text = String::new();
    expand(&format!("{}.wgsl", kernel.name()), &defines, &mut text);
    text
}

/// Appends a file with its template lines carried out.
fn expand(file: &str, defines: &[&str], text: &mut String) {
    let Some((_, body)) = FILES.iter().find(|(name, _)| *name == file) else {
        // Refused by the compiler, with the name in its message.
        writeln!(text, "#include of {file}, which does not exist").expect("to a string");
        return;
    };
    // For every open `if`: whether its present branch is taken, and whether one was.
    let mut open: Vec<(bool, bool)> = Vec::new();
    for line in body.lines() {
        let mut words = line.trim_start().strip_prefix("//#").unwrap_or("").split_whitespace();
        let directive = words.next();
        let holds = words.next().unwrap_or("");
        let is = |name: &str| name.strip_prefix('!').map_or(defines.contains(&name), |n| !defines.contains(&n));
        let skipped = open.iter().any(|(taken, _)| !taken);
        match (directive, open.last_mut()) {
            (Some("if"), _) => open.push((is(holds), is(holds))),
            (Some("elif"), Some((taken, done))) => {
                *taken = !*done && is(holds);
                *done |= *taken;
            }
            (Some("else"), Some((taken, done))) => {
                *taken = !*done;
                *done = true;
            }
            (Some("endif"), _) => {
                open.pop();
            }
            _ if skipped => {}
            (Some("include"), _) => expand(holds.trim_matches('"'), defines, text),
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
}
