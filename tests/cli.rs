//! The command line as a user meets it: what it prints, and its exit status.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn polymla(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polymla"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("POLYMLA_REQUIRE");
    command.output().expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

/// A file of this test's own, under the target directory.
fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

const SMALL: &str = "tests/golden/dense_bf16_b1_sq1_hq16_sk64.safetensors";

#[test]
fn info_lists_the_backends_and_the_matrix() {
    let output = polymla(&["info"]);
    assert!(output.status.success());
    let text = text(&output.stdout);
    assert!(text.contains("cpu") && text.contains("present"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "a line is longer than 100 columns:\n{text}");
}

#[test]
fn info_json_is_json() {
    let output = polymla(&["info", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(value["backends"].as_array().is_some_and(|list| list.iter().any(|b| b["name"] == "cpu")));
}

/// The README's support matrix is what the registry answers. Needs the column of every backend.
#[test]
#[cfg(all(
    feature = "sm90",
    feature = "cuda",
    feature = "hip",
    feature = "musa",
    feature = "maca",
    feature = "corex",
    feature = "wgpu",
    feature = "onnx"
))]
fn the_readme_shows_the_generated_matrix() {
    let readme = std::fs::read_to_string("README.md").expect("README.md");
    let matrix = text(&polymla(&["info", "--markdown"]).stdout);
    assert!(matrix.lines().count() > 10);
    assert!(readme.contains(&matrix), "README.md lacks the output of `polymla info --markdown`:\n{matrix}");
}

#[test]
fn conformance_passes_on_one_file_and_writes_junit() {
    let junit = scratch("conformance.xml");
    let output = polymla(&["conformance", SMALL, "--backend", "cpu", "--junit", junit.to_str().unwrap()]);
    let text = text(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("checks passed"), "{text}");
    let xml = std::fs::read_to_string(junit).expect("the report");
    assert!(xml.contains("<testsuite name=\"cpu\"") && xml.contains("failures=\"0\""), "{xml}");
}

#[test]
fn conformance_fails_on_a_wrong_expectation() {
    // The file's last tensor byte belongs to one of its values; flipping bits of the expected output must be noticed.
    let mut bytes = std::fs::read(SMALL).expect("golden file");
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let layout: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("header");
    let begin = layout["ref_out"]["data_offsets"][0].as_u64().expect("ref_out") as usize;
    bytes[8 + header + begin + 1] ^= 0x40;
    let broken = scratch("broken.safetensors");
    std::fs::write(&broken, bytes).expect("scratch file");
    let output = polymla(&["conformance", broken.to_str().unwrap(), "--backend", "cpu"]);
    assert!(!output.status.success());
    assert!(text(&output.stdout).contains("FAIL"));
}

