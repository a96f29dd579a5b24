//! Memory: buffers of the device, and a word of the host that kernels can write.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use super::{Api, Stream};
use crate::backend::BackendBuffer;
use crate::error::{MlaError, Result};
use crate::tensor::{Device, TensorView, TensorViewMut};
use crate::workspace::Workspace;

/// Device memory, freed when dropped. An empty buffer has address 0 and takes no memory.
pub struct DeviceBuffer {
    api: Arc<dyn Api>,
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    /// Memory whose contents are undefined.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn alloc(api: &Arc<dyn Api>, bytes: usize) -> Result<DeviceBuffer> {
        // SAFETY: allocating needs nothing.
        let address = if bytes > 0 { unsafe { api.alloc(bytes)? } } else { 0 };
        Ok(DeviceBuffer { api: api.clone(), address, bytes })
    }

    /// Memory of `bytes` bytes that repeats `tile` to its end.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn repeated(api: &Arc<dyn Api>, tile: &[u8], bytes: usize) -> Result<DeviceBuffer> {
        let tile = &tile[..tile.len().min(bytes)];
        let mut buffer = Self::alloc(api, bytes)?;
        buffer.write(0, tile)?;
        buffer.repeat(tile.len())?;
        Ok(buffer)
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies from the host to byte `offset`, and waits.
    ///
    /// # Errors
    /// [`MlaError::Platform`], [`MlaError::StrideOverrun`] past the end.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<()> {
        let to = self.range("buffer", offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is inside the buffer, and `from` is as long.
        unsafe { self.api.copy_to_device(to, from.as_ptr().cast(), from.len()) }
    }

    /// Copies to the host from byte `offset`, after all work of the device.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let from = self.range("buffer", offset, to.len())?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is inside the buffer, and `to` is as long.
        unsafe { self.api.copy_to_host(to.as_mut_ptr().cast(), from, to.len()) }
    }

    /// Repeats the first `tile` bytes over the rest of the buffer, and waits.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn repeat(&mut self, tile: usize) -> Result<()> {
        self.range("tile", 0, tile)?;
        let stream = Stream::default();
        // Doubling what is there takes a few copies, each at the speed of the memory.
        let mut filled = tile;
        while filled < self.bytes && filled > 0 {
            let count = filled.min(self.bytes - filled);
            // SAFETY: [0, filled) holds data, [filled, filled + count) is inside the buffer, and they do not overlap.
            unsafe { self.api.copy_on_device(self.address + filled as u64, self.address, count, stream)? };
            filled += count;
        }
        // SAFETY: the default stream always exists.
        unsafe { self.api.stream_synchronize(stream) }
    }

    /// Enqueues setting every byte.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn fill(&self, value: u8, stream: Stream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        // SAFETY: the whole buffer.
        unsafe { self.api.fill_bytes(self.address, value, self.bytes, stream) }
    }

    /// Enqueues setting `count` words from byte `offset`.
    ///
    /// # Errors
    /// [`MlaError::Platform`], [`MlaError::StrideOverrun`] past the end.
    pub(crate) fn fill_words(&self, offset: usize, count: usize, value: i32, stream: Stream) -> Result<()> {
        let address = self.range("buffer", offset, count.saturating_mul(4))?;
        if count == 0 {
            return Ok(());
        }
        // SAFETY: the range is inside the buffer.
        unsafe { self.api.fill_words(address, value, count, stream) }
    }

    fn range(&self, param: &'static str, offset: usize, bytes: usize) -> Result<u64> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.address + offset as u64),
            _ => Err(MlaError::StrideOverrun {
                param,
                value: (offset as u64).saturating_add(bytes as u64),
                limit: self.bytes as u64,
            }),
        }
    }
}

impl BackendBuffer for DeviceBuffer {
    fn view(&self, param: &'static str, like: &TensorView<'_>, _: Device) -> Result<TensorView<'_>> {
        let (bytes, device) = (self.bytes as u64, self.api.device());
        // SAFETY: the buffer's memory, borrowed by the view; freeing it waits for enqueued work.
        unsafe {
            TensorView::from_raw_parts(param, self.address, bytes, like.dtype(), like.shape(), like.strides(), device)
        }
    }

    fn view_mut(&mut self, param: &'static str, like: &TensorView<'_>, _: Device) -> Result<TensorViewMut<'_>> {
        let (at, bytes, device) = (self.address, self.bytes as u64, self.api.device());
        // SAFETY: as in `view`, and the borrow is exclusive.
        unsafe { TensorViewMut::from_raw_parts(param, at, bytes, like.dtype(), like.shape(), like.strides(), device) }
    }

    fn workspace(&mut self, _: Device) -> Workspace<'_> {
        // SAFETY: the buffer's memory, borrowed exclusively; freeing it waits for enqueued work.
        unsafe { Workspace::from_raw_parts(self.address, self.bytes, self.api.device()) }
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: the driver's own address, freed once. The driver waits for work that uses it.
            let _ = unsafe { self.api.free(self.address) };
        }
    }
}

/// One i32 of host memory that kernels reach by an address of their own: the host reads it without a copy and without
/// waiting.
pub(crate) struct HostWord {
    api: Arc<dyn Api>,
    pointer: *mut c_void,
    address: u64,
}

// SAFETY: the word is only reached through atomics; the allocation may be freed from any thread.
unsafe impl Send for HostWord {}
// SAFETY: as above.
unsafe impl Sync for HostWord {}

impl HostWord {
    pub(crate) fn new(api: &Arc<dyn Api>, value: i32) -> Result<HostWord> {
        // SAFETY: allocating needs nothing.
        let (pointer, address) = unsafe { api.host_alloc(size_of::<AtomicI32>())? };
        let word = HostWord { api: api.clone(), pointer, address };
        word.atomic().store(value, Ordering::SeqCst);
        Ok(word)
    }

    /// The word's address for kernels.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The word. What a kernel wrote is seen at the latest once its stream was waited for.
    pub(crate) fn atomic(&self) -> &AtomicI32 {
        // SAFETY: page-aligned memory of at least four bytes that lives as long as `self`; the host only reaches it
        // here.
        unsafe { AtomicI32::from_ptr(self.pointer.cast()) }
    }
}

impl Drop for HostWord {
    fn drop(&mut self) {
        // SAFETY: the driver's own pointer, freed once.
        let _ = unsafe { self.api.host_free(self.pointer) };
    }
}
