//! The functions of a vendor's driver that this crate calls, in one table.
//!
//! The table has the signatures; a [`Symbols`] has one vendor's names for them. Codes are integers, never enums: a newer
//! driver may return one that this build has never heard of. Device addresses are `u64`, which on the 64-bit machines that
//! these drivers exist for is passed as a pointer is.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::Library;

use super::vendor::Vendor;
use crate::backend::Evidence;
use crate::device::Handle;
use crate::error::{MlaError, Result};
use crate::kernels::loader_words;

#[cfg(not(target_pointer_width = "64"))]
compile_error!("device addresses are passed as 64-bit integers where these drivers take pointers");

/// A driver's code; 0 is success with every vendor.
pub(super) type Code = c_int;

/// Declares the table, the names that fill it, and a checked method for each function.
macro_rules! table {
    (
        unchecked { $($text:ident: fn($($text_type:ty),*) -> $text_result:ty;)* }
        optional { $($(#[$some_doc:meta])* $some:ident($($some_arg:ident: $some_type:ty),* $(,)?);)* }
        checked { $($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),* $(,)?);)* }
    ) => {
        /// A vendor's names; where a function was renamed, the newest first. None for an optional one that it lacks.
        #[derive(Debug)]
        pub(super) struct Symbols {
            $(pub(super) $some: &'static [&'static str],)*
            $(pub(super) $text: &'static [&'static str],)*
            $(pub(super) $name: &'static [&'static str],)*
        }

        /// The functions.
        #[derive(Clone, Copy)]
        pub(super) struct Table {
            $(pub(super) $some: Option<unsafe extern "C" fn($($some_type),*) -> Code>,)*
            $(pub(super) $text: unsafe extern "C" fn($($text_type),*) -> $text_result,)*
            $(pub(super) $name: unsafe extern "C" fn($($type),*) -> Code,)*
        }

        impl Table {
            /// # Safety
            /// The functions of these names in `library` must have the signatures of the table.
            pub(super) unsafe fn load(library: &Library, symbols: &Symbols) -> std::result::Result<Table, String> {
                Ok(Table {
                    $($some: match symbols.$some {
                        [] => None,
                        // SAFETY: the caller's promise.
                        names => Some(unsafe { find(library, names)? }),
                    },)*
                    // SAFETY: the caller's promise.
                    $($text: unsafe { find(library, symbols.$text)? },)*
                    // SAFETY: the caller's promise.
                    $($name: unsafe { find(library, symbols.$name)? },)*
                })
            }
        }

        impl Driver {
            $(
                $(#[$some_doc])*
                ///
                /// # Safety
                /// As the vendor's header says of this function.
                pub(super) unsafe fn $some(&self, $($some_arg: $some_type),*) -> Result<()> {
                    let Some(function) = self.table.$some else {
                        let (backend, message) = (self.vendor.platform, "this driver has no such call".into());
                        return Err(MlaError::Platform { backend, call: stringify!($some), message });
                    };
                    // SAFETY: the caller's promise.
                    let code = unsafe { function($($some_arg),*) };
                    self.check(self.vendor.symbols.$some[0], code)
                }
            )*
            $(
                $(#[$doc])*
                ///
                /// # Safety
                /// As the vendor's header says of this function.
                #[allow(clippy::too_many_arguments)]
                pub(super) unsafe fn $name(&self, $($arg: $type),*) -> Result<()> {
                    // SAFETY: the caller's promise.
                    let code = unsafe { (self.table.$name)($($arg),*) };
                    self.check(self.vendor.symbols.$name[0], code)
                }
            )*
        }
    };
}

