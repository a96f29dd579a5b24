//! Faults put into the shaders on purpose: the conformance suite must notice each.

use std::path::Path;
use std::process::Command;

/// File, what is replaced, by what.
const MUTANTS: [(&str, &str, &str, &str); 10] = [
    ("nothing is rescaled when the maximum rises", "vector.wgsl", "accumulators[r] *= factors[r];", ""),
    ("sums are not rescaled", "vector.wgsl", "sum = sum * factor +", "sum = sum +"),
    ("V is read past the end", "vector.wgsl", "if key == NOWHERE {", "if false {"),
    ("no mask", "vector.wgsl", "step + t < ends[row] && ckv_tokens[t] != NOWHERE", "ckv_tokens[t] != NOWHERE"),
    (
        "the last split is lost",
        "combine.wgsl",
        "i < end; i += 1u) {\n            let weight",
        "i + 1u < end; i += 1u) {\n            let weight",
    ),
    ("rows that see nothing divide by 0", "combine.wgsl", "let blind = sum == 0.0;", "let blind = false;"),
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

#[test]
fn every_fault_is_noticed() {
    if super::backend(polymla::wgpu::WgpuBackend::new).is_none() {
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("wgpu-mutants-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    assert!(passes(&folder), "the shaders as they are");
    let mut missed = Vec::new();
    for (what, file, from, to) in MUTANTS {
        let text = std::fs::read_to_string(Path::new("shaders").join(file)).expect(file);
        assert!(text.contains(from), "{file} has no {from:?}: bring this test up to date");
        std::fs::write(folder.join(file), text.replace(from, to)).expect("a file");
        if passes(&folder) {
            missed.push(what);
        }
        std::fs::remove_file(folder.join(file)).expect("the file");
    }
    std::fs::remove_dir_all(&folder).expect("the folder");
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
