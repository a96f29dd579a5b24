//! Binaries on the device, their kernels, and launches.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use super::{Api, Handle, Stream};
use crate::error::{MlaError, Result};
use crate::kernels::{Origin, is_whole};

/// A binary loaded on a device.
pub(crate) struct Module {
    api: Arc<dyn Api>,
    handle: Handle,
    origin: Origin,
}

// SAFETY: module and function handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn load(api: &Arc<dyn Api>, binary: &[u8], origin: Origin) -> Result<Module> {
        // The driver reads the length from the binary's own tables: they must be there, and name nothing beyond it.
        if binary.len() < 64 || !api.is_binary(binary) || !is_whole(binary) {
            let backend = match api.device() {
                crate::tensor::Device::Accelerator { platform, .. } => platform,
                crate::tensor::Device::Host => "cpu",
            };
            return Err(MlaError::Platform { backend, call: "module load", message: "not a whole binary".into() });
        }
        // SAFETY: as far as its tables reach it is there, whoever made it; what its code does is its maker's promise.
        let handle = unsafe { api.module_load(binary)? };
        Ok(Module { api: api.clone(), handle, origin })
    }

    /// Where the binary came from.
    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: unloaded once, by the last of its functions.
        let _ = unsafe { self.api.module_unload(self.handle) };
    }
}

/// A kernel, with the dynamic shared memory of its launches.
pub(crate) struct Function {
    module: Arc<Module>,
    handle: Handle,
    shared_bytes: u32,
}

// SAFETY: as for `Module`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// The kernel of this name, allowed `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn new(module: &Arc<Module>, name: &str, shared_bytes: u32) -> Result<Function> {
        let lookup = CString::new(name).unwrap_or_default();
        // SAFETY: a live module.
        let found = unsafe { module.api.module_function(module.handle, &lookup, shared_bytes) };
        let handle = found.map_err(|e| match e {
            MlaError::Platform { backend, call, message } => {
                MlaError::Platform { backend, call, message: format!("{name}: {message}") }
            }
            other => other,
        })?;
        Ok(Function { module: module.clone(), handle, shared_bytes })
    }

    /// The device that the kernel is loaded on.
    pub(crate) fn api(&self) -> &dyn Api {
        &*self.module.api
    }
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Whether the kernel may start while the one before it on the stream still runs. It must then wait for that one
    /// itself (`griddepcontrol.wait`) before it reads what that one writes. Platforms without this ignore it.
    pub(crate) programmatic: bool,
    /// Adjacent blocks along the first dimension that run side by side and see each other's shared memory; 1 for none.
    pub(crate) cluster: u32,
}

/// Largest grid along y and z on every device; along x it is 2^31 - 1.
const MAX_GRID_YZ: u64 = 65_535;

impl Launch {
    /// A launch of `blocks` blocks in one dimension.
    ///
    /// # Errors
    /// [`MlaError::Overflow`] beyond the device's limits.
    pub(crate) fn row(function: &Function, blocks: u64, block: u32, programmatic: bool) -> Result<Launch> {
        let limit = function.api().max_blocks(block).min(i32::MAX as u64);
        if blocks > limit {
            return Err(MlaError::Overflow { param: "blocks of the grid", value: blocks.to_string(), limit });
        }
        Ok(Launch { grid: [blocks as u32, 1, 1], block, programmatic, cluster: 1 })
    }

    /// Enqueues `function` with `params`, each a pointer to the value of one kernel parameter, which is copied.
    ///
    /// # Errors
    /// [`MlaError::Overflow`] for a grid beyond the device's limits, [`MlaError::Platform`].
    ///
    /// # Safety
    /// `params` must be as many values, of the types, that the kernel declares, and what their addresses name must
    /// be the kernel's to read or write until it is done. `stream` must be alive and of the function's device.
    pub(crate) unsafe fn enqueue(&self, function: &Function, stream: Stream, params: &mut [*mut c_void]) -> Result<()> {
        for (param, value, limit) in [
            ("grid x", self.grid[0], i32::MAX as u64),
            ("grid y", self.grid[1], MAX_GRID_YZ),
            ("grid z", self.grid[2], MAX_GRID_YZ),
        ] {
            if u64::from(value) > limit {
                return Err(MlaError::Overflow { param, value: value.to_string(), limit });
            }
        }
        if self.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { function.api().launch(function.handle, self, function.shared_bytes, stream, params) }
    }
}
