//! Which kernel serves which problem, and what it takes: `backends/portable/config.h` in numbers.

use crate::problem::Problem;
use crate::tensor::DType;

/// Threads of every portable kernel but one.
pub(crate) const THREADS: u32 = 256;
/// Threads of the kernel with roles (`decode_roles.h`): the largest tile of the largest class.
const ROLES_THREADS: u32 = 512;
/// Columns of O that a block of the generic kernel handles.
const GENERIC_COLUMNS: usize = 4 * THREADS as usize;
/// At least `sizeof(GenericSmem)`; `COMBINE_SMEM`, `SCHEDULE_SMEM`.
const GENERIC_SHARED: u32 = 1024;
pub(crate) const COMBINE_SHARED: u32 = 4096;
/// Of the merge kernel: threads, and `sizeof(MergeSmem)`.
pub(crate) const MERGE_THREADS: u32 = 512;
pub(crate) const MERGE_SHARED: u32 = 22144;
/// Pieces of partial results, as `pieces.h` has them: in a row of O; query rows and bytes of one.
pub(crate) const PIECES_A_ROW: usize = 16;
pub(crate) const PIECE_ROWS: usize = 8;
pub(crate) const PIECE_BYTES: usize = 768;
pub(crate) const SCHEDULE_SHARED: u32 = 6144;

/// A tile class: kernels compiled for the shared memory that a block may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TileClass {
    /// `POLYMLA_SMEM_KIB`.
    pub(crate) kib: u32,
    /// What a launch asks for. Every tile of a class takes more than half of it, so asking for less would not make room
    /// for a second block.
    pub(crate) bytes: u32,
    /// The warp widths that its kernels can be compiled for.
    warps: &'static [u32],
    /// Query rows of its tiles.
    rows: &'static [usize],
}

const CLASSES: [TileClass; 5] = [
    TileClass { kib: 227, bytes: 227 * 1024, warps: &[32], rows: &[16, 32, 64] },
    // Named for sm_80. Its tiles fit the 160 KiB of gfx950 too.
    TileClass { kib: 163, bytes: 160 * 1024, warps: &[32, 64], rows: &[16, 32, 64] },
    TileClass { kib: 99, bytes: 99 * 1024, warps: &[32], rows: &[16, 32] },
    TileClass { kib: 64, bytes: 64 * 1024, warps: &[32, 64], rows: &[16] },
    TileClass { kib: 28, bytes: 28 * 1024, warps: &[128], rows: &[16] },
];

impl TileClass {
    /// The largest class for a device with warps of that width and that much shared memory a block.
    pub(crate) fn of(warp: u32, shared_bytes: u32) -> Option<TileClass> {
        CLASSES.into_iter().find(|class| class.bytes <= shared_bytes && class.warps.contains(&warp))
    }

    /// Whether the tile of so many rows is served by the kernel with roles.
    fn has_roles(&self, rows: usize) -> bool {
        self.kib == 227 && rows == 64
    }

    /// The decode kernel for a problem, and the blocks of its grid for each part of the schedule. `aligned`: rows of all
    /// tensors are as the kernel with roles needs them.
    pub(crate) fn decode(&self, problem: &Problem, aligned: bool) -> (Decode, usize) {
        let rows = problem.s_q() * problem.heads_per_kv();
        let bf16 = problem.dtype() == DType::Bf16;
        let head_dim_k = match (problem.head_dim_k(), problem.head_dim_v()) {
            (d @ (512 | 576), 512) => d,
            (_, columns) => {
                let chunks = columns.div_ceil(GENERIC_COLUMNS);
                return (Decode { bf16, tuned: None }, rows * chunks * problem.h_kv());
            }
        };
        let fits = |tile: &usize| aligned || !self.has_roles(*tile);
        let tiles = || self.rows.iter().copied().filter(fits);
        let tile = tiles().find(|tile| *tile >= rows).or_else(|| tiles().next_back()).unwrap_or(self.rows[0]);
        (Decode { bf16, tuned: Some((head_dim_k, tile)) }, rows.div_ceil(tile) * problem.h_kv())
    }
}

/// A decode kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Decode {
    bf16: bool,
    /// head_dim_k and query rows of the tile; `None` is the kernel for all other head dimensions.
    tuned: Option<(usize, usize)>,
}

impl Decode {
    /// How many there are.
    pub(crate) const COUNT: usize = 14;

    /// A number for each, below [`COUNT`](Self::COUNT).
    pub(crate) fn index(self) -> usize {
        let shape = match self.tuned {
            None => 0,
            Some((head_dim_k, rows)) => 1 + usize::from(head_dim_k == 576) * 3 + (rows / 32).min(2),
        };
        shape * 2 + usize::from(self.bf16)
    }

    /// Whether the head dimensions are those of a tuned kernel.
    pub(crate) fn is_tuned(self) -> bool {
        self.tuned.is_some()
    }

    /// The kernel's name.
    pub(crate) fn name(self) -> String {
        let dtype = if self.bf16 { "bf16" } else { "f16" };
        match self.tuned {
            None => format!("polymla_generic_{dtype}"),
            Some((head_dim_k, rows)) => format!("polymla_decode_{dtype}_d{head_dim_k}_m{rows}"),
        }
    }

