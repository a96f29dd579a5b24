//! HIP without a device: our host code against libraries that are real, absent or something else (tier T2), and the
//! run-time compiler on the kernels (tier T1).
//!
//! Each question is asked in a process of its own: a driver is loaded once a process, and an old compiler aborts on what
//! it does not know. `POLYMLA_REQUIRE_HIP_LIBRARY=1` turns the absence of ROCm from a printed skip into a failure.

use std::process::{Command, Output};

use polymla::driver;

const CHILD: &str = "POLYMLA_TEST_CHILD";

fn child(task: &str, library: Option<&str>) -> Output {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["the_child", "--exact", "--nocapture"]).env(CHILD, task).env_remove(driver::LIBRARY_VARIABLE);
    if let Some(library) = library {
        command.env(driver::LIBRARY_VARIABLE, library);
    }
    command.output().expect("the child starts")
}

/// What a child printed behind `answer: `; it must have ended by itself, and well.
fn answer(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}{errors}", output.status);
    let found = text.lines().find_map(|line| line.split_once("answer: "));
    found.unwrap_or_else(|| panic!("no answer: {text}{errors}")).1.to_string()
}

/// Not a test of its own: what the children run.
#[test]
fn the_child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    match task.split_once(' ') {
        None => match driver::hip() {
            Ok(backend) => println!("answer: opened {backend:?}"),
            Err(e) => println!("answer: {e}"),
        },
        Some((_, arch)) => match driver::compile_kernels(driver::NAME, arch) {
            Ok(binaries) => {
                for (element, compiled) in &binaries {
                    assert!(compiled.binary.starts_with(b"\x7fELF"), "{element}: not an ELF file");
                    for kernel in ["polymla_schedule".to_string(), format!("polymla_decode_{element}_d576_m16")] {
                        let found = compiled.binary.windows(kernel.len()).any(|w| w == kernel.as_bytes());
                        assert!(found, "{element}: no {kernel}");
                    }
                }
                println!("answer: {} binaries", binaries.len());
            }
            Err(e) => println!("answer: {}", e.to_string().replace('\n', " | ")),
        },
    }
}

/// Whether ROCm's library is here; says so where it is not.
fn library_is_here() -> bool {
    let text = answer(&child("open", None));
    let absent = text.contains("no library of HIP");
    if absent {
        let required = std::env::var("POLYMLA_REQUIRE_HIP_LIBRARY").is_ok_and(|v| !v.is_empty());
        assert!(!required, "POLYMLA_REQUIRE_HIP_LIBRARY is set, and the library is absent: {text}");
        eprintln!("SKIP: {text}");
    }
    !absent
}

#[test]
fn a_missing_library_is_named() {
    let text = answer(&child("open", Some("/nowhere/libamdhip64.so")));
    assert!(text.starts_with("backend hip is absent: no library of HIP"), "{text}");
    assert!(text.contains("/nowhere/libamdhip64.so"), "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_library_of_something_else_is_refused_by_the_function_it_lacks() {
    let text = answer(&child("open", Some("libc.so.6")));
    assert!(text.contains("libc.so.6: it has no hip"), "{text}");
}

#[test]
fn without_a_device_the_real_library_gives_a_clean_error() {
    if !library_is_here() {
        return;
    }
    let text = answer(&child("open", None));
    if text.starts_with("opened") {
        eprintln!("SKIP: this machine has a device: {text}");
        return;
    }
    assert!(text.starts_with("backend hip is absent: "), "{text}");
    assert!(text.contains("has no device"), "{text}");
    assert!(text.contains("hipErrorNoDevice") || text.contains("hipErrorInvalidDevice"), "{text}");
    eprintln!("T2: {text}");
}

#[test]
fn the_run_time_compiler_takes_the_kernels() {
    if !library_is_here() {
        return;
    }
    // What every hiprtc knows; each architecture stands for one matrix tile.
    for arch in ["gfx906", "gfx90a"] {
        let text = answer(&child(&format!("compile {arch}"), None));
        assert_eq!(text, "2 binaries", "{arch}");
    }
}

#[test]
fn architectures_without_waves_of_64_are_refused() {
    for arch in ["gfx1100", "gfx9", "gfx9zz", "sm_90", "", "gfx90a:xnack+"] {
        let error = driver::kernel_source(driver::NAME, arch).expect_err(arch).to_string();
        assert!(error.contains("does not support arch"), "{error}");
    }
}

#[test]
fn the_source_stands_alone() {
    for (arch, class) in [("gfx906", 64), ("gfx942", 64), ("gfx950", 163), ("gfx936", 64)] {
        let source = driver::kernel_source(driver::NAME, arch).expect(arch);
        assert!(!source.text.contains("#include"), "{arch}: it includes another file");
        assert!(source.text.contains("polymla_schedule"));
        let names: Vec<_> = source.binaries.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, [format!("hip-bf16-{arch}-{class}k.co"), format!("hip-f16-{arch}-{class}k.co")]);
        for (_, options) in &source.binaries {
            assert!(options.contains(&format!("--offload-arch={arch}")), "{options:?}");
        }
    }
}
