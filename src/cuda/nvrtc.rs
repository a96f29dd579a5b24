//! NVRTC, the run-time compiler: the ten functions of it that this crate calls, and where to look for the library.
//!
//! cudarc looks for the library of one CUDA major version only; machines have 12 or 13.

use std::ffi::{CStr, CString, OsString, c_char, c_int};
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::error::{MlaError, Result};

/// Names one NVRTC library to use, and no other.
pub const NVRTC_VARIABLE: &str = "POLYMLA_NVRTC";

/// Majors that are looked for, newest first.
const MAJORS: [u32; 2] = [13, 12];

type Program = *mut std::ffi::c_void;
type Code = c_int;

/// A source file and the headers that it may include, by the names it includes them with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) name: &'a str,
    pub(crate) text: &'a str,
    pub(crate) headers: &'a [(&'a str, &'a str)],
}

/// What a compilation gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// The binary for the device.
    pub cubin: Vec<u8>,
    /// What the compiler said: warnings, and the resource report where it was asked for.
    pub log: String,
}

macro_rules! nvrtc_table {
    ($(fn $name:ident($($type:ty),*) -> $result:ty;)*) => {
        #[allow(non_snake_case, reason = "NVRTC's own names")]
        struct Pointers { $($name: unsafe extern "C" fn($($type),*) -> $result,)* }
        impl Pointers {
            /// # Safety
            /// `library` must be NVRTC, whose functions have these signatures.
            unsafe fn load(library: &Library) -> std::result::Result<Pointers, String> {
                Ok(Pointers {
                    $($name: {
                        let name = concat!(stringify!($name), "\0");
                        // SAFETY: the signature is the one of the function of that name in nvrtc.h.
                        *unsafe { library.get(name.as_bytes()) }
                            .map_err(|_| format!("it has no {}", stringify!($name)))?
                    },)*
                })
            }
        }
    };
}

nvrtc_table! {
    fn nvrtcVersion(*mut c_int, *mut c_int) -> Code;
    fn nvrtcGetErrorString(Code) -> *const c_char;
    fn nvrtcCreateProgram(
        *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    ) -> Code;
    fn nvrtcCompileProgram(Program, c_int, *const *const c_char) -> Code;
    fn nvrtcGetProgramLogSize(Program, *mut usize) -> Code;
    fn nvrtcGetProgramLog(Program, *mut c_char) -> Code;
    fn nvrtcGetCUBINSize(Program, *mut usize) -> Code;
    fn nvrtcGetCUBIN(Program, *mut c_char) -> Code;
    fn nvrtcDestroyProgram(*mut Program) -> Code;
}

/// One loaded NVRTC library.
pub(crate) struct Nvrtc {
    pointers: Pointers,
    version: (i32, i32),
    path: PathBuf,
    /// Keeps the functions in place; dropped last.
    _library: Library,
}

impl Nvrtc {
    /// Loads the library of this name or path.
    ///
    /// # Errors
    /// [`MlaError::Platform`] where it cannot be loaded or is not NVRTC.
    pub(crate) fn load(path: &Path) -> Result<Nvrtc> {
        let failed = |message: String| MlaError::Platform {
            backend: "nvrtc",
            call: "dlopen",
            message: format!("{}: {message}", path.display()),
        };
        // SAFETY: NVRTC's initialisers may run in any process.
        let library = unsafe { Library::new(path) }.map_err(|e| failed(e.to_string()))?;
        // SAFETY: a library of this name is NVRTC; one that lacks a function is refused.
        let pointers = unsafe { Pointers::load(&library) }.map_err(failed)?;
        let mut nvrtc = Nvrtc { pointers, version: (0, 0), path: path.into(), _library: library };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: pointers to locals.
        nvrtc.check("nvrtcVersion", unsafe { (nvrtc.pointers.nvrtcVersion)(&raw mut major, &raw mut minor) }, "")?;
        nvrtc.version = (major, minor);
        Ok(nvrtc)
    }

