//! Memory of the CPU backend: aligned allocations of this process.

use crate::error::{MlaError, Result};
use crate::tensor::{Device, TensorView, TensorViewMut};
use crate::workspace::{WORKSPACE_ALIGN, Workspace};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; WORKSPACE_ALIGN]);

/// Memory that [`CpuBackend`](super::CpuBackend) allocated, aligned for every element type and for workspaces.
pub struct CpuBuffer {
    lines: Vec<Line>,
    bytes: usize,
}

impl CpuBuffer {
    /// `bytes` zero bytes.
    ///
    /// # Errors
    /// [`MlaError::Platform`] where there is no such memory.
    pub fn new(bytes: usize) -> Result<Self> {
        let count = bytes.div_ceil(WORKSPACE_ALIGN);
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|e| MlaError::Platform {
            backend: "cpu",
            call: "alloc",
            message: format!("{bytes} bytes: {e}"),
        })?;
        lines.resize(count, Line([0; WORKSPACE_ALIGN]));
        Ok(CpuBuffer { lines, bytes })
    }

    /// Its contents.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: the vector holds at least `bytes` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.bytes) }
    }

    /// Its contents, for writing.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the vector holds at least `bytes` initialised bytes, exclusively borrowed here.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.bytes) }
    }

    pub(crate) fn view<'a>(&'a self, param: &'static str, like: &TensorView<'_>) -> Result<TensorView<'a>> {
        let (address, bytes) = (self.lines.as_ptr() as u64, self.bytes as u64);
        // SAFETY: the buffer is readable for `bytes` bytes as long as it is borrowed.
        unsafe {
            TensorView::from_raw_parts(param, address, bytes, like.dtype(), like.shape(), like.strides(), Device::Host)
        }
    }

    pub(crate) fn view_mut<'a>(&'a mut self, param: &'static str, like: &TensorView<'_>) -> Result<TensorViewMut<'a>> {
        let (address, bytes) = (self.lines.as_mut_ptr() as u64, self.bytes as u64);
        let (dtype, shape, strides) = (like.dtype(), like.shape(), like.strides());
        // SAFETY: the buffer is this view's alone, for `bytes` bytes, as long as it is exclusively borrowed.
        unsafe { TensorViewMut::from_raw_parts(param, address, bytes, dtype, shape, strides, Device::Host) }
    }

    pub(crate) fn workspace(&mut self) -> Workspace<'_> {
        Workspace::from_slice(self.as_bytes_mut())
    }
}
