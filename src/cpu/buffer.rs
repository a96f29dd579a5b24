//! Memory of the CPU backend: aligned allocations of this process.

use crate::backend::BackendBuffer;
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

    /// `bytes` bytes that repeat `tile` to their end.
    pub(crate) fn repeated(tile: &[u8], bytes: usize) -> Result<Self> {
        let mut buffer = CpuBuffer::new(bytes)?;
        for piece in buffer.as_bytes_mut().chunks_mut(tile.len().max(1)) {
            let count = piece.len().min(tile.len());
            piece[..count].copy_from_slice(&tile[..count]);
        }
        Ok(buffer)
    }

    /// Copies its first bytes.
    pub(crate) fn read(&self, to: &mut [u8]) -> Result<()> {
        let from = self.as_bytes();
        let Some(from) = from.get(..to.len()) else {
            let (value, limit) = (to.len() as u64, from.len() as u64);
            return Err(MlaError::StrideOverrun { param: "download", value, limit });
        };
        to.copy_from_slice(from);
        Ok(())
    }
}

impl BackendBuffer for CpuBuffer {
    fn view(&self, param: &'static str, like: &TensorView<'_>, _: Device) -> Result<TensorView<'_>> {
        let (address, bytes) = (self.lines.as_ptr() as u64, self.bytes as u64);
        // SAFETY: the buffer is readable for `bytes` bytes as long as it is borrowed.
        unsafe {
            TensorView::from_raw_parts(param, address, bytes, like.dtype(), like.shape(), like.strides(), Device::Host)
        }
    }

    fn view_mut(&mut self, param: &'static str, like: &TensorView<'_>, _: Device) -> Result<TensorViewMut<'_>> {
        let (address, bytes) = (self.lines.as_mut_ptr() as u64, self.bytes as u64);
        let (dtype, shape, strides) = (like.dtype(), like.shape(), like.strides());
        // SAFETY: the buffer is this view's alone, for `bytes` bytes, as long as it is exclusively borrowed.
        unsafe { TensorViewMut::from_raw_parts(param, address, bytes, dtype, shape, strides, Device::Host) }
    }

    fn workspace(&mut self, _: Device) -> Workspace<'_> {
        Workspace::from_slice(self.as_bytes_mut())
    }
}
