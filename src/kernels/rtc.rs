//! A run-time compiler: a library of nine functions that differ from vendor to vendor by their names alone.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;

use crate::error::{MlaError, Result};

type Program = *mut c_void;
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
    pub binary: Vec<u8>,
    /// What the compiler said: warnings, and the resource report where it was asked for.
    pub log: String,
}

macro_rules! table {
    ($($(#[$doc:meta])* $name:ident: fn($($type:ty),*) -> $result:ty;)*) => {
        /// The vendor's names of the functions.
        #[derive(Debug)]
        pub(crate) struct Names {
            /// The compiler's own name, for messages.
            pub(crate) compiler: &'static str,
            $($(#[$doc])* pub(crate) $name: &'static CStr,)*
        }

        struct Pointers { $($name: unsafe extern "C" fn($($type),*) -> $result,)* }

        impl Pointers {
            /// # Safety
            /// The functions of these names in `library` must have the signatures of the table.
            unsafe fn load(library: &Library, names: &Names) -> std::result::Result<Pointers, String> {
                Ok(Pointers {
                    $($name: {
                        // SAFETY: the caller's promise.
                        *unsafe { library.get(names.$name) }
                            .map_err(|_| format!("it has no {}", names.$name.to_string_lossy()))?
                    },)*
                })
            }
        }
    };
}

table! {
    /// Major and minor version.
    version: fn(*mut c_int, *mut c_int) -> Code;
    /// The words of a code: a static string.
    error_string: fn(Code) -> *const c_char;
    /// Program out; text, name, number of headers, their texts, their names.
    create: fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> Code;
    /// Program, number of options, options.
    compile: fn(Program, c_int, *const *const c_char) -> Code;
    /// Bytes of the log, its null included.
    log_size: fn(Program, *mut usize) -> Code;
    /// The log.
    log: fn(Program, *mut c_char) -> Code;
    /// Bytes of the binary.
    binary_size: fn(Program, *mut usize) -> Code;
    /// The binary.
    binary: fn(Program, *mut c_char) -> Code;
    /// Frees a program.
    destroy: fn(*mut Program) -> Code;
}

/// One loaded library.
pub(crate) struct Compiler {
    names: &'static Names,
    pointers: Pointers,
    version: (i32, i32),
    path: PathBuf,
    /// Keeps the functions in place; dropped last.
    _library: Library,
}

impl Compiler {
    /// Loads the library of this name or path.
    ///
    /// # Errors
    /// [`MlaError::Platform`] where it cannot be loaded or lacks a function.
    pub(crate) fn load(names: &'static Names, path: &Path) -> Result<Compiler> {
        let failed = |message: String| MlaError::Platform {
            backend: names.compiler,
            call: "dlopen",
            message: format!("{}: {message}", path.display()),
        };
        // SAFETY: a compiler's initialisers may run in any process.
        let library = unsafe { Library::new(path) }.map_err(|e| failed(loader_words(&e)))?;
        // SAFETY: functions of these names have these signatures; a library that lacks one is refused.
        let pointers = unsafe { Pointers::load(&library, names) }.map_err(failed)?;
        let mut compiler = Compiler { names, pointers, version: (0, 0), path: path.into(), _library: library };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: pointers to locals.
        let code = unsafe { (compiler.pointers.version)(&raw mut major, &raw mut minor) };
        compiler.check("version", code, "")?;
        compiler.version = (major, minor);
        Ok(compiler)
    }

    /// The version of the library: major, minor.
    pub(crate) fn version(&self) -> (i32, i32) {
        self.version
    }
    /// What it was loaded as.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles to a binary.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with the compiler's log.
    pub(crate) fn compile(&self, source: &Source<'_>, options: &[String]) -> Result<Compiled> {
        let text = self.c_string(source.text)?;
        let name = self.c_string(source.name)?;
        let headers: Vec<CString> =
            source.headers.iter().map(|(_, text)| self.c_string(text)).collect::<Result<_>>()?;
        let names: Vec<CString> = source.headers.iter().map(|(name, _)| self.c_string(name)).collect::<Result<_>>()?;
        let options: Vec<CString> = options.iter().map(|o| self.c_string(o)).collect::<Result<_>>()?;
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (headers, names, options) = (pointers(&headers), pointers(&names), pointers(&options));

        let mut program = Held { compiler: self, handle: std::ptr::null_mut() };
        // SAFETY: null-terminated strings that outlive the call, in arrays as long as the count says.
        let code = unsafe {
            (self.pointers.create)(
                &raw mut program.handle,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check("create program", code, "")?;
        let handle = program.handle;
        // SAFETY: a live program; strings as above.
        let compiled = unsafe { (self.pointers.compile)(handle, options.len() as c_int, options.as_ptr()) };
        let log = self.bytes("get log", handle, self.pointers.log_size, self.pointers.log)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_string();
        self.check("compile program", compiled, &format!("\n{}: {log}", source.name))?;
        let binary = self.bytes("get binary", handle, self.pointers.binary_size, self.pointers.binary)?;
        Ok(Compiled { binary, log })
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
        if bytes > 0 {
            // SAFETY: the buffer is as long as the library asked for.
            self.check(call, unsafe { copy(program, buffer.as_mut_ptr().cast()) }, "")?;
        }
        Ok(buffer)
    }

    fn check(&self, call: &'static str, code: Code, details: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the function returns a static string for every code, known or not.
        let text = unsafe { (self.pointers.error_string)(code) };
        let words = if text.is_null() {
            format!("code {code}")
        } else {
            // SAFETY: as above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        let (major, minor) = self.version;
        let message = format!("{words} ({} {major}.{minor}){details}", self.names.compiler);
        Err(MlaError::Platform { backend: self.names.compiler, call, message })
    }

    fn c_string(&self, text: &str) -> Result<CString> {
        CString::new(text).map_err(|e| MlaError::Platform {
            backend: self.names.compiler,
            call: "create program",
            message: format!("a source holds a null byte at {}", e.nul_position()),
        })
    }
}

/// What the system's loader said: libloading's own words are only which call failed.
pub(crate) fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A program, destroyed when dropped.
struct Held<'a> {
    compiler: &'a Compiler,
    handle: Program,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: made by the library's `create`, destroyed once.
            unsafe { (self.compiler.pointers.destroy)(&raw mut self.handle) };
        }
    }
}