    /// Every name the library may have here, best first: what [`NVRTC_VARIABLE`] says and nothing else, or the loader's
    /// path, then the usual places of a toolkit. The driver's own major comes first, because a driver refuses what a
    /// newer major compiled.
    pub(crate) fn candidates(driver_major: u32) -> Vec<PathBuf> {
        if let Some(named) = std::env::var_os(NVRTC_VARIABLE).filter(|v| !v.is_empty()) {
            return vec![named.into()];
        }
        let mut majors = MAJORS.to_vec();
        majors.sort_by_key(|m| (*m != driver_major, *m > driver_major));
        let names: Vec<String> = if cfg!(windows) {
            majors.iter().map(|m| format!("nvrtc64_{m}0_0.dll")).collect()
        } else {
            majors.iter().map(|m| format!("libnvrtc.so.{m}")).chain(["libnvrtc.so".to_string()]).collect()
        };
        let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).filter(|v| !v.is_empty());
        let roots = roots.chain(cfg!(unix).then(|| OsString::from("/usr/local/cuda"))).map(PathBuf::from);
        let folders = roots.flat_map(|root| ["lib64", "lib", "bin"].map(|folder| root.join(folder)));
        let in_folders: Vec<_> = folders.flat_map(|f| names.iter().map(move |n| f.join(n))).collect();
        names.iter().map(PathBuf::from).chain(in_folders.into_iter().filter(|path| path.exists())).collect()
    }

    /// The version of the library: major, minor.
    pub(crate) fn version(&self) -> (i32, i32) {
        self.version
    }
    /// What it was loaded as.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles to a cubin.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with the compiler's log.
    pub(crate) fn compile(&self, source: &Source<'_>, options: &[String]) -> Result<Compiled> {
        let text = c_string(source.text)?;
        let name = c_string(source.name)?;
        let headers: Vec<CString> = source.headers.iter().map(|(_, text)| c_string(text)).collect::<Result<_>>()?;
        let names: Vec<CString> = source.headers.iter().map(|(name, _)| c_string(name)).collect::<Result<_>>()?;
        let options: Vec<CString> = options.iter().map(|o| c_string(o)).collect::<Result<_>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (headers, names, options) = (pointers(&headers), pointers(&names), pointers(&options));

        let mut program = Held { nvrtc: self, handle: std::ptr::null_mut() };
        // SAFETY: null-terminated strings that outlive the call, in arrays as long as the count says.
        let code = unsafe {
            (self.pointers.nvrtcCreateProgram)(
                &raw mut program.handle,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", code, "")?;
        let handle = program.handle;
        // SAFETY: a live program; strings as above.
        let compiled = unsafe { (self.pointers.nvrtcCompileProgram)(handle, options.len() as c_int, options.as_ptr()) };
        let log = self.bytes(
            "nvrtcGetProgramLog",
            handle,
            self.pointers.nvrtcGetProgramLogSize,
            self.pointers.nvrtcGetProgramLog,
        )?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_string();
        self.check("nvrtcCompileProgram", compiled, &format!("\n{}: {log}", source.name))?;
        let cubin =
            self.bytes("nvrtcGetCUBIN", handle, self.pointers.nvrtcGetCUBINSize, self.pointers.nvrtcGetCUBIN)?;
        Ok(Compiled { cubin, log })
    }

    /// A byte string of a program, by the function that tells its size and the one that copies it.
    fn bytes(
        &self,
        call: &'static str,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> Code,
        copy: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    ) -> Result<Vec<u8>> {
        let mut bytes = 0usize;
        // SAFETY: a live program and a pointer to a local.
        self.check(call, unsafe { size(program, &raw mut bytes) }, "")?;
        let mut buffer = vec![0u8; bytes];
        // SAFETY: the buffer is as long as the library asked for.
        self.check(call, unsafe { copy(program, buffer.as_mut_ptr().cast()) }, "")?;
        Ok(buffer)
    }

    fn check(&self, call: &'static str, code: Code, details: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function returns a static string for every code, known or not.
        let text = unsafe { (self.pointers.nvrtcGetErrorString)(code) };
        let words = if text.is_null() {
            format!("code {code}")
        } else {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        let (major, minor) = self.version;
        Err(MlaError::Platform { backend: "nvrtc", call, message: format!("{words} (NVRTC {major}.{minor}){details}") })
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| MlaError::Platform {
        backend: "nvrtc",
        call: "nvrtcCreateProgram",
        message: format!("a source holds a null byte at {}", e.nul_position()),
    })
}

/// A program, destroyed when dropped.
struct Held<'a> {
    nvrtc: &'a Nvrtc,
    handle: Program,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made by nvrtcCreateProgram, destroyed once.
            unsafe { (self.nvrtc.pointers.nvrtcDestroyProgram)(&raw mut self.handle) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_major_is_tried_first() {
        let file = |major| Nvrtc::candidates(major)[0].to_string_lossy().into_owned();
        if std::env::var_os(NVRTC_VARIABLE).is_none() && cfg!(unix) {
            assert_eq!(file(12), "libnvrtc.so.12");
            assert_eq!(file(13), "libnvrtc.so.13");
        }
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let error = Nvrtc::load(Path::new("/nowhere/libnvrtc.so.12")).err().expect("there is none").to_string();
        assert!(error.contains("/nowhere/libnvrtc.so.12"), "{error}");
    }
}
