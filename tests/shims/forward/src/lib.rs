//! A vendor's driver and run-time compiler by NVIDIA's: a library with the vendor's names over libcuda and NVRTC, so that our host
//! code and our kernels in that vendor's dialect run on a GPU (tier T4). For tests, never shipped. It proves our calls and our
//! kernels, not the vendor's ABI.
//!
//! ```text
//! cargo build --release --manifest-path tests/shims/forward/Cargo.toml --features hip
//! ```
//!
//! A feature chooses the vendor, whose file beside this crate has the names and whatever else differs. Functions have our names here,
//! and the parameters that the driver table gives them (src/driver/table.rs).

#[cfg(not(target_pointer_width = "64"))]
compile_error!("device addresses are passed as 64-bit integers where these drivers take pointers");

#[cfg(not(any(feature = "hip", feature = "musa", feature = "maca", feature = "corex")))]
compile_error!("choose a vendor by a feature: hip, musa, musa32, maca or corex");

#[macro_use]
#[path = "../../vendor.rs"]
mod vendor;
#[macro_use]
#[cfg_attr(feature = "hip", path = "../../hip.rs")]
#[cfg_attr(feature = "musa", path = "../../musa.rs")]
#[cfg_attr(feature = "maca", path = "../../maca.rs")]
#[cfg_attr(feature = "corex", path = "../../corex.rs")]
mod names;
#[macro_use]
mod nvidia;
#[cfg(not(feature = "corex"))]
mod compiler;
#[cfg_attr(any(feature = "musa", feature = "corex"), path = "contexts.rs")]
#[cfg_attr(any(feature = "hip", feature = "maca"), path = "devices.rs")]
mod current;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use current::enter;
use names::VENDOR;
use nvidia::{CUDA, Code, Handle, INVALID_VALUE};
use vendor::{Arch, Device};

const _: () = assert!(VENDOR.contexts == cfg!(any(feature = "musa", feature = "corex")));
const _: () = assert!(VENDOR.compiler != cfg!(feature = "corex"));

/// What the device calls itself.
const DEVICE: Device = VENDOR.devices[cfg!(feature = "musa32") as usize];
const SHARED_BYTES: u32 = DEVICE.shared_kib * 1024;

/// What runs through here proves tier T4; or what libcuda itself proves, where a test stands in for that, too.
#[unsafe(no_mangle)]
pub extern "C" fn polymla_stand_in_tier() -> c_int {
    // SAFETY: nobody but this crate's tests has a function of that name; it takes nothing and returns an int.
    unsafe { CUDA.find::<unsafe extern "C" fn() -> c_int>("polymla_stand_in_tier") }.map_or(4, |tier| {
        // SAFETY: as above.
        unsafe { tier() }
    })
}

forward! { 0; CUDA:
    init(flags: c_uint) = cuInit;
    version(version: *mut c_int) = cuDriverGetVersion;
    device_count(count: *mut c_int) = cuDeviceGetCount;
}

forward! { enter(); CUDA:
    alloc(address: *mut u64, bytes: usize) = cuMemAlloc_v2;
    free(address: u64) = cuMemFree_v2;
    host_address(address: *mut u64, pointer: *mut c_void, flags: c_uint) = cuMemHostGetDevicePointer_v2;
    host_free(pointer: *mut c_void) = cuMemFreeHost;
    copy_to_device(to: u64, from: *const c_void, bytes: usize) = cuMemcpyHtoD_v2;
    copy_to_host(to: *mut c_void, from: u64, bytes: usize) = cuMemcpyDtoH_v2;
    copy_on_device(to: u64, from: u64, bytes: usize, stream: Handle) = cuMemcpyDtoDAsync_v2;
    fill_bytes(address: u64, value: u8, count: usize, stream: Handle) = cuMemsetD8Async;
    fill_words(address: u64, value: c_int, count: usize, stream: Handle) = cuMemsetD32Async;
    synchronize() = cuCtxSynchronize;
    stream_create(stream: *mut Handle, flags: c_uint) = cuStreamCreate;
    stream_destroy(stream: Handle) = cuStreamDestroy_v2;
    stream_synchronize(stream: Handle) = cuStreamSynchronize;
    event_create(event: *mut Handle, flags: c_uint) = cuEventCreate;
    event_destroy(event: Handle) = cuEventDestroy_v2;
    event_record(event: Handle, stream: Handle) = cuEventRecord;
    event_synchronize(event: Handle) = cuEventSynchronize;
    event_elapsed(milliseconds: *mut f32, start: Handle, end: Handle) = cuEventElapsedTime;
    module_load(module: *mut Handle, image: *const c_void) = cuModuleLoadData;
    module_unload(module: Handle) = cuModuleUnload;
}

/// An attribute by CUDA's number.
fn attribute(attribute: c_int, device: c_int) -> Result<c_int, Code> {
    let mut value = 0;
    let out = &raw mut value;
    // SAFETY: a pointer to a local; an unknown number or device is a code.
    match unsafe { call!(CUDA.cuDeviceGetAttribute(out: *mut c_int, attribute: c_int, device: c_int)) } {
        0 => Ok(value),
        code => Err(code),
    }
}

/// CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT.
const PROCESSORS: c_int = 16;

