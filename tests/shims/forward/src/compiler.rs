//! The vendor's run-time compiler by NVRTC. The vendor's builtins stand before the source; its architecture gives way to the device's.

use std::ffi::{CStr, CString, c_char, c_int};

use super::names::VENDOR;
use super::nvidia::{Code, Handle, NVRTC};

/// NVRTC_ERROR_INVALID_INPUT, NVRTC_ERROR_INVALID_OPTION, NVRTC_ERROR_INTERNAL_ERROR.
const INVALID_INPUT: Code = 3;
const INVALID_OPTION: Code = 5;
const INTERNAL: Code = 11;

/// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
const CAPABILITY: [c_int; 2] = [75, 76];

forward! { 0; NVRTC:
    #[compiler] version(major: *mut c_int, minor: *mut c_int) = nvrtcVersion;
    #[compiler] log_size(program: Handle, bytes: *mut usize) = nvrtcGetProgramLogSize;
    #[compiler] log(program: Handle, log: *mut c_char) = nvrtcGetProgramLog;
    #[compiler] binary_size(program: Handle, bytes: *mut usize) = nvrtcGetCUBINSize;
    #[compiler] binary(program: Handle, binary: *mut c_char) = nvrtcGetCUBIN;
    #[compiler] destroy(program: *mut Handle) = nvrtcDestroyProgram;
}

#[unsafe(export_name = symbol!(compiler error_string))]
pub extern "C" fn error_string(code: Code) -> *const c_char {
    // SAFETY: NVRTC's function takes any code and returns a static string.
    match unsafe { NVRTC.find::<unsafe extern "C" fn(Code) -> *const c_char>("nvrtcGetErrorString") } {
        // SAFETY: as above.
        Some(words) => unsafe { words(code) },
        None => c"NVRTC cannot be loaded".as_ptr(),
    }
}

/// # Safety
/// As nvrtcCreateProgram says.
#[unsafe(export_name = symbol!(compiler create))]
pub unsafe extern "C" fn create(
    program: *mut Handle,
    source: *const c_char,
    name: *const c_char,
    headers: c_int,
    texts: *const *const c_char,
    names: *const *const c_char,
) -> Code {
    // SAFETY: the caller's promise: a string.
    let source = unsafe { CStr::from_ptr(source) }.to_bytes();
    // Lines keep their numbers.
    let Ok(all) = CString::new([VENDOR.prelude.as_bytes(), b"\n#line 1\n", source].concat()) else {
        return INVALID_INPUT;
    };
    let text = all.as_ptr();
    // SAFETY: the caller's promise; NVRTC copies the text.
    unsafe {
        call!(NVRTC.nvrtcCreateProgram(
            program: *mut Handle,
            text: *const c_char,
            name: *const c_char,
            headers: c_int,
            texts: *const *const c_char,
            names: *const *const c_char,
        ))
    }
}

/// NVRTC's option for the device's own architecture.
fn architecture() -> Option<CString> {
    let device = super::current::current_device().ok()?;
    let [major, minor] = CAPABILITY.map(|number| super::attribute(number, device).ok());
    CString::new(format!("--gpu-architecture=sm_{}{}", major?, minor?)).ok()
}

/// # Safety
/// `program` must be one of [`create`]'s, `options` so many strings.
#[unsafe(export_name = symbol!(compiler compile))]
pub unsafe extern "C" fn compile(program: Handle, count: c_int, options: *const *const c_char) -> Code {
    let (mut ours, mut told) = (Vec::new(), false);
    for i in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the caller's promise.
        let option = unsafe { *options.add(i) };
        // SAFETY: as above.
        let text = unsafe { CStr::from_ptr(option) }.to_bytes();
        let is_arch = text.starts_with(VENDOR.arch_option.as_bytes());
        told |= is_arch;
        // Where the compiler is told no architecture, an option stands for it that NVRTC has to see. It does not know -O3.
        if (!is_arch || text.starts_with(b"-std=")) && text != b"-O3" {
            ours.push(option);
        }
    }
    if !told {
        return INVALID_OPTION;
    }
    let Some(real) = architecture() else {
        return INTERNAL;
    };
    ours.push(real.as_ptr());
    let (count, options) = (ours.len() as c_int, ours.as_ptr());
    // SAFETY: a program; strings that outlive the call.
    unsafe { call!(NVRTC.nvrtcCompileProgram(program: Handle, count: c_int, options: *const *const c_char)) }
}
