//! Faults put into the shaders on purpose: the conformance suite must notice each.

use std::path::Path;
use std::process::Command;

/// File, what is replaced, by what.
type Mutant = (&'static str, &'static str, &'static str, &'static str);
const MUTANTS: [Mutant; 12] = [
    ("nothing is rescaled when the maximum rises", "vector.wgsl", "accumulators[r] *= factors[r];", ""),
    ("sums are not rescaled", "vector.wgsl", "sum = sum * factor +", "sum = sum +"),
    ("V is read past the end", "vector.wgsl", "if key == NOWHERE {", "if false {"),
    ("no mask", "vector.wgsl", "step + t < ends[row] && ckv_tokens[t] != NOWHERE", "ckv_tokens[t] != NOWHERE"),
    (
        "the last split is lost",
        "combine.wgsl",
        "let n = min(end - chunk, THREADS);",
        "let n = min(end - chunk, THREADS) - 1u;",
    ),
    (
        "a fourth of the splits is lost where four merge a row",
        "combine.wgsl",
        "d = group_sums[thread % lanes + 3u * lanes];",
        "d = vec4<f32>(0.0);",
    ),
    ("the fourth of few splits is lost", "combine.wgsl", "(parts[2] + parts[3])", "parts[2]"),
    ("rows that see nothing divide by 0", "combine.wgsl", "let blind = sums.x == 0.0;", "let blind = false;"),
    (
        "a store takes its neighbour along",
        "store.wgsl",
        "atomicAnd(&out[at >> 1u], ~(0xffffu << shift));",
        "atomicStore(&out[at >> 1u], 0u);",
    ),
    ("causal off by one", "prepare.wgsl", "params.s_q - s - 1u", "params.s_q - s"),
    (
        "odd offsets are taken for even",
        "load.wgsl",
        "if (i & 1u) == 0u { return both(ckv[i >> 1u]); }",
        "return both(ckv[i >> 1u]);",
    ),
    ("parts begin at wrong blocks", "schedule.wgsl", "block += here * params.split_blocks;", "block += here;"),
];

/// The test that is to notice a fault in the matrix kernels.
const SHORT: &str = "limits::matrix_paths_are_right_in_short";
const RANGE: &str = "range::bf16_of_any_size_is_right";

