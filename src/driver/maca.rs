//! MACA: MetaX. Driver and run-time compiler are one library, whose functions follow HIP's.
//!
//! Names as public users of MACA 2 and 3 call them, among them the MetaX adaptors of FlagCX and of InfiniCore's runtime
//! (`mcMalloc`, `mcMemcpyHtoD`, `mcMemsetD32Async`, `mcModuleLaunchKernel`, `mcStreamCreateWithFlags`,
//! `mcEventCreateWithFlags`, `mcDeviceGetAttribute`, `mcrtcGetBitcode`; mcErrors are ints whose words are returned).
//! Unconfirmed, for no public header showed them: the numbers of attributes, counted along a public list of their names
//! (warp size 9, shared memory a block 7, multiprocessors 16, capability 21 and 22); the flags of `mcMallocHost`;
//! `mcMemsetD8Async` and `mcRuntimeGetVersion`; the architecture's name and mcrtc's option for it.

use std::sync::OnceLock;

use super::table::{Driver, Symbols};
use super::vendor::{Arch, Attributes, Vendor};
use crate::kernels::Names;
use crate::portable::{Dialect, TileClass, units};

/// The feature's, the backend's and the platform's name.
pub const NAME: &str = "maca";
/// Names the MACA library to load, and no other.
pub const LIBRARY_VARIABLE: &str = "POLYMLA_MACA_LIB";
/// Names the library of the run-time compiler, where it is another one.
pub const COMPILER_VARIABLE: &str = "POLYMLA_MCRTC_LIB";

mod built {
    include!(concat!(env!("OUT_DIR"), "/maca_kernels.rs"));
}

static SYMBOLS: Symbols = Symbols {
    get_device: &["mcGetDevice"],
    set_device: &["mcSetDevice"],
    device_get: &[],
    retain_context: &[],
    get_context: &[],
    set_context: &[],
    device_properties: &[],
    error_name: &["mcGetErrorName"],
    error_string: &["mcGetErrorString"],
    init: &["mcInit"],
    version: &["mcRuntimeGetVersion"],
    device_count: &["mcGetDeviceCount"],
    device_attribute: &["mcDeviceGetAttribute"],
    device_name: &["mcDeviceGetName"],
    alloc: &["mcMalloc"],
    free: &["mcFree"],
    host_alloc: &["mcMallocHost"],
    host_address: &["mcHostGetDevicePointer"],
    host_free: &["mcFreeHost"],
    copy_to_device: &["mcMemcpyHtoD"],
    copy_to_host: &["mcMemcpyDtoH"],
    copy_on_device: &["mcMemcpyDtoDAsync"],
    fill_bytes: &["mcMemsetD8Async"],
    fill_words: &["mcMemsetD32Async"],
    synchronize: &["mcDeviceSynchronize"],
    stream_create: &["mcStreamCreateWithFlags"],
    stream_destroy: &["mcStreamDestroy"],
    stream_synchronize: &["mcStreamSynchronize"],
    event_create: &["mcEventCreateWithFlags"],
    event_destroy: &["mcEventDestroy"],
    event_record: &["mcEventRecord"],
    event_synchronize: &["mcEventSynchronize"],
    event_elapsed: &["mcEventElapsedTime"],
    module_load: &["mcModuleLoadData"],
    module_unload: &["mcModuleUnload"],
    module_function: &["mcModuleGetFunction"],
    launch: &["mcModuleLaunchKernel"],
};

static COMPILER: Names = Names {
    compiler: "mcrtc",
    version: c"mcrtcVersion",
    error_string: c"mcrtcGetErrorString",
    create: c"mcrtcCreateProgram",
    compile: c"mcrtcCompileProgram",
    log_size: c"mcrtcGetProgramLogSize",
    log: c"mcrtcGetProgramLog",
    binary_size: c"mcrtcGetBitcodeSize",
    binary: c"mcrtcGetBitcode",
    destroy: c"mcrtcDestroyProgram",
};

pub(super) static VENDOR: Vendor = Vendor {
    platform: NAME,
    words: "MACA (MetaX)",
    library_variable: LIBRARY_VARIABLE,
    libraries: &["libmcruntime.so"],
    folders: &[("MACA_PATH", "/opt/maca", "lib")],
    symbols: &SYMBOLS,
    kernels: Dialect {
        platform: NAME,
        files: built::FILES,
        embedded: &[],
        options: units::maca_options,
        extension: "mcfb",
        pieces_from_kib: None,
    },
    warps: &[64],
    class: |warp, shared| TileClass::of(warp, shared),
    attributes: Attributes { warp_size: 9, multiprocessors: 16, shared_memory_per_block: 7 },
    host_alloc_flags: 0x1 | 0x2,
    compiler: &COMPILER,
    compiler_variable: COMPILER_VARIABLE,
    compiler_libraries: &[],
    arch: Arch::Capability("xcore", [21, 22]),
    // mcrtc makes LLVM bitcode, plain or wrapped; mxcc an ELF file or a bundle of such.
    magics: &[b"\x7fELF", b"__CLANG_OFFLOAD_BUNDLE__", b"BC\xc0\xde", b"\xde\xc0\x17\x0b"],
    text_by_pointer: false,
    max_grid_threads: u64::MAX,
    driver: OnceLock::new(),
    open: Driver::load,
};
