//! NVIDIA's libraries, loaded when a function of theirs is first called.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

/// A code of libcuda or NVRTC; 0 is success.
pub type Code = c_int;
pub type Handle = *mut c_void;

/// CUDA_ERROR_INVALID_VALUE.
pub const INVALID_VALUE: Code = 1;
/// CUDA_ERROR_NOT_FOUND: also where the library itself is missing.
pub const NOT_FOUND: Code = 500;

/// A library, by the names it may have.
pub struct Nvidia {
    names: &'static [&'static str],
    library: OnceLock<Option<Library>>,
}

pub static CUDA: Nvidia = Nvidia { names: &["libcuda.so.1", "libcuda.so"], library: OnceLock::new() };
#[cfg(not(feature = "corex"))]
pub static NVRTC: Nvidia = Nvidia {
    names: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"],
    library: OnceLock::new(),
};

impl Nvidia {
    /// The first of the names that can be loaded.
    fn library(&self) -> Option<&Library> {
        let load = || {
            // SAFETY: initialisers of NVIDIA's libraries may run in any process.
            let found = self.names.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
            if found.is_none() {
                eprintln!("polymla-forward: none of {} can be loaded", self.names.join(", "));
            }
            found
        };
        self.library.get_or_init(load).as_ref()
    }

    /// A function.
    ///
    /// # Safety
    /// It must have the type `F`.
    pub unsafe fn find<F: Copy>(&self, name: &str) -> Option<F> {
        // SAFETY: the caller's promise.
        unsafe { self.library()?.get::<F>(name) }.ok().map(|symbol| *symbol)
    }
}

/// `call!(CUDA.cuMemFree_v2(address: u64))` is what the function returns, or NOT_FOUND where there is none. The caller's block
/// is unsafe: the function must have these parameters, and their values must be what it asks for.
macro_rules! call {
    ($library:ident.$name:ident($($arg:ident: $type:ty),* $(,)?)) => {
        match $library.find::<unsafe extern "C" fn($($type),*) -> $crate::nvidia::Code>(stringify!($name)) {
            Some(function) => function($($arg),*),
            None => $crate::nvidia::NOT_FOUND,
        }
    };
}

/// Exports functions under the vendor's names that do nothing but call NVIDIA's, after `$enter` (which makes a context current).
macro_rules! forward {
    ($enter:expr; $library:ident: $($(#[$of:ident])? $name:ident($($arg:ident: $type:ty),* $(,)?) = $nvidia:ident;)*) => {
        $(
            /// # Safety
            /// As NVIDIA's function of the last name says.
            #[unsafe(export_name = symbol!($($of)? $name))]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> Code {
                let code: Code = $enter;
                if code != 0 {
                    return code;
                }
                // SAFETY: NVIDIA's function has these parameters, by its header; their values are the caller's promise.
                unsafe { call!($library.$nvidia($($arg: $type),*)) }
            }
        )*
    };
}

/// libcuda's words for a code, by one of its two functions for them; null where it has none.
pub fn words(code: Code, function: &str) -> *const c_char {
    let mut text = std::ptr::null();
    // SAFETY: both functions take a code and store a pointer to a static string.
    match unsafe { CUDA.find::<unsafe extern "C" fn(Code, *mut *const c_char) -> Code>(function) } {
        // SAFETY: as above.
        Some(get) if unsafe { get(code, &raw mut text) } == 0 => text,
        Some(_) => std::ptr::null(),
        None => c"libcuda cannot be loaded".as_ptr(),
    }
}