/// The vendor's numbers, and the vendor's device: only how many multiprocessors there are is NVIDIA's to say.
fn vendors_attribute(number: c_int, device: c_int) -> Result<c_int, Code> {
    match (number, VENDOR.arch) {
        (n, _) if n == VENDOR.warp_attribute => Ok(DEVICE.warp.cast_signed()),
        (n, _) if n == VENDOR.shared_attribute => Ok(SHARED_BYTES.cast_signed()),
        (n, _) if n == VENDOR.processors_attribute => attribute(PROCESSORS, current::device(device)?),
        (n, Arch::Capability([major, _])) if n == major => Ok(DEVICE.capability[0]),
        (n, Arch::Capability([_, minor])) if n == minor => Ok(DEVICE.capability[1]),
        _ => Err(INVALID_VALUE),
    }
}

/// # Safety
/// `value` must be writable.
#[unsafe(export_name = symbol!(device_attribute))]
pub unsafe extern "C" fn device_attribute(value: *mut c_int, attribute: c_int, device: c_int) -> Code {
    match vendors_attribute(attribute, device) {
        Ok(found) => {
            // SAFETY: the caller's promise.
            unsafe { value.write(found) };
            0
        }
        Err(code) => code,
    }
}

/// # Safety
/// `name` must be writable for `length` bytes.
#[unsafe(export_name = symbol!(device_name))]
pub unsafe extern "C" fn device_name(name: *mut c_char, length: c_int, device: c_int) -> Code {
    let device = match current::device(device) {
        Ok(device) => device,
        Err(code) => return code,
    };
    let mut real = [0 as c_char; 128];
    let (out, most) = (real.as_mut_ptr(), real.len() as c_int - 1);
    // SAFETY: the buffer and its length, less the last byte, which stays null.
    let code = unsafe { call!(CUDA.cuDeviceGetName(out: *mut c_char, most: c_int, device: c_int)) };
    if code != 0 {
        return code;
    }
    // SAFETY: the last byte is null.
    let text = [unsafe { CStr::from_ptr(out) }.to_bytes(), b" standing in"].concat();
    let Some(room) = usize::try_from(length).ok().and_then(|length| length.checked_sub(1)) else {
        return INVALID_VALUE;
    };
    let count = text.len().min(room);
    // SAFETY: at most `length` bytes, the null included.
    unsafe {
        name.copy_from_nonoverlapping(text.as_ptr().cast(), count);
        name.add(count).write(0);
    }
    0
}

/// # Safety
/// `properties` must be writable for the vendor's struct.
#[cfg(feature = "hip")]
#[unsafe(export_name = symbol!(device_properties))]
pub unsafe extern "C" fn device_properties(properties: *mut c_void, _device: c_int) -> Code {
    let Arch::Properties { bytes, at, name } = VENDOR.arch else {
        return INVALID_VALUE;
    };
    // The name and its null end inside the struct.
    if at + name.len() >= bytes {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise, and the lines above.
    unsafe {
        properties.write_bytes(0, bytes);
        properties.add(at).copy_from_nonoverlapping(name.as_ptr().cast(), name.len());
    }
    0
}

/// # Safety
/// `pointer` must be writable.
#[unsafe(export_name = symbol!(host_alloc))]
pub unsafe extern "C" fn host_alloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint) -> Code {
    if flags != VENDOR.host_flags {
        return INVALID_VALUE;
    }
    let code = enter();
    if code != 0 {
        return code;
    }
    // PORTABLE | DEVICEMAP, which are the same bits with every vendor so far; CUDA's are meant here.
    let flags = 0x1 | 0x2;
    // SAFETY: the caller's promise.
    unsafe { call!(CUDA.cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint)) }
}

/// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
const MAX_DYNAMIC_SHARED: c_int = 8;

/// Finds a kernel, and asks for the shared memory that these drivers need not be asked for.
///
/// # Safety
/// `function` must be writable, `module` a module, `name` a string.
#[unsafe(export_name = symbol!(module_function))]
pub unsafe extern "C" fn module_function(function: *mut Handle, module: Handle, name: *const c_char) -> Code {
    let code = enter();
    if code != 0 {
        return code;
    }
    // SAFETY: the caller's promise.
    let code = unsafe { call!(CUDA.cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char)) };
    if code != 0 {
        return code;
    }
    // SAFETY: it was found, so stored.
    let found = unsafe { function.read() };
    let bytes = SHARED_BYTES.cast_signed();
    // SAFETY: a function of a loaded module.
    unsafe { call!(CUDA.cuFuncSetAttribute(found: Handle, MAX_DYNAMIC_SHARED: c_int, bytes: c_int)) }
}

/// # Safety
/// As cuLaunchKernel says.
#[unsafe(export_name = symbol!(launch))]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn launch(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: Handle,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Code {
    if shared_bytes > SHARED_BYTES {
        return INVALID_VALUE;
    }
    let code = enter();
    if code != 0 {
        return code;
    }
    // SAFETY: the caller's promise.
    unsafe {
        call!(CUDA.cuLaunchKernel(
            function: Handle,
            grid_x: c_uint,
            grid_y: c_uint,
            grid_z: c_uint,
            block_x: c_uint,
            block_y: c_uint,
            block_z: c_uint,
            shared_bytes: c_uint,
            stream: Handle,
            params: *mut *mut c_void,
            extra: *mut *mut c_void,
        ))
    }
}
