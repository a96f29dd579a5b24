//! Builds of the portable kernels for this CPU: compiled by g++ on first use, loaded, called by name.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::Library;

#[path = "../common/cpp.rs"]
mod cpp;

/// What a build emulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// Its name, as a backend.
    pub name: &'static str,
    /// Lanes of a warp.
    pub warp: u32,
    /// The tile class, by what a block of threads may have of shared memory.
    pub shared_kib: u32,
    /// The macro that chooses matrix tiles; empty for plain FMA.
    pub tile: &'static str,
}

const fn variant(name: &'static str, warp: u32, shared_kib: u32, tile: &'static str) -> Variant {
    Variant { name, warp, shared_kib, tile }
}

/// Every build that is tested, and whose shapes it has.
pub const VARIANTS: [Variant; 8] = [
    variant("mma-32-227", 32, 227, "SIMT_TILE_MMA"),   // sm_90, sm_100
    variant("mma-32-163", 32, 163, "SIMT_TILE_MMA"),   // sm_80
    variant("mma-32-99", 32, 99, "SIMT_TILE_MMA"),     // sm_86, sm_89, sm_120
    variant("fma-32-64", 32, 64, ""),                  // sm_75
    variant("mfma-64-64", 64, 64, "SIMT_TILE_MFMA"),   // gfx90a, gfx942
    variant("mfma-64-163", 64, 163, "SIMT_TILE_MFMA"), // gfx950
    variant("fma-64-64", 64, 64, ""),                  // gfx906
    variant("fma-128-28", 128, 28, ""),                // mp_21, mp_22
];

/// The variant of a name.
pub fn by_name(name: &str) -> Variant {
    *VARIANTS.iter().find(|v| v.name == name).unwrap()
}

type Launch = unsafe extern "C" fn(*const c_char, c_uint, c_uint, *const c_void, u64) -> c_int;
type SharedBytes = unsafe extern "C" fn(*const c_char) -> c_uint;

/// A loaded build.
pub struct Kernels {
    launch: Launch,
    shared_bytes: SharedBytes,
    _library: Library,
}

impl Kernels {
    /// Compiles where this build of these sources is not there yet, and loads.
    pub fn open(variant: &Variant) -> Self {
        let path = build(variant);
        // SAFETY: the library is our own; loading it runs no code but the C++ runtime's.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // SAFETY: library.cpp defines both with these signatures; `_library` keeps them loaded.
        let (launch, shared_bytes) = unsafe {
            (
                *library.get::<Launch>(b"simt_launch\0").unwrap(),
                *library.get::<SharedBytes>(b"simt_shared_bytes\0").unwrap(),
            )
        };
        Kernels { launch, shared_bytes, _library: library }
    }

    /// Runs a kernel to its end.
    ///
    /// # Safety
    /// `params` must be what the kernel takes, and its pointers valid for what it says.
    pub unsafe fn launch<P>(&self, kernel: &str, grid: usize, shared_bytes: usize, params: &P, seed: u64) {
        let name = CString::new(kernel).unwrap();
        let params = std::ptr::from_ref(params).cast();
        // SAFETY: the caller's promise.
        let code = unsafe { (self.launch)(name.as_ptr(), grid as u32, shared_bytes as u32, params, seed) };
        assert_eq!(code, 0, "no kernel {kernel}");
    }

    /// Shared memory of a kernel as its source computes it.
    pub fn shared_bytes(&self, kernel: &str) -> usize {
        let name = CString::new(kernel).unwrap();
        // SAFETY: reads a table.
        unsafe { (self.shared_bytes)(name.as_ptr()) as usize }
    }
}

fn sources() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["backends/portable", "tests/simt"] {
        for entry in fs::read_dir(root.join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "h" || e == "cpp" || e == "cu") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// Tests of one process build one after another, so that none builds what another is building.
static BUILDING: Mutex<()> = Mutex::new(());

fn build(variant: &Variant) -> PathBuf {
    let _turn = BUILDING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let path = dir.join(format!("simt-{}-{:016x}.so", variant.name, cpp::fingerprint(sources())));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    cpp::library(&path, 2, |command| {
        command.args(["-Wall", "-Werror", "-Wno-unknown-pragmas"]);
        command.arg(format!("-DPM_WARP={}", variant.warp)).arg(format!("-DPOLYMLA_SMEM_KIB={}", variant.shared_kib));
        if !variant.tile.is_empty() {
            command.arg(format!("-D{}", variant.tile));
        }
        command.arg("-I").arg(root.join("tests/simt")).arg("-I").arg(root.join("backends/portable"));
        command.arg(root.join("tests/simt/simt.cpp")).arg(root.join("tests/simt/library.cpp"));
    });
    path
}