table! {
    unchecked {
        error_name: fn(Code) -> *const c_char;
        error_string: fn(Code) -> *const c_char;
    }
    optional {
        /// The device current on this thread, where devices are made current.
        get_device(ordinal: *mut c_int);
        /// Makes a device current on this thread.
        set_device(ordinal: c_int);
        /// The device of an ordinal, where contexts are made current.
        device_get(device: *mut c_int, ordinal: c_int);
        /// The device's primary context.
        retain_context(context: *mut Handle, device: c_int);
        /// The context current on this thread.
        get_context(context: *mut Handle);
        /// Makes a context current on this thread.
        set_context(context: Handle);
        /// All properties, in a struct whose layout depends on the version.
        device_properties(properties: *mut c_void, ordinal: c_int);
    }
    checked {
        /// Initialises the driver.
        init(flags: c_uint);
        /// The runtime's version, in the vendor's counting.
        version(version: *mut c_int);
        /// Counts devices.
        device_count(count: *mut c_int);
        /// One property, by the vendor's number.
        device_attribute(value: *mut c_int, attribute: c_int, ordinal: c_int);
        /// The device's name, null-terminated.
        device_name(name: *mut c_char, length: c_int, ordinal: c_int);
        /// Allocates memory of the current device.
        alloc(address: *mut u64, bytes: usize);
        /// Frees it, after the work that uses it.
        free(address: u64);
        /// Allocates host memory that kernels can reach.
        host_alloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
        /// Its address for kernels.
        host_address(address: *mut u64, pointer: *mut c_void, flags: c_uint);
        /// Frees it.
        host_free(pointer: *mut c_void);
        /// Copies host to device, and waits.
        copy_to_device(to: u64, from: *const c_void, bytes: usize);
        /// Copies device to host, and waits.
        copy_to_host(to: *mut c_void, from: u64, bytes: usize);
        /// Enqueues a copy within the device.
        copy_on_device(to: u64, from: u64, bytes: usize, stream: Handle);
        /// Enqueues setting bytes.
        fill_bytes(address: u64, value: u8, count: usize, stream: Handle);
        /// Enqueues setting 32-bit words.
        fill_words(address: u64, value: c_int, count: usize, stream: Handle);
        /// Waits for the current device.
        synchronize();
        /// Makes a stream.
        stream_create(stream: *mut Handle, flags: c_uint);
        /// Destroys it.
        stream_destroy(stream: Handle);
        /// Waits for it.
        stream_synchronize(stream: Handle);
        /// Makes an event that can be timed.
        event_create(event: *mut Handle, flags: c_uint);
        /// Destroys it.
        event_destroy(event: Handle);
        /// Enqueues it.
        event_record(event: Handle, stream: Handle);
        /// Waits for it.
        event_synchronize(event: Handle);
        /// Milliseconds between two.
        event_elapsed(milliseconds: *mut f32, start: Handle, end: Handle);
        /// Loads a binary; its length is in its own header.
        module_load(module: *mut Handle, image: *const c_void);
        /// Unloads it.
        module_unload(module: Handle);
        /// Finds a kernel.
        module_function(function: *mut Handle, module: Handle, name: *const c_char);
        /// Enqueues a kernel.
        launch(
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
        );
    }
}

/// # Safety
/// The function found must have the type `T`.
unsafe fn find<T: Copy>(library: &Library, names: &[&str]) -> std::result::Result<T, String> {
    for name in names {
        // SAFETY: the caller's promise.
        if let Ok(symbol) = unsafe { library.get::<T>(*name) } {
            return Ok(*symbol);
        }
    }
    Err(format!("it has no {}", names.join(" and no ")))
}

/// A library of tests that stands in for the vendor's exports this function; it returns the tier that a run through it
/// proves, so that no run over it is taken for one on the vendor's hardware.
const STAND_IN: &str = "polymla_stand_in_tier";

fn evidence(library: &Library) -> Evidence {
    // SAFETY: nobody but this crate's tests has a function of that name; it takes nothing and returns an int.
    let tier = unsafe { library.get::<unsafe extern "C" fn() -> c_int>(STAND_IN).map(|f| f()) };
    match tier {
        Err(_) => Evidence::T5,
        Ok(4) => Evidence::T4,
        Ok(_) => Evidence::T3,
    }
}

