//! Binaries on the device, their kernels, and launches.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use super::device::Accelerator;
use super::stream::Stream;
use super::table::Handle;
use crate::error::{MlaError, Result};
use crate::kernels::Origin;

/// A binary loaded on a device.
pub(super) struct Module {
    device: Arc<Accelerator>,
    handle: Handle,
    origin: Origin,
}

// SAFETY: module and function handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub(super) fn load(device: &Arc<Accelerator>, binary: &[u8], origin: Origin) -> Result<Module> {
        let driver = device.driver;
        // The driver reads the length from the binary's own header: it must at least have one. An ELF file, or a bundle
        // of such, plain or compressed.
        let known = [&b"\x7fELF"[..], b"__CLANG_OFFLOAD_BUNDLE__", b"CCOB"];
        if binary.len() < 64 || !known.iter().any(|magic| binary.starts_with(magic)) {
            return Err(MlaError::Platform {
                backend: driver.vendor.platform,
                call: driver.vendor.symbols.module_load[0],
                message: "not a code object".into(),
            });
        }
        let _current = device.enter()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: a binary made by a compiler, whole by checksum where it comes from the cache.
        unsafe { driver.module_load(&raw mut handle, binary.as_ptr().cast())? };
        Ok(Module { device: device.clone(), handle, origin })
    }

    /// Where the binary came from.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let current = self.device.enter();
        // SAFETY: unloaded once, by the last of its functions.
        let _ = current.and_then(|_current| unsafe { self.device.driver.module_unload(self.handle) });
    }
}

/// A kernel, with its threads a block and its dynamic shared memory.
pub(super) struct Function {
    module: Arc<Module>,
    handle: Handle,
    threads: u32,
    shared_bytes: u32,
}

// SAFETY: as for `Module`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// The kernel of this name.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(super) fn new(module: &Arc<Module>, name: &str, threads: u32, shared_bytes: u32) -> Result<Function> {
        let device = &module.device;
        let _current = device.enter()?;
        let mut handle: Handle = std::ptr::null_mut();
        let lookup = CString::new(name).unwrap_or_default();
        // SAFETY: a live module and a null-terminated name.
        let found = unsafe { device.driver.module_function(&raw mut handle, module.handle, lookup.as_ptr()) };
        found.map_err(|e| match e {
            MlaError::Platform { backend, call, message } => {
                MlaError::Platform { backend, call, message: format!("{name}: {message}") }
            }
            other => other,
        })?;
        Ok(Function { module: module.clone(), handle, threads, shared_bytes })
    }

    /// Whether a launch of that many blocks is within the driver's limits.
    ///
    /// # Errors
    /// [`MlaError::Overflow`].
    pub(super) fn check_grid(&self, blocks: u64) -> Result<u32> {
        let limit = self.module.device.driver.vendor.max_grid_threads / u64::from(self.threads);
        let limit = limit.min(i32::MAX as u64);
        if blocks > limit {
            return Err(MlaError::Overflow { param: "blocks of the grid", value: blocks.to_string(), limit });
        }
        Ok(blocks as u32)
    }

    /// Enqueues `blocks` blocks with one parameter, which is copied.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    ///
    /// # Safety
    /// `params` must be of the type that the kernel declares, and what its addresses name must be the kernel's to read
    /// or write until it is done. `stream` must be alive and of the function's device.
    pub(super) unsafe fn enqueue<P>(&self, blocks: u32, params: &mut P, stream: Stream) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let device = &self.module.device;
        let _current = device.enter()?;
        let mut list = [std::ptr::from_mut(params).cast::<c_void>()];
        // SAFETY: the list lives through the call; the rest is the caller's promise.
        unsafe {
            device.driver.launch(
                self.handle,
                blocks,
                1,
                1,
                self.threads,
                1,
                1,
                self.shared_bytes,
                stream.raw(),
                list.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
    }
}
