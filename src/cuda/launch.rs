//! Launching kernels, with programmatic dependent launch.

use std::ffi::c_void;

use cudarc::driver::sys::{CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig};

use super::kernels::Function;
use super::stream::Stream;
use crate::error::{MlaError, Result};

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Whether the kernel may start while the one before it on the stream still runs. It must then wait for that one
    /// itself (`griddepcontrol.wait`) before it reads what that one writes.
    pub(crate) programmatic: bool,
}

/// Largest grid along y and z on every device; along x it is 2^31 - 1.
const MAX_GRID_YZ: u32 = 65_535;

impl Launch {
    /// Enqueues `function` with `params`, each a pointer to the value of one kernel parameter.
    ///
    /// # Errors
    /// [`MlaError::Overflow`] for a grid beyond the device's limits, [`MlaError::Platform`].
    ///
    /// # Safety
    /// `params` must be as many values, of the types, that the kernel declares, and what their addresses name must
    /// be the kernel's to read or write until it is done. `stream` must be alive and of the function's context.
    pub(crate) unsafe fn enqueue(&self, function: &Function, stream: Stream, params: &mut [*mut c_void]) -> Result<()> {
        for (param, value, limit) in [
            ("grid x", self.grid[0], i32::MAX as u32),
            ("grid y", self.grid[1], MAX_GRID_YZ),
            ("grid z", self.grid[2], MAX_GRID_YZ),
        ] {
            if value > limit {
                return Err(MlaError::Overflow { param, value: value.to_string(), limit: limit.into() });
            }
        }
        if self.grid.contains(&0) {
            return Ok(());
        }
        let mut value = CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = self.programmatic.into();
        let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut attributes = [CUlaunchAttribute { id, pad: [0; 4], value }];
        let config = CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: function.shared_bytes(),
            hStream: stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let context = function.context();
        let _current = context.enter()?;
        // SAFETY: the configuration and its attributes live through the call; the rest is the caller's promise.
        unsafe {
            context.driver().cuLaunchKernelEx(
                &raw const config,
                function.handle(),
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
    }
}