    /// Threads of a block.
    pub(crate) fn threads(self, class: &TileClass) -> u32 {
        if self.tuned.is_some_and(|(_, rows)| class.has_roles(rows)) { ROLES_THREADS } else { THREADS }
    }

    /// Dynamic shared memory of a launch.
    pub(crate) fn shared_bytes(self, class: &TileClass) -> u32 {
        if self.tuned.is_some() { class.bytes } else { GENERIC_SHARED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of this file are those of the kernels' headers: a C++ compiler says so.
    #[test]
    fn numbers_agree_with_the_headers() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = std::env::temp_dir().join(format!("polymla-tiles-{}.cpp", std::process::id()));
        let common = format!(
            "#include \"dialect.h\"\n#include \"combine.h\"\n#include \"config.h\"\n#include \"generic.h\"\n\
             #include \"schedule.h\"\nusing namespace polymla;\n\
             static_assert(DECODE_THREADS == {THREADS} && COMBINE_THREADS == {THREADS}, \"\");\n\
             static_assert(GENERIC_THREADS == {THREADS} && SCHEDULE_THREADS == {THREADS}, \"\");\n\
             static_assert(GENERIC_COLUMNS == {GENERIC_COLUMNS} && sizeof(GenericSmem) <= {GENERIC_SHARED}, \"\");\n\
             static_assert(COMBINE_SMEM == {COMBINE_SHARED} && SCHEDULE_SMEM == {SCHEDULE_SHARED}, \"\");\n"
        );
        for class in CLASSES {
            let mut text = common.clone();
            for rows in class.rows {
                for head_dim_k in [512, 576] {
                    let total = format!("ClassConfig<{head_dim_k}, 512, {rows}>::type::total");
                    text += &format!("static_assert({total} <= {0} && {total} > {0} / 2, \"\");\n", class.bytes);
                }
            }
            text += &format!(
                "#ifdef PM_PIECES\n#include \"merge.h\"\nstatic_assert(sizeof(MergeSmem) == {MERGE_SHARED}, \"\");\n\
                 static_assert(MERGE_THREADS == {MERGE_THREADS} && PIECES_A_ROW == {PIECES_A_ROW}, \"\");\n\
                 static_assert(PIECE_ROWS == {PIECE_ROWS} && PIECE_BYTES == {PIECE_BYTES}, \"\");\n#endif\n"
            );
            std::fs::write(&source, text).expect("the folder of temporary files");
            for warp in class.warps {
                let output = std::process::Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
                    .args(["-std=c++17", "-fsyntax-only", "-w", "-I"])
                    .arg(root.join("tests/simt"))
                    .arg("-I")
                    .arg(root.join("backends/portable"))
                    .args([format!("-DPM_WARP={warp}"), format!("-DPOLYMLA_SMEM_KIB={}", class.kib)])
                    .args((*warp == 32 && class.kib >= 99).then_some("-DSIMT_TILE_MMA"))
                    .arg(&source)
                    .output()
                    .expect("a C++ compiler is needed: CXX, or c++");
                let words = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "class {} at warp {warp}: {words}", class.kib);
            }
        }
        let _ = std::fs::remove_file(source);
    }

    #[test]
    fn devices_get_their_class() {
        let class = |warp, kib: u32| TileClass::of(warp, kib * 1024).map(|c| c.kib);
        assert_eq!(class(64, 64), Some(64));
        assert_eq!(class(64, 100), Some(64), "no kernel of class 99 has waves of 64");
        assert_eq!(class(64, 160), Some(163), "gfx950 has 160 KiB, which that class's kernels fit");
        assert_eq!(class(128, 28), Some(28));
        assert_eq!(class(32, 227), Some(227));
        assert_eq!(class(32, 48), None);
        assert_eq!(class(64, 16), None);
    }

    #[test]
    fn problems_get_their_kernel() {
        let class = TileClass::of(32, 227 * 1024).expect("a class");
        let decode = |h_q, s_q, head_dim_k, head_dim_v| {
            let builder = Problem::builder(1).h_q(h_q).s_q(s_q).head_dim_k(head_dim_k).head_dim_v(head_dim_v);
            let (decode, blocks) = class.decode(&builder.build().expect("valid"), true);
            (decode.name(), blocks)
        };
        assert_eq!(decode(16, 1, 576, 512), ("polymla_decode_bf16_d576_m16".into(), 1));
        assert_eq!(decode(17, 1, 512, 512), ("polymla_decode_bf16_d512_m32".into(), 1));
        assert_eq!(decode(128, 2, 576, 512), ("polymla_decode_bf16_d576_m64".into(), 4));
        assert_eq!(decode(3, 2, 1600, 1500), ("polymla_generic_bf16".into(), 12));
    }

    #[test]
    fn every_kernel_has_a_number_of_its_own() {
        let tuned = [512, 576].into_iter().flat_map(|d| [16, 32, 64].map(|rows| Some((d, rows))));
        let all = tuned.chain([None]).flat_map(|tuned| [true, false].map(|bf16| Decode { bf16, tuned }));
        let mut numbers: Vec<_> = all.map(Decode::index).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..Decode::COUNT).collect::<Vec<_>>());
    }
}
