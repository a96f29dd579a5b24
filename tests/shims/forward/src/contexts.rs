//! Drivers that make contexts current, as CUDA's does: the host asks for them, and they are CUDA's own.

use std::ffi::{c_char, c_int};

use super::nvidia::{CUDA, Code, Handle, INVALID_VALUE, words};

/// The host has made a context current.
pub fn enter() -> Code {
    0
}

/// Devices are CUDA's own.
pub fn device(device: c_int) -> Result<c_int, Code> {
    Ok(device)
}

/// The device that a compilation is for: the first, as a compilation needs no context.
#[cfg(not(feature = "corex"))]
pub fn current_device() -> Result<c_int, Code> {
    let mut device = 0;
    // SAFETY: a pointer to a local.
    match unsafe { device_get(&raw mut device, 0) } {
        0 => Ok(device),
        code => Err(code),
    }
}

forward! { 0; CUDA:
    device_get(device: *mut c_int, ordinal: c_int) = cuDeviceGet;
    retain_context(context: *mut Handle, device: c_int) = cuDevicePrimaryCtxRetain;
    get_context(context: *mut Handle) = cuCtxGetCurrent;
    set_context(context: Handle) = cuCtxSetCurrent;
}

/// # Safety
/// `to` must be writable.
unsafe fn store(text: *const c_char, to: *mut *const c_char) -> Code {
    // SAFETY: the caller's promise.
    unsafe { to.write(text) };
    if text.is_null() { INVALID_VALUE } else { 0 }
}

/// # Safety
/// `text` must be writable.
#[unsafe(export_name = symbol!(error_name))]
pub unsafe extern "C" fn error_name(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: the caller's promise.
    unsafe { store(words(code, "cuGetErrorName"), text) }
}

/// # Safety
/// `text` must be writable.
#[unsafe(export_name = symbol!(error_string))]
pub unsafe extern "C" fn error_string(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: the caller's promise.
    unsafe { store(words(code, "cuGetErrorString"), text) }
}