/// The same for matrices, which are emulated: by which path, and in which test.
const MATRIX_MUTANTS: [(&str, &str, Mutant); 22] = [
    (
        "emulated-matrix64",
        SHORT,
        ("matrices are not rescaled", "matrix.wgsl", "shares[subgroup * 64u + i] *= factors[$mu * 16u + i / 4u];", ""),
    ),
    ("emulated-matrix16", SHORT, ("sums are not rescaled", "matrix.wgsl", " sum = sum * factor", " sum = sum")),
    (
        "emulated-matrix32",
        SHORT,
        ("the sum for lse is not rescaled", "matrix.wgsl", "lse_sum = lse_sum * factor", "lse_sum = lse_sum"),
    ),
    (
        "emulated-matrix16",
        SHORT,
        ("the reference stays where it was", "matrix.wgsl", "(highest > top + MOST) | (", "("),
    ),
    ("emulated-matrix64", SHORT, ("no mask", "matrix.wgsl", "< vec4<u32>(row_end)", "< vec4<u32>(0xffffffffu)")),
    (
        "emulated-matrix16",
        SHORT,
        (
            "what lies past the end is read",
            "keys.wgsl",
            "return ckv[min(place.ckv + n * TOKENS_APART * stride, last)];",
            "return ckv[place.ckv + n * TOKENS_APART * stride];",
        ),
    ),
    (
        "emulated-matrix64",
        SHORT,
        ("and in pages of any size", "keys.wgsl", "select(NOWHERE, ckv_at / 8u, exists)", "ckv_at / 8u"),
    ),
    ("emulated-matrix16", SHORT, ("shares are lost", "matrix.wgsl", "s < SHARES;", "s < SHARES - 1u;")),
    (
        "emulated-matrix64",
        SHORT,
        (
            "the last step's values are lost",
            "matrix.wgsl",
            "// the last step's values\n//#include \"values.wgsl\"\n",
            "\n",
        ),
    ),
    (
        "emulated-matrix32",
        SHORT,
        ("a chain is lost", "matrix.wgsl", "plus(plus(chain_0, chain_1), chain_2)", "plus(chain_0, chain_1)"),
    ),
    (
        "emulated-matrix32",
        SHORT,
        (
            "a step's keys are those of the step before",
            "matrix.wgsl",
            "next_$n = key_vector($nu, next,",
            "next_$n = key_vector($nu, first,",
        ),
    ),
    (
        "emulated-matrix64",
        SHORT,
        (
            "values are those of this step's keys",
            "values.wgsl",
            "load_values(there * PITCH + ",
            "load_values((TOKENS - there) * PITCH + ",
        ),
    ),
    (
        "emulated-matrix64",
        SHORT,
        ("that a reference rose is forgotten", "matrix.wgsl", "rose = risen[0] == step + 1u;", "rose = false;"),
    ),
    (
        "emulated-matrix64",
        SHORT,
        (
            "the split before leaves weights",
            "matrix.wgsl",
            "store_vector(TOKENS + token_of($nu, thread), vector_of($nu, thread), array<vec4<f16>, 2>());",
            "",
        ),
    ),
    (
        "emulated-matrix64",
        SHORT,
        (
            "the last stage of queries is everybody's",
            "matrix.wgsl",
            "if row_tile * 16u / STAGE_ROWS == stage {",
            "if row_tile * 16u / STAGE_ROWS <= stage {",
        ),
    ),
    ("emulated-matrix16", SHORT, ("pages are not turned", "keys.wgsl", "place.column + u32(over)", "place.column")),
    (
        "emulated-matrix64",
        SHORT,
        (
            "rows from 32 on have others' weights",
            "values.wgsl",
            "WEIGHTS_AT + $mu * 16u",
            "WEIGHTS_AT + $mu % 2u * 16u",
        ),
    ),
    (
        "emulated-matrix64",
        RANGE,
        ("what f16 does not have is taken", "range.wgsl", "return key <= 65280.0", "return true || key <= 65280.0"),
    ),
    (
        "emulated-matrix16",
        RANGE,
        ("queries stay scaled", "matrix.wgsl", "params.scale_log2 / query_scale", "params.scale_log2"),
    ),
    (
        "emulated-matrix16",
        RANGE,
        (
            "subnormal numbers are flushed",
            "keys.wgsl",
            "let converted = halves(v);",
            "var converted = halves(v);
             for (var i = 0; i < 2; i += 1) {
                 converted[i] = select(converted[i], vec4<f16>(0.0h), abs(converted[i]) < vec4<f16>(0.00006h));
             }",
        ),
    ),
    (
        "emulated-matrix32",
        RANGE,
        ("what matrices leave is left", "decode.wgsl", "* SUMS] == UNFIT", "* SUMS] == -UNFIT"),
    ),
    (
        "emulated-matrix64",
        RANGE,
        (
            "tiles are counted as if alone",
            "params.wgsl",
            "let rows_together = ROWS * params.subtiles;",
            "let rows_together = ROWS;",
        ),
    ),
];

