//! MUSA: Moore Threads.
//!
//! Names as the vendor's documentation of its driver API and of libmtrtc has them (MUSA SDK 4: `muDevicePrimaryCtxRetain`,
//! `muMemAlloc_v2`, `muLaunchKernel`, `mtrtcGetFatBin`), with the signatures of the CUDA functions that they follow.
//! Unconfirmed, for no public header showed them: the numbers of attributes and flags, taken to be CUDA's; the suffix `_v2` of
//! every function that has it in CUDA; `mtrtcVersion` and `mtrtcGetErrorString`; the architecture option of libmtrtc.

use std::sync::OnceLock;

use super::cuda_style::{ATTRIBUTES, CAPABILITY, HOST_ALLOC_FLAGS, cuda_style_symbols};
use super::table::{Driver, Symbols};
use super::vendor::{Arch, Vendor};
use crate::kernels::Names;
use crate::portable::{Dialect, TileClass, units};

/// The feature's, the backend's and the platform's name.
pub const NAME: &str = "musa";
/// Names the MUSA library to load, and no other.
pub const LIBRARY_VARIABLE: &str = "POLYMLA_MUSA_LIB";
/// Names the libmtrtc to load, and no other.
pub const COMPILER_VARIABLE: &str = "POLYMLA_MTRTC_LIB";

mod built {
    include!(concat!(env!("OUT_DIR"), "/musa_kernels.rs"));
}

static SYMBOLS: Symbols = cuda_style_symbols!("mu");

static COMPILER: Names = Names {
    compiler: "mtrtc",
    version: c"mtrtcVersion",
    error_string: c"mtrtcGetErrorString",
    create: c"mtrtcCreateProgram",
    compile: c"mtrtcCompileProgram",
    log_size: c"mtrtcGetProgramLogSize",
    log: c"mtrtcGetProgramLog",
    binary_size: c"mtrtcGetFatBinSize",
    binary: c"mtrtcGetFatBin",
    destroy: c"mtrtcDestroyProgram",
};

pub(super) static VENDOR: Vendor = Vendor {
    platform: NAME,
    words: "MUSA (Moore Threads)",
    library_variable: LIBRARY_VARIABLE,
    libraries: &["libmusa.so", "libmusa.so.1"],
    folders: &[("MUSA_HOME", "/usr/local/musa", "lib"), ("MUSA_PATH", "", "lib")],
    symbols: &SYMBOLS,
    kernels: Dialect {
        platform: NAME,
        files: built::FILES,
        embedded: &[],
        options: units::musa_options,
        extension: "mubin",
        pieces_from_kib: None,
    },
    warps: &[32, 128],
    // Of what is checked at 32 lanes without a matrix unit, the largest class.
    class: |warp, shared| TileClass::of(warp, if warp == 32 { shared.min(64 * 1024) } else { shared }),
    attributes: ATTRIBUTES,
    host_alloc_flags: HOST_ALLOC_FLAGS,
    compiler: &COMPILER,
    compiler_variable: COMPILER_VARIABLE,
    compiler_libraries: &["libmtrtc.so", "libmtrtc.so.1"],
    arch: Arch::Capability("mp_", CAPABILITY),
    magics: &[],
    text_by_pointer: true,
    max_grid_threads: u64::MAX,
    driver: OnceLock::new(),
    open: Driver::load,
};
