//! Kernels compile under nvcc and NVRTC of several releases, with no more registers and spills than were recorded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use polymla::cuda::sm90;

/// Registers and spilled bytes of one kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Resources {
    registers: u32,
    spilled: u32,
}

/// What ptxas reports of each kernel in a log.
fn parse(log: &str) -> BTreeMap<String, Resources> {
    let number = |line: &str, after: &str| -> u32 {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.windows(after.split(' ').count()).position(|w| w.join(" ").trim_end_matches(',') == after);
        at.and_then(|at| words.get(at.wrapping_sub(1))).and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let (mut found, mut kernel, mut spilled) = (BTreeMap::new(), String::new(), 0);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap_or_default().to_string();
            spilled = 0;
        }
        if line.contains("spill stores") {
            spilled = number(line, "bytes spill stores") + number(line, "bytes spill loads");
        }
        if line.contains("Used ") && line.contains(" registers") && !kernel.is_empty() {
            let registers = number(line, "registers");
            found.insert(std::mem::take(&mut kernel), Resources { registers, spilled });
        }
    }
    found
}

#[test]
fn the_report_is_understood() {
    let log = "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
               ptxas info    : Function properties for a\n\
               \x20   912 bytes stack frame, 1864 bytes spill stores, 2104 bytes spill loads\n\
               ptxas info    : Used 128 registers, used 16 barriers, 912 bytes cumulative stack size\n\
               ptxas info    : Compiling entry function 'b' for 'sm_90a'\n\
               ptxas info    : Function properties for b\n\
               \x20   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
               ptxas info    : Used 32 registers\n";
    let found = parse(log);
    assert_eq!(found.get("a"), Some(&Resources { registers: 128, spilled: 3968 }));
    assert_eq!(found.get("b"), Some(&Resources { registers: 32, spilled: 0 }));
    assert_eq!(found.len(), 2);
}

/// The compilers named by the environment, each with the reports of all kernels.
fn reports() -> Vec<(String, BTreeMap<String, Resources>)> {
    let cubins = std::env::var_os("POLYMLA_TEST_CUBINS").map(PathBuf::from);
    let keep = |compiler: &str, unit: &str, cubin: &[u8]| {
        assert!(cubin.starts_with(b"\x7fELF"), "{compiler} {unit}: not a cubin");
        if let Some(folder) = &cubins {
            std::fs::write(folder.join(format!("{compiler}-{unit}.cubin")), cubin).expect("folder of cubins");
        }
    };
    let mut reports = Vec::new();
    for library in std::env::var("POLYMLA_TEST_NVRTC").unwrap_or_default().split(':').filter(|p| !p.is_empty()) {
        let compiled = sm90::compile_kernels(Path::new(library)).unwrap_or_else(|e| panic!("{library}: {e}"));
        let compiler = format!("nvrtc-{}.{}", compiled.version.0, compiled.version.1);
        let mut all = BTreeMap::new();
        for (unit, compiled) in compiled.units {
            keep(&compiler, unit, &compiled.binary);
            all.extend(parse(&compiled.log));
        }
        reports.push((compiler, all));
    }
    if let Some(nvcc) = std::env::var_os("POLYMLA_TEST_NVCC").filter(|v| !v.is_empty()) {
        let run = |arguments: &mut Command| {
            let output = arguments.output().unwrap_or_else(|e| panic!("{nvcc:?}: {e}"));
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(output.status.success(), "{arguments:?}: {text}");
            text
        };
        let version = run(Command::new(&nvcc).arg("--version"));
        let release = version.split("release ").nth(1).and_then(|v| v.split(',').next()).unwrap_or("unknown");
        let compiler = format!("nvcc-{release}");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("backends/sm90");
        let made = std::env::temp_dir().join(format!("polymla-nvcc-{}.cubin", std::process::id()));
        let mut all = BTreeMap::new();
        for (unit, file, defines) in sm90::kernel_units() {
            let log = run(Command::new(&nvcc)
                .args(["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"])
                .args(defines.iter().map(|d| format!("-D{d}")))
                .arg("-o")
                .arg(&made)
                .arg(sources.join(file)));
            keep(&compiler, unit, &std::fs::read(&made).expect("nvcc's output"));
            all.extend(parse(&log));
        }
        std::fs::remove_file(&made).expect("nvcc's output");
        reports.push((compiler, all));
    }
    reports
}

fn recorded_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/resources.txt")
}

#[test]
fn kernels_compile_within_the_recorded_registers_and_spills() {
    let reports = reports();
    if reports.is_empty() {
        eprintln!("SKIP kernels under every compiler: neither POLYMLA_TEST_NVRTC nor POLYMLA_TEST_NVCC is set");
        return;
    }
    let mut lines = Vec::new();
    for (compiler, all) in &reports {
        assert!(all.len() >= KERNELS, "{compiler} reported {} kernels of {KERNELS}", all.len());
        lines.extend(all.iter().map(|(kernel, r)| (format!("{compiler} {kernel}"), *r)));
    }
    lines.sort_by(|a, b| a.0.cmp(&b.0));
    if std::env::var_os("POLYMLA_TEST_RECORD").is_some() {
        let text: String = lines.iter().map(|(name, r)| format!("{name} {} {}\n", r.registers, r.spilled)).collect();
        std::fs::write(recorded_path(), format!("{HEADER}{text}")).expect("the recorded values");
    }
    let recorded = std::fs::read_to_string(recorded_path()).expect("the recorded values");
    let mut failures = Vec::new();
    for (name, r) in &lines {
        println!("{name}: {} registers, {} bytes spilled", r.registers, r.spilled);
        match recorded.lines().find_map(|line| line.strip_prefix(name.as_str()).and_then(two_numbers)) {
            None => failures.push(format!("{name}: nothing is recorded")),
            Some(limit) if r.registers > limit.0 || r.spilled > limit.1 => failures.push(format!(
                "{name}: {} registers and {} bytes spilled; recorded are {} and {}",
                r.registers, r.spilled, limit.0, limit.1
            )),
            Some(_) => {}
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn two_numbers(text: &str) -> Option<(u32, u32)> {
    let (registers, spilled) = text.strip_prefix(' ')?.split_once(' ')?;
    Some((registers.parse().ok()?, spilled.parse().ok()?))
}

/// One schedule, two combine and eight decode kernels.
const KERNELS: usize = 11;

const HEADER: &str = "\
# Compiler, kernel, registers a thread, bytes spilled. More of either fails tests/cuda/compile.rs. Written by
# scripts/check-cuda.sh --record; a spill recorded here is one still to be removed.
";