#[test]
fn decode_writes_what_conformance_reads() {
    let out = scratch("decoded.safetensors");
    let output = polymla(&["decode", SMALL, out.to_str().unwrap(), "--backend", "cpu", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let bytes = std::fs::read(&out).expect("the output");
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let layout: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("header");
    assert_eq!(layout["out"]["shape"], serde_json::json!([1, 1, 16, 512]));
    assert_eq!(layout["out"]["dtype"], "BF16");
    assert_eq!(layout["lse"]["shape"], serde_json::json!([1, 16, 1]));
    let range = &layout["lse"]["data_offsets"];
    let at = |i: usize| 8 + header + range[i].as_u64().expect("offset") as usize;
    let lse: Vec<f32> = bytes[at(0)..at(1)].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    assert!(lse.iter().all(|x| x.is_finite()), "{lse:?}");
}

#[test]
fn unknown_names_are_errors_that_say_what_is_known() {
    let output = polymla(&["decode", SMALL, "/dev/null", "--backend", "abacus"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("backend abacus is absent: this build contains"), "{output:?}");
    let output = polymla(&["bench", "--suite", "none"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("must be one of cpu, h200, quick"));
    let output = polymla(&["conformance", "no/such/file.safetensors"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("no/such/file.safetensors"));
}

#[test]
fn a_required_backend_that_is_absent_fails() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polymla"));
    command.args(["conformance", SMALL]).current_dir(env!("CARGO_MANIFEST_DIR")).env("POLYMLA_REQUIRE", "cpu,abacus");
    let output = command.output().expect("the binary starts");
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("abacus"), "{output:?}");
}

/// A slip in the name of the folder must not pass for the shaders that are built in.
#[test]
#[cfg(feature = "wgpu")]
fn a_folder_of_shaders_that_is_not_there_is_an_error() {
    let decode = |folder: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polymla"));
        command.args(["decode", SMALL, scratch("shaders.safetensors").to_str().unwrap(), "--backend", "wgpu"]);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("POLYMLA_SHADER_DIR", folder).output().expect("it starts")
    };
    let usual = decode("");
    if !usual.status.success() {
        assert!(text(&usual.stderr).contains("backend wgpu is absent"), "{usual:?}");
        eprintln!("SKIP: {}", text(&usual.stderr));
        return;
    }
    let wrong = decode("no/such/folder");
    assert!(!wrong.status.success() && text(&wrong.stderr).contains("POLYMLA_SHADER_DIR"), "{wrong:?}");
}

/// Bytes that are no UTF-8 name no backend, and must not pass for nothing required.
#[test]
#[cfg(unix)]
fn a_required_backend_whose_name_is_no_utf8_fails() {
    use std::os::unix::ffi::OsStrExt as _;
    let mut command = Command::new(env!("CARGO_BIN_EXE_polymla"));
    command.args(["conformance", SMALL, "--backend", "cpu"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.env("POLYMLA_REQUIRE", std::ffi::OsStr::from_bytes(b"cp\xff")).output().expect("it starts");
    assert!(!output.status.success() && text(&output.stderr).contains("POLYMLA_REQUIRE"), "{output:?}");
}

/// A typo in the variable must neither panic nor pass for "whatever is there".
#[test]
fn a_wrong_instruction_set_is_an_error_that_says_which_there_are() {
    for wrong in ["sse9", "AVX2", " portable", "portable,avx2"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polymla"));
        command.args(["decode", SMALL, scratch("wrong-isa.safetensors").to_str().unwrap(), "--backend", "cpu"]);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("POLYMLA_CPU_ISA", wrong);
        let output = command.output().expect("the binary starts");
        let stderr = text(&output.stderr);
        assert!(!output.status.success(), "{wrong}: {output:?}");
        let allowed: Vec<_> = polymla::cpu::Isa::available().iter().map(|isa| isa.name()).collect();
        let expected = ["POLYMLA_CPU_ISA", wrong, &allowed.join(", ")];
        assert!(expected.iter().all(|part| stderr.contains(part)), "{wrong}: {stderr}");
        assert!(!stderr.contains("panicked"), "{wrong}: {stderr}");
        assert!(!scratch("wrong-isa.safetensors").exists(), "{wrong}");
    }
}

#[test]
#[cfg(feature = "onnx")]
fn export_converts_a_file_that_decode_then_runs() {
    let (model, inputs) = (scratch("decode.onnx"), scratch("inputs.safetensors"));
    let export = |like: &str| {
        let paths = [model.to_str().unwrap(), inputs.to_str().unwrap()];
        polymla(&["export", "--onnx", paths[0], "--like", like, "--inputs", paths[1], "--json"])
    };
    let output = export(SMALL);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(value["opset"], 13);
    assert_eq!(value["inputs"][0], serde_json::json!({"name": "q", "dtype": "F16", "shape": [1, 1, 16, 576]}));
    assert_eq!(value["saturated"], 0);
    let decoded = scratch("decoded-onnx.safetensors");
    let output = polymla(&["decode", inputs.to_str().unwrap(), decoded.to_str().unwrap(), "--backend", "onnx"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // A key that f16 cannot hold: written, counted, and no success.
    let mut bytes = std::fs::read(SMALL).expect("golden file");
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let layout: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).expect("header");
    let begin = 8 + header + layout["q"]["data_offsets"][0].as_u64().expect("q") as usize;
    bytes[begin..begin + 2].copy_from_slice(&0x7f00u16.to_le_bytes());
    let large = scratch("large.safetensors");
    std::fs::write(&large, bytes).expect("scratch file");
    let output = export(large.to_str().unwrap());
    assert!(!output.status.success() && text(&output.stdout).contains("\"saturated\": 1"), "{output:?}");
}

#[test]
#[cfg(feature = "onnx")]
fn export_makes_a_class_by_its_sizes_or_says_why_not() {
    let model = scratch("class.onnx");
    let export = |more: &[&str]| polymla(&[&["export", "--onnx", model.to_str().unwrap()], more].concat());
    let output = export(&["--b", "2", "--s-q", "2", "--h-q", "16", "--pages", "8", "--mask", "causal"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("makes out F16 [2, 2, 16, 512]"), "{output:?}");
    for (wrong, says) in [
        (["--pages", "0"], "num_pages is 0; it must be at least 1"),
        (["--h-kv", "3"], "h_q is 128; it must be a multiple of h_kv, which is 3"),
        (["--page-size", "100000000"], "tokens a request overflows"),
    ] {
        let output = export(&wrong);
        let stderr = text(&output.stderr);
        assert!(!output.status.success() && stderr.contains(says) && !stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn bench_times_a_shape_and_draws_it() {
    let svg = scratch("roofline.svg");
    let shape = ["--shape", "1,1,16,256", "--backend", "cpu", "--repeats", "1", "--warmups", "0", "--json"];
    let output = polymla(&[&["bench"], &shape[..], &["--svg", svg.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let row = &value["rows"][0];
    assert!(row["us"].as_f64().is_some_and(|us| us > 0.0), "{value}");
    assert_eq!(row["best_peer"], serde_json::Value::Null, "a CPU is not compared with an H200's peers");
    assert!(std::fs::read_to_string(svg).expect("the picture").contains("polymla"));
}

/// Numbers that would divide by zero, overflow, or end in memory or time without end.
#[test]
fn numbers_out_of_range_are_errors_that_say_the_range() {
    for (wrong, says) in [
        (&["bench", "--shape", "1,1,16,64", "--page-size", "0"][..], "page-size"),
        (&["bench", "--shape", "1,1,16,64", "--repeats", "0"], "repeats"),
        (&["bench", "--shape", "1,1,16,64", "--repeats", "18446744073709551615"], "repeats"),
        (&["bench", "--shape", "1,1,16,64", "--warmups", "18446744073709551615"], "warmups"),
        (&["bench", "--shape", "2147483647,1,16,64"], "0..=1048576"),
        (&["bench", "--shape", "1,1,16"], "must have 4 numbers"),
        (&["bench", "--shape", "1,1,16,nan"], "0..=2147483647"),
        (&["bench", "--shape", "1,1,16,64", "--ceilings", "nan,inf"], "1e-9..=1e9"),
        (&["bench", "--shape", "1,1,16,64", "--ceilings", "0,1"], "1e-9..=1e9"),
        (
            &["bench", "--backend", "cpu", "--shape", "1,1,16,0", "--repeats", "1", "--no-flush", "--svg", "no.svg"],
            "no.svg",
        ),
        (&["conformance", SMALL, "--random", "2", "--seed", "18446744073709551615"], "seed is 18446744073709551615"),
        (&["conformance", SMALL, "--backend", "cpu", "--junit", "no/such/folder.xml"], "no/such/folder.xml"),
    ] {
        let output = polymla(wrong);
        let stderr = text(&output.stderr);
        assert!(!output.status.success() && stderr.contains(says), "{wrong:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{wrong:?}: {stderr}");
    }
}