/// Whether the suite passes with shaders from `folder` where it has them.
fn passes(folder: &Path) -> bool {
    let golden = "tests/golden/dense_bf16_b6_sq2_hq16_zero_len.safetensors";
    let rising = "tests/golden/dense_bf16_b2_sq2_hq16_peaked_rising.safetensors";
    let mut command = Command::new(env!("CARGO_BIN_EXE_polymla"));
    command.args(["conformance", golden, rising, "--backend", "wgpu", "--random", "40"]);
    command.env("POLYMLA_SHADER_DIR", folder).env("POLYMLA_WGPU_PATH", "plain").env_remove("POLYMLA_REQUIRE");
    let output = command.output().expect("the binary starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // A shader that does not compile would be no proof.
    assert!(text.contains("checks passed"), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("create_compute_pipeline"), "{text}");
    output.status.success()
}

/// Whether a test of a matrix path passes with shaders from `folder` where it has them.
fn matrices_pass(path: &str, test: &str, folder: &Path) -> bool {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", test]).env("POLYMLA_SHADER_DIR", folder).env(super::ONE_PATH, path);
    let output = command.env("RUST_BACKTRACE", "0").output().expect("the test starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("running 1 test"), "{text}");
    assert!(!text.contains("create_compute_pipeline"), "{text}");
    output.status.success()
}

/// The faults that are not noticed.
fn unnoticed(name: &str, mutants: &[Mutant], passes: impl Fn(usize, &Path) -> bool) -> Vec<&'static str> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("wgpu-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let mut missed = Vec::new();
    for (i, (what, file, from, to)) in mutants.iter().enumerate() {
        let text = std::fs::read_to_string(Path::new("shaders").join(file)).expect(file);
        assert!(text.contains(from), "{file} has no {from:?}: bring this test up to date");
        std::fs::write(folder.join(file), text.replace(from, to)).expect("a file");
        if passes(i, &folder) {
            missed.push(*what);
        }
        std::fs::remove_file(folder.join(file)).expect("the file");
    }
    std::fs::remove_dir_all(&folder).expect("the folder");
    missed
}

#[test]
fn every_fault_is_noticed() {
    if super::backend(polymla::wgpu::WgpuBackend::new).is_none() {
        return;
    }
    assert!(passes(Path::new("")), "the shaders as they are");
    let missed = unnoticed("mutants", &MUTANTS, |_, folder| passes(folder));
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn every_fault_in_matrices_is_noticed() {
    let Some(backend) = super::backend(polymla::wgpu::WgpuBackend::new) else { return };
    if !backend.has(polymla::wgpu::shaders::Path::EmulatedMatrix64) {
        eprintln!("SKIP the matrices' mutants: the adapter cannot emulate matrices");
        return;
    }
    for test in [SHORT, RANGE] {
        assert!(matrices_pass("emulated-matrix64", test, Path::new("")), "the shaders as they are");
    }
    let missed = unnoticed("matrix-mutants", &MATRIX_MUTANTS.map(|(_, _, mutant)| mutant), |i, folder| {
        let (path, test, _) = MATRIX_MUTANTS[i];
        matrices_pass(path, test, folder)
    });
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

/// Without the kernel that does what matrices of f16 leave, ordinary numbers are right still; a matrix kernel that left all of them
/// would be right with it, and slow.
#[test]
fn matrices_leave_no_ordinary_numbers() {
    const ORDINARY: &str = "range::ordinary_bf16_is_right";
    let Some(backend) = super::backend(polymla::wgpu::WgpuBackend::new) else { return };
    let paths = ["emulated-matrix16", "emulated-matrix32", "emulated-matrix64"];
    if !backend.has(polymla::wgpu::shaders::Path::EmulatedMatrix64) {
        eprintln!("SKIP what matrices leave: the adapter cannot emulate matrices");
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("wgpu-left-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let change = |file: &str, old: &str, new: &str| {
        let text = std::fs::read_to_string(Path::new("shaders").join(file)).expect(file);
        assert!(text.contains(old), "{file} has no {old:?}: bring this test up to date");
        std::fs::write(folder.join(file), text.replace(old, new)).expect("a file");
    };
    change("decode.wgsl", "* SUMS] == UNFIT", "* SUMS] == -UNFIT");
    let left: Vec<_> = paths.iter().filter(|path| !matrices_pass(path, ORDINARY, &folder)).collect();
    change("range.wgsl", "return key <= 65280.0", "return key <= 0.0");
    let unnoticed: Vec<_> = paths.iter().filter(|path| matrices_pass(path, ORDINARY, &folder)).collect();
    std::fs::remove_dir_all(&folder).expect("the folder");
    assert!(left.is_empty() && unnoticed.is_empty(), "left to f32: {left:?}; not noticed: {unnoticed:?}");
}
