//! The functions of libcuda that this crate calls, in one table filled at run time.
//!
//! cudarc gives the types. The functions are looked up here because its bindings return an enum that holds the codes of
//! one CUDA version, and a newer driver's code in such an enum is undefined behaviour; here a code is an integer until it
//! is known to be 0. A symbol that the driver lacks is an error, not a panic. The library is found here, too: cudarc's own
//! loader panics where there is none, and is not there at all where another crate of the program has cudarc link.

#![allow(non_snake_case, reason = "the driver's own names")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUevent, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec,
    CUlaunchConfig, CUmodule, CUstream, CUstreamCaptureMode,
};
#[cfg(feature = "sm90")]
use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use libloading::Library;

use crate::error::{MlaError, Result};

/// The platform's name in errors and in [`crate::Device::Accelerator`].
pub(crate) const PLATFORM: &str = "cuda";

/// What the driver's library is called, on the loader's path.
const NAMES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// A code of the driver API; 0 is success.
pub(crate) type Code = c_uint;
/// An address of device memory.
pub(crate) type DevicePtr = u64;

/// Declares the table: a private pointer and a checked method of the driver's own name for each function.
macro_rules! table {
    ($($(#[$attribute:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        /// The driver, loaded and initialised.
        pub(crate) struct Driver {
            pointers: Pointers,
            version: c_int,
            /// Keeps the functions in place.
            _library: Library,
        }

        struct Pointers {
            cuGetErrorName: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
            cuGetErrorString: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
            $($(#[$attribute])* $name: unsafe extern "C" fn($($type),*) -> Code,)*
        }

        impl Pointers {
            /// # Safety
            /// `library` must be libcuda, whose functions have these signatures.
            unsafe fn load(library: &Library) -> std::result::Result<Self, String> {
                macro_rules! symbol {
                    ($symbol:ident) => {{
                        let name = concat!(stringify!($symbol), "\0");
                        // SAFETY: the signature is the one of the function of that name in cuda.h.
                        *unsafe { library.get(name.as_bytes()) }
                            .map_err(|_| format!("libcuda has no {}: a driver of CUDA 12.0 or later is needed",
                                stringify!($symbol)))?
                    }};
                }
                Ok(Pointers {
                    cuGetErrorName: symbol!(cuGetErrorName),
                    cuGetErrorString: symbol!(cuGetErrorString),
                    $($(#[$attribute])* $name: symbol!($name),)*
                })
            }
        }

        impl Driver {
            $(
                $(#[$attribute])*
                /// # Safety
                /// As cuda.h says of the function of this name.
                #[allow(clippy::too_many_arguments)]
                pub(crate) unsafe fn $name(&self, $($arg: $type),*) -> Result<()> {
                    // SAFETY: the caller's promise.
                    let code = unsafe { (self.pointers.$name)($($arg),*) };
                    self.check(stringify!($name), code)
                }
            )*
        }
    };
}

table! {
    fn cuInit(flags: c_uint);
    fn cuDriverGetVersion(version: *mut c_int);
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    fn cuDeviceGetName(name: *mut c_char, length: c_int, device: CUdevice);
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
    fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(device: CUdevice);
    fn cuCtxGetCurrent(context: *mut CUcontext);
    fn cuCtxGetDevice(device: *mut CUdevice);
    fn cuCtxPushCurrent_v2(context: CUcontext);
    fn cuCtxPopCurrent_v2(context: *mut CUcontext);
    fn cuCtxSynchronize();
    fn cuMemAlloc_v2(address: *mut DevicePtr, bytes: usize);
    fn cuMemFree_v2(address: DevicePtr);
    fn cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemHostGetDevicePointer_v2(address: *mut DevicePtr, pointer: *mut c_void, flags: c_uint);
    fn cuMemFreeHost(pointer: *mut c_void);
    fn cuMemcpyHtoD_v2(to: DevicePtr, from: *const c_void, bytes: usize);
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: DevicePtr, bytes: usize);
    fn cuMemcpyDtoDAsync_v2(to: DevicePtr, from: DevicePtr, bytes: usize, stream: CUstream);
    fn cuMemsetD8Async(address: DevicePtr, value: u8, count: usize, stream: CUstream);
    fn cuMemsetD32Async(address: DevicePtr, value: c_uint, count: usize, stream: CUstream);
    fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    fn cuModuleUnload(module: CUmodule);
    fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    fn cuFuncSetAttribute(function: CUfunction, attribute: CUfunction_attribute, value: c_int);
    fn cuLaunchKernelEx(
        config: *const CUlaunchConfig,
        function: CUfunction,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    #[cfg(feature = "sm90")]
    fn cuTensorMapEncodeTiled(
        map: *mut CUtensorMap,
        data_type: CUtensorMapDataType,
        rank: u32,
        address: *mut c_void,
        sizes: *const u64,
        strides: *const u64,
        tile: *const u32,
        element_strides: *const u32,
        interleave: CUtensorMapInterleave,
        swizzle: CUtensorMapSwizzle,
        promotion: CUtensorMapL2promotion,
        fill: CUtensorMapFloatOOBfill,
    );
    fn cuStreamCreate(stream: *mut CUstream, flags: c_uint);
    fn cuStreamDestroy_v2(stream: CUstream);
    fn cuStreamSynchronize(stream: CUstream);
    fn cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode);
    fn cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph);
    fn cuGraphInstantiateWithFlags(exec: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong);
    fn cuGraphLaunch(exec: CUgraphExec, stream: CUstream);
    fn cuGraphExecDestroy(exec: CUgraphExec);
    fn cuGraphDestroy(graph: CUgraph);
    fn cuEventCreate(event: *mut CUevent, flags: c_uint);
    fn cuEventDestroy_v2(event: CUevent);
    fn cuEventRecord(event: CUevent, stream: CUstream);
    fn cuEventSynchronize(event: CUevent);
    fn cuEventElapsedTime(milliseconds: *mut f32, start: CUevent, end: CUevent);
}

impl Driver {
    /// The driver of this process, loaded and initialised on the first call.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(crate) fn get() -> std::result::Result<&'static Driver, String> {
        static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(Driver::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> std::result::Result<Driver, String> {
        // SAFETY: libcuda's initialisers may run in any process.
        let found = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = found.ok_or("libcuda was not found: this machine has no CUDA driver")?;
        // SAFETY: what has that name is libcuda.
        let pointers = unsafe { Pointers::load(&library) }?;
        let mut driver = Driver { pointers, version: 0, _library: library };
        // SAFETY: cuInit may be called at any time, any number of times; the other takes a pointer to an int.
        unsafe {
            driver.cuInit(0).map_err(|e| e.to_string())?;
            let mut version = 0;
            driver.cuDriverGetVersion(&raw mut version).map_err(|e| e.to_string())?;
            driver.version = version;
        }
        Ok(driver)
    }

    /// The newest CUDA version the driver serves: major, minor.
    pub(crate) fn version(&self) -> (u32, u32) {
        let version = self.version.unsigned_abs();
        (version / 1000, version % 1000 / 10)
    }

    /// A code as a result that names the call and what the driver says of the code.
    pub(crate) fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = |f: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut pointer: *const c_char = std::ptr::null();
            // SAFETY: the function stores a pointer to a static string, or null where the code is unknown to it.
            let known = unsafe { f(code, &raw mut pointer) } == 0 && !pointer.is_null();
            // SAFETY: as above.
            known.then(|| unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
        };
        let name = text(self.pointers.cuGetErrorName).unwrap_or_else(|| format!("code {code}"));
        let words = text(self.pointers.cuGetErrorString).unwrap_or_else(|| "unknown to this driver".into());
        Err(MlaError::Platform { backend: PLATFORM, call, message: format!("{words} ({name})") })
    }
}
