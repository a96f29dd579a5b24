//! CoreX: Iluvatar, whose driver has CUDA's own names.
//!
//! So its libcuda is looked for in CoreX's folders only, never on the loader's path, where NVIDIA's may lie; and a device whose
//! warps are not 64 lanes wide is refused, which NVIDIA's are not. There is no public run-time compiler: kernels come from the
//! module folder (`polymla kernels --vendor corex`). Unconfirmed: that the numbers of attributes and flags are CUDA's too; the
//! names of its folders; the architecture's name, which is made of the compute capability here.

use std::sync::OnceLock;

use super::cuda_style::{ATTRIBUTES, CAPABILITY, HOST_ALLOC_FLAGS, cuda_style_symbols};
use super::table::{Driver, Symbols};
use super::vendor::{Arch, Vendor};
use crate::kernels::Names;
use crate::portable::{Dialect, TileClass, units};

/// The feature's, the backend's and the platform's name.
pub const NAME: &str = "corex";
/// Names the CoreX libcuda to load, and no other.
pub const LIBRARY_VARIABLE: &str = "POLYMLA_COREX_LIB";
/// Names a run-time compiler to load, should there be one: with NVRTC's function names.
pub const COMPILER_VARIABLE: &str = "POLYMLA_COREX_RTC_LIB";

mod built {
    include!(concat!(env!("OUT_DIR"), "/corex_kernels.rs"));
}

static SYMBOLS: Symbols = cuda_style_symbols!("cu");

static COMPILER: Names = Names {
    compiler: "CoreX NVRTC",
    version: c"nvrtcVersion",
    error_string: c"nvrtcGetErrorString",
    create: c"nvrtcCreateProgram",
    compile: c"nvrtcCompileProgram",
    log_size: c"nvrtcGetProgramLogSize",
    log: c"nvrtcGetProgramLog",
    binary_size: c"nvrtcGetCUBINSize",
    binary: c"nvrtcGetCUBIN",
    destroy: c"nvrtcDestroyProgram",
};

pub(super) static VENDOR: Vendor = Vendor {
    platform: NAME,
    words: "CoreX (Iluvatar)",
    library_variable: LIBRARY_VARIABLE,
    libraries: &[
        "/usr/local/corex/lib64/libcuda.so.1",
        "/usr/local/corex/lib/libcuda.so.1",
        "/opt/corex/lib64/libcuda.so.1",
        "/opt/corex/lib/libcuda.so.1",
    ],
    folders: &[],
    symbols: &SYMBOLS,
    kernels: Dialect {
        platform: NAME,
        files: built::FILES,
        embedded: &[],
        options: units::corex_options,
        extension: "cubin",
        pieces_from_kib: None,
    },
    warps: &[64],
    class: |warp, shared| TileClass::of(warp, shared),
    attributes: ATTRIBUTES,
    host_alloc_flags: HOST_ALLOC_FLAGS,
    compiler: &COMPILER,
    compiler_variable: COMPILER_VARIABLE,
    compiler_libraries: &[],
    arch: Arch::Capability("ivcore", CAPABILITY),
    magics: &[b"\x7fELF"],
    text_by_pointer: true,
    max_grid_threads: u64::MAX,
    driver: OnceLock::new(),
    open: Driver::load,
};
