//! Libraries that stand in for vendors' on this CPU: `harness.cpp` over the fiber harness of `tests/simt`, under names that the vendors'
//! files give it.

#![allow(dead_code, reason = "each test needs a part of it")]

#[macro_use]
pub mod vendor;
pub mod corex;
#[path = "../common/cpp.rs"]
mod cpp;
pub mod hip;
pub mod maca;
pub mod musa;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use polymla::conformance::{Layout, POLICIES, check, golden};
use polymla::driver::PortableBackend;
use vendor::{Arch, Vendor};

/// Our names for functions, and the vendor's.
pub type Names = &'static [(&'static str, &'static str)];

/// A vendor's device.
#[derive(Clone, Copy)]
pub struct Case {
    /// The vendor's name: of its backend and of its feature.
    pub name: &'static str,
    /// What names its libraries: of the driver, of the compiler.
    pub variables: [&'static str; 2],
    pub driver: Names,
    pub compiler: Names,
    pub vendor: Vendor,
    /// Which of the vendor's devices.
    pub device: usize,
    /// The tile class of the kernels that it gets, in KiB.
    pub class: u32,
    /// What it calls itself.
    pub arch: &'static str,
}

/// How the binary begins that the harness takes: `CODE` of `harness.cpp`, which zeros follow.
pub const CODE: &[u8] = b"\x7fELF kernels of the fiber harness";

pub const HIP: Case = Case {
    name: "hip",
    variables: ["POLYMLA_HIP_LIB", "POLYMLA_HIPRTC_LIB"],
    driver: hip::DRIVER,
    compiler: hip::COMPILER,
    vendor: hip::VENDOR,
    device: 0,
    class: 64,
    arch: "gfx906",
};
pub const MUSA: Case = Case {
    name: "musa",
    variables: ["POLYMLA_MUSA_LIB", "POLYMLA_MTRTC_LIB"],
    driver: musa::DRIVER,
    compiler: musa::COMPILER,
    vendor: musa::VENDOR,
    device: 0,
    class: 28,
    arch: "mp_22",
};
pub const MUSA32: Case = Case { device: 1, class: 64, arch: "mp_31", ..MUSA };
pub const MACA: Case = Case {
    name: "maca",
    variables: ["POLYMLA_MACA_LIB", "POLYMLA_MCRTC_LIB"],
    driver: maca::DRIVER,
    compiler: maca::COMPILER,
    vendor: maca::VENDOR,
    device: 0,
    class: 64,
    arch: "xcore100",
};
pub const COREX: Case = Case {
    name: "corex",
    variables: ["POLYMLA_COREX_LIB", "POLYMLA_COREX_RTC_LIB"],
    driver: corex::DRIVER,
    compiler: corex::COMPILER,
    vendor: corex::VENDOR,
    device: 0,
    class: 64,
    arch: "ivcore11",
};

/// What `harness.cpp` has to know of a vendor, in the words that it says it needs.
fn header(case: &Case, more: &str) -> String {
    let (vendor, device) = (&case.vendor, &case.vendor.devices[case.device]);
    let mut text = String::new();
    let mut define = |name: &str, value: &dyn std::fmt::Display| writeln!(text, "#define SHIM_{name} {value}").unwrap();
    for (ours, theirs) in case.driver {
        define(ours, theirs);
    }
    if vendor.compiler {
        for (ours, theirs) in case.compiler {
            define(&format!("RTC_{ours}"), theirs);
        }
        define("ARCH_OPTION", &format!("{:?}", vendor.arch_option));
    } else {
        define("NO_COMPILER", &"");
    }
    if vendor.contexts {
        define("CONTEXTS", &"");
    }
    define("WARP", &device.warp);
    define("SHARED_KIB", &device.shared_kib);
    define("WARP_ATTRIBUTE", &vendor.warp_attribute);
    define("SHARED_ATTRIBUTE", &vendor.shared_attribute);
    define("PROCESSORS_ATTRIBUTE", &vendor.processors_attribute);
    define("HOST_FLAGS", &vendor.host_flags);
    match vendor.arch {
        Arch::Properties { bytes, at, name } => {
            define("PROPERTIES_BYTES", &bytes);
            define("ARCH_AT", &at);
            define("ARCH_NAME", &format!("{name:?}"));
        }
        Arch::Capability([major, minor]) => {
            define("MAJOR_ATTRIBUTE", &major);
            define("MINOR_ATTRIBUTE", &minor);
            define("MAJOR", &device.capability[0]);
            define("MINOR", &device.capability[1]);
        }
    }
    text + more
}

/// Builds the library at `path` from `harness.cpp`, with kernels for `lanes` of a warp, and `more` lines for its header.
pub fn build(path: &Path, case: &Case, lanes: u32, more: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let written = path.with_extension("h");
    std::fs::write(&written, header(case, more)).expect("the target folder");
    cpp::library(path, 2, |command| {
        command.args(["-fvisibility=hidden", "-Wno-unknown-pragmas"]);
        command.args([format!("-DPM_WARP={lanes}"), format!("-DPOLYMLA_SMEM_KIB={}", case.class)]);
        command.args([OsStr::new("-include"), written.as_os_str()]);
        command.arg("-I").arg(root.join("tests/simt")).arg("-I").arg(root.join("backends/portable"));
        command
            .args(["tests/simt/simt.cpp", "tests/simt/library.cpp", "tests/shims/harness.cpp"].map(|f| root.join(f)));
    });
    std::fs::remove_file(written).expect("it was written");
}

/// A folder of this process's own, under the target directory.
pub fn scratch(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).expect("the target folder");
    path
}

/// Golden files that are small enough for emulation.
pub fn golden_files(backend: &PortableBackend) {
    for file in
        ["dense_bf16_b2_sq4_hq9_shorter_than_sq", "dense_bf16_b6_sq2_hq16_zero_len", "dense_fp16_b2_sq4_hq16_causal"]
    {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let call = golden::load(root.join(file).with_extension("safetensors")).expect(file);
        for (layout, policy) in [(Layout::Fused, POLICIES[0]), (Layout::Split, POLICIES[1])] {
            let outcome = check(backend, &call, layout, policy);
            assert!(outcome.passed(), "{file} {layout} {policy:?}: {}", outcome.failure());
        }
    }
}
