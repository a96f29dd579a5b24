//! Moore Threads, MetaX, Iluvatar: what can be said of them on any machine. Their kernels' source stands alone and is C++ that a
//! compiler takes; a missing library is named; nobody's libcuda is mistaken for CoreX's.

use std::io::Write as _;
use std::process::{Command, Stdio};

use polymla::{MlaError, driver};

/// CUDA's words for a C++ compiler, so that it can read the source: everything but the kernels' own text.
const WORDS: &str = r"
#include <cmath>
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)
struct Index { unsigned x; };
static Index threadIdx, blockIdx;
static void __syncthreads() {}
static float __shfl_xor(float x, int, int) { return x; }
static float __shfl_xor_sync(unsigned, float x, int, int) { return x; }
static int atomicMin(int* at, int x) { return *at < x ? *at : *at = x; }
typedef unsigned MmaWords __attribute__((vector_size(8)));
typedef float MmaFloats __attribute__((vector_size(16)));
static MmaFloats __builtin_mxc_mma_16x16x16f16(MmaWords, MmaWords, MmaFloats c) { return c; }
static MmaFloats __builtin_mxc_mma_16x16x16bf16(MmaWords, MmaWords, MmaFloats c) { return c; }
";

/// Every architecture that a vendor of this build is asked for, and its tile class.
fn known() -> Vec<(&'static str, &'static str, u32)> {
    vec![
        #[cfg(feature = "musa")]
        ("musa", "mp_21", 28),
        #[cfg(feature = "musa")]
        ("musa", "mp_22", 28),
        #[cfg(feature = "musa")]
        ("musa", "mp_31", 64),
        #[cfg(feature = "maca")]
        ("maca", "xcore1000", 64),
        #[cfg(feature = "corex")]
        ("corex", "ivcore11", 64),
    ]
}

#[test]
fn the_source_stands_alone_and_compiles() {
    for (vendor, arch, class) in known() {
        let source = driver::kernel_source(vendor, arch).expect(arch);
        assert!(!source.text.contains("#include"), "{vendor}: it includes another file");
        assert_eq!(source.binaries.len(), 2, "{vendor}: one binary for each element type");
        for (name, options) in &source.binaries {
            assert!(name.starts_with(&format!("{vendor}-")) && name.contains(&format!("-{arch}-{class}k.")), "{name}");
            let defines: Vec<_> = options.iter().filter(|o| o.starts_with("-D") || o.starts_with("-std")).collect();
            assert!(defines.iter().any(|d| **d == format!("-DPOLYMLA_SMEM_KIB={class}")), "{defines:?}");
            compiles(name, &source.text, &defines, None);
            if vendor == "maca" {
                compiles(name, &source.text, &defines, Some("-DPOLYMLA_MXC_MMA"));
            }
        }
    }
}

/// Has a C++ compiler read the source, with one more define.
fn compiles(name: &str, source: &str, defines: &[&String], more: Option<&str>) {
    let mut child = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()))
        .args(["-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"])
        .args(defines)
        .args(more)
        .args(["-x", "c++", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a C++ compiler is needed: CXX, or c++");
    let text = format!("{WORDS}\n{source}");
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("the compiler reads");
    let output = child.wait_with_output().expect("the compiler ends");
    assert!(output.status.success(), "{name} {more:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn unknown_architectures_and_vendors_are_refused() {
    for (vendor, _, _) in known() {
        for arch in ["", "gfx942", "sm_90", "mp_99", "xcore1000; rm", "xcore", "ivcore 11", "ivcore"] {
            let error = driver::kernel_source(vendor, arch).expect_err(arch).to_string();
            assert!(error.contains("does not support arch"), "{vendor} {arch}: {error}");
        }
    }
    let error = driver::kernel_source("abacus", "any").expect_err("no such vendor");
    assert!(matches!(error, MlaError::Absent { .. }), "{error}");
}

#[test]
fn a_missing_library_is_named() {
    let mut vendors: Vec<_> = known().into_iter().map(|(vendor, ..)| vendor).collect();
    vendors.dedup();
    for vendor in vendors {
        let tried = driver::library_candidates(vendor);
        assert!(!tried.is_empty());
        match driver::open(vendor) {
            Err(MlaError::Absent { reason, .. }) => {
                let first = tried[0].display().to_string();
                assert!(reason.contains(&first), "{vendor}: {reason} does not name {first}");
            }
            Err(other) => panic!("{vendor}: {other}"),
            Ok(backend) => eprintln!("SKIP: this machine has a device: {backend:?}"),
        }
    }
}

/// CoreX's libcuda has the name of NVIDIA's: it is looked for in CoreX's folders, never on the loader's path.
#[test]
#[cfg(feature = "corex")]
fn corex_never_asks_the_loader_for_libcuda() {
    for path in driver::library_candidates("corex") {
        assert!(path.is_absolute() && path.to_string_lossy().contains("corex"), "{}", path.display());
    }
}