/// A vendor's driver, loaded and initialised.
pub(super) struct Driver {
    pub(super) vendor: &'static Vendor,
    pub(super) table: Table,
    /// What it was loaded as.
    pub(super) library: String,
    pub(super) version: c_int,
    /// What a run through it proves.
    pub(super) evidence: Evidence,
    /// Keeps the functions in place; `None` where they are linked.
    _library: Option<Library>,
}

impl Driver {
    /// Takes the functions from the first library of the vendor's list that has them all, and initialises it.
    ///
    /// # Errors
    /// Why there is none, in words: every library tried.
    pub(super) fn load(vendor: &'static Vendor) -> std::result::Result<Driver, String> {
        let mut reasons = Vec::new();
        for path in vendor.candidates() {
            let shown = path.display().to_string();
            // SAFETY: a driver's initialisers may run in any process.
            let library = match unsafe { Library::new(&path) } {
                Ok(library) => library,
                Err(e) => {
                    reasons.push(format!("{shown}: {}", loader_words(&e)));
                    continue;
                }
            };
            // SAFETY: functions of these names have these signatures; a library that lacks one is refused.
            match unsafe { Table::load(&library, vendor.symbols) } {
                Ok(table) => return Self::start(vendor, table, shown, Some(library)),
                Err(e) => reasons.push(format!("{shown}: {e}")),
            }
        }
        Err(format!("no library of {} could be used: {}", vendor.words, reasons.join("; ")))
    }

    /// Initialises a driver whose functions are at hand.
    ///
    /// # Errors
    /// What the driver says, in words.
    pub(super) fn start(
        vendor: &'static Vendor,
        table: Table,
        library: String,
        keep: Option<Library>,
    ) -> std::result::Result<Driver, String> {
        let evidence = keep.as_ref().map_or(Evidence::T5, evidence);
        let mut driver = Driver { vendor, table, library, version: 0, evidence, _library: keep };
        let (mut version, mut count) = (0, 0);
        // SAFETY: these may be called at any time; they take pointers to ints.
        let (started, counted, _) = unsafe {
            let started = driver.init(0);
            (started, driver.device_count(&raw mut count), driver.version(&raw mut version))
        };
        driver.version = version;
        // A driver without a device fails in either call, each vendor and version with codes of its own.
        match (started.and(counted), count) {
            (Ok(()), 1..) => Ok(driver),
            (Ok(()), _) => Err(format!("{} has no device", driver.library)),
            (Err(e), _) => Err(format!("{} has no device: {}", driver.library, inner(&e))),
        }
    }

    /// A code as a result that names the call and what the driver says of the code.
    pub(super) fn check(&self, call: &'static str, code: Code) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let text = |f: unsafe extern "C" fn(Code) -> *const c_char| {
            let pointer = if self.vendor.text_by_pointer {
                type ByPointer = unsafe extern "C" fn(Code, *mut *const c_char) -> Code;
                let mut pointer = std::ptr::null();
                // SAFETY: this vendor's functions have that signature: they store a static string, or null.
                let code = unsafe {
                    std::mem::transmute::<unsafe extern "C" fn(Code) -> *const c_char, ByPointer>(f)(
                        code,
                        &raw mut pointer,
                    )
                };
                if code == 0 { pointer } else { std::ptr::null() }
            } else {
                // SAFETY: the function takes any code, and returns a static string or null.
                unsafe { f(code) }
            };
            // SAFETY: as above.
            (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
        };
        let words = text(self.table.error_string).unwrap_or_else(|| "unknown to this driver".into());
        let name = text(self.table.error_name).unwrap_or_default();
        let message =
            if name == words { format!("{words} (code {code})") } else { format!("{words} ({name}, code {code})") };
        Err(MlaError::Platform { backend: self.vendor.platform, call, message })
    }
}

/// The call and the message of a platform's error, without the platform.
fn inner(error: &MlaError) -> String {
    match error {
        MlaError::Platform { call, message, .. } => format!("{call}: {message}"),
        other => other.to_string(),
    }
}
