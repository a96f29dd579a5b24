//! Drivers that make devices current: CUDA wants a context there, so every call makes the device's primary one current first.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int};
use std::sync::{Mutex, PoisonError};

use super::nvidia::{CUDA, Code, Handle, words};

/// CUDA_ERROR_INVALID_DEVICE.
const INVALID_DEVICE: Code = 101;

thread_local! {
    /// The device current on this thread, by its ordinal.
    static CURRENT: Cell<c_int> = const { Cell::new(0) };
}

/// Contexts of devices, by ordinal: addresses, never released.
static CONTEXTS: Mutex<BTreeMap<c_int, usize>> = Mutex::new(BTreeMap::new());

/// The device of an ordinal.
pub fn device(ordinal: c_int) -> Result<c_int, Code> {
    let mut device = 0;
    let out = &raw mut device;
    // SAFETY: a pointer to a local; an ordinal out of range is a code.
    match unsafe { call!(CUDA.cuDeviceGet(out: *mut c_int, ordinal: c_int)) } {
        0 => Ok(device),
        code => Err(code),
    }
}

/// The device that a compilation is for.
#[cfg(not(feature = "corex"))]
pub fn current_device() -> Result<c_int, Code> {
    device(CURRENT.get())
}

/// Makes the context of the current device current.
pub fn enter() -> Code {
    let ordinal = CURRENT.get();
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let context = match contexts.get(&ordinal) {
        Some(address) => *address as Handle,
        None => {
            let device = match device(ordinal) {
                Ok(device) => device,
                Err(code) => return code,
            };
            let mut context: Handle = std::ptr::null_mut();
            let out = &raw mut context;
            // SAFETY: a pointer to a local, and a device.
            let code = unsafe { call!(CUDA.cuDevicePrimaryCtxRetain(out: *mut Handle, device: c_int)) };
            if code != 0 {
                return code;
            }
            contexts.insert(ordinal, context as usize);
            context
        }
    };
    // SAFETY: a context that was retained.
    unsafe { call!(CUDA.cuCtxSetCurrent(context: Handle)) }
}

#[unsafe(export_name = symbol!(error_name))]
pub extern "C" fn error_name(code: Code) -> *const c_char {
    words(code, "cuGetErrorName")
}

#[unsafe(export_name = symbol!(error_string))]
pub extern "C" fn error_string(code: Code) -> *const c_char {
    words(code, "cuGetErrorString")
}

/// # Safety
/// `ordinal` must be writable.
#[unsafe(export_name = symbol!(get_device))]
pub unsafe extern "C" fn get_device(ordinal: *mut c_int) -> Code {
    // SAFETY: the caller's promise.
    unsafe { ordinal.write(CURRENT.get()) };
    0
}

#[unsafe(export_name = symbol!(set_device))]
pub extern "C" fn set_device(ordinal: c_int) -> Code {
    let mut count = 0;
    let out = &raw mut count;
    // SAFETY: a pointer to a local.
    match unsafe { call!(CUDA.cuDeviceGetCount(out: *mut c_int)) } {
        0 if (0..count).contains(&ordinal) => {
            CURRENT.set(ordinal);
            0
        }
        0 => INVALID_DEVICE,
        code => code,
    }
}
