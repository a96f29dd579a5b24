//! HIP: AMD's ROCm, and Hygon's DTK, which has the same functions.
//!
//! Names and numbers are those of hip_runtime_api.h and hiprtc.h; the numbers used here are the same from 5.4 to 7.

use std::sync::OnceLock;

use super::table::{Driver, Symbols};
use super::vendor::{Arch, Attributes, Vendor};
use crate::kernels::Names;
use crate::portable::{Dialect, TileClass, units};

/// The feature's, the backend's and the platform's name.
pub const NAME: &str = "hip";

mod built {
    include!(concat!(env!("OUT_DIR"), "/hip_kernels.rs"));
}

/// Names the HIP library to load, and no other.
pub const LIBRARY_VARIABLE: &str = "POLYMLA_HIP_LIB";

/// Names the hiprtc library to load, and no other.
pub const COMPILER_VARIABLE: &str = "POLYMLA_HIPRTC_LIB";

pub(super) static SYMBOLS: Symbols = Symbols {
    error_name: &["hipGetErrorName"],
    error_string: &["hipGetErrorString"],
    init: &["hipInit"],
    version: &["hipRuntimeGetVersion"],
    device_count: &["hipGetDeviceCount"],
    get_device: &["hipGetDevice"],
    set_device: &["hipSetDevice"],
    device_get: &[],
    retain_context: &[],
    get_context: &[],
    set_context: &[],
    device_attribute: &["hipDeviceGetAttribute"],
    device_name: &["hipDeviceGetName"],
    // ROCm 6 changed the struct, and gave the function that fills the new one a new name.
    device_properties: &["hipGetDevicePropertiesR0600", "hipGetDeviceProperties"],
    alloc: &["hipMalloc"],
    free: &["hipFree"],
    host_alloc: &["hipHostMalloc"],
    host_address: &["hipHostGetDevicePointer"],
    host_free: &["hipHostFree"],
    copy_to_device: &["hipMemcpyHtoD"],
    copy_to_host: &["hipMemcpyDtoH"],
    copy_on_device: &["hipMemcpyDtoDAsync"],
    fill_bytes: &["hipMemsetD8Async"],
    fill_words: &["hipMemsetD32Async"],
    synchronize: &["hipDeviceSynchronize"],
    stream_create: &["hipStreamCreateWithFlags"],
    stream_destroy: &["hipStreamDestroy"],
    stream_synchronize: &["hipStreamSynchronize"],
    event_create: &["hipEventCreateWithFlags"],
    event_destroy: &["hipEventDestroy"],
    event_record: &["hipEventRecord"],
    event_synchronize: &["hipEventSynchronize"],
    event_elapsed: &["hipEventElapsedTime"],
    module_load: &["hipModuleLoadData"],
    module_unload: &["hipModuleUnload"],
    module_function: &["hipModuleGetFunction"],
    launch: &["hipModuleLaunchKernel"],
};

static COMPILER: Names = Names {
    compiler: "hiprtc",
    version: c"hiprtcVersion",
    error_string: c"hiprtcGetErrorString",
    create: c"hiprtcCreateProgram",
    compile: c"hiprtcCompileProgram",
    log_size: c"hiprtcGetProgramLogSize",
    log: c"hiprtcGetProgramLog",
    binary_size: c"hiprtcGetCodeSize",
    binary: c"hiprtcGetCode",
    destroy: c"hiprtcDestroyProgram",
};

/// hipHostMallocPortable | hipHostMallocMapped.
const HOST_ALLOC_FLAGS: u32 = 0x1 | 0x2;

pub(super) static VENDOR: Vendor = Vendor {
    platform: NAME,
    words: "HIP (AMD ROCm, Hygon DTK)",
    library_variable: LIBRARY_VARIABLE,
    libraries: if cfg!(windows) {
        &["amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll"]
    } else {
        &[
            "libamdhip64.so.7",
            "libamdhip64.so.6",
            "libamdhip64.so.5",
            "libamdhip64.so",
            "libgalaxyhip.so.5",
            "libgalaxyhip.so",
        ]
    },
    folders: &[("ROCM_PATH", "/opt/rocm", "lib"), ("DTKROOT", "/opt/dtk", "lib"), ("DTKROOT", "/opt/dtk", "hip/lib")],
    symbols: &SYMBOLS,
    kernels: Dialect {
        platform: NAME,
        files: built::FILES,
        embedded: built::EMBEDDED,
        options: units::hiprtc_options,
        extension: "co",
        pieces_from_kib: None,
    },
    warps: &[64],
    attributes: ATTRIBUTES,
    host_alloc_flags: HOST_ALLOC_FLAGS,
    compiler: &COMPILER,
    compiler_variable: COMPILER_VARIABLE,
    // In ROCm 5 the functions are inside the driver's library, which is always looked into.
    compiler_libraries: if cfg!(windows) {
        &["hiprtc0700.dll", "hiprtc0600.dll"]
    } else {
        &["libhiprtc.so.7", "libhiprtc.so.6", "libhiprtc.so.5", "libhiprtc.so"]
    },
    arch: Arch::InProperties("gfx"),
    class: |warp, shared| TileClass::of(warp, shared),
    // An ELF file, or a bundle of such, plain or compressed.
    magics: &[b"\x7fELF", b"__CLANG_OFFLOAD_BUNDLE__", b"CCOB"],
    text_by_pointer: false,
    max_grid_threads: u32::MAX as u64,
    driver: OnceLock::new(),
    open,
};

/// hipDeviceAttributeWarpSize, ...MultiprocessorCount, ...MaxSharedMemoryPerBlock.
pub(super) const ATTRIBUTES: Attributes =
    Attributes { warp_size: 87, multiprocessors: 63, shared_memory_per_block: 74 };

#[cfg(not(feature = "hip-sys"))]
fn open(vendor: &'static Vendor) -> std::result::Result<Driver, String> {
    Driver::load(vendor)
}

/// With `hip-sys` the functions are linked; the variable still wins, so that another library can be tried.
#[cfg(feature = "hip-sys")]
fn open(vendor: &'static Vendor) -> std::result::Result<Driver, String> {
    if std::env::var_os(LIBRARY_VARIABLE).is_some_and(|v| !v.is_empty()) {
        return Driver::load(vendor);
    }
    Driver::start(vendor, super::hip_linked::table(), "the linked libamdhip64".into(), None)
}
