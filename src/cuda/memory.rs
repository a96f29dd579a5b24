//! Memory: buffers of the device, and words of the host that kernels can write.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use cudarc::driver::sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE};

use super::context::Context;
use super::driver::DevicePtr;
use super::stream::Stream;
use crate::error::{MlaError, Result};

/// Device memory, freed when dropped. An empty buffer has address 0 and takes no memory.
pub struct DeviceBuffer {
    context: Arc<Context>,
    address: DevicePtr,
    bytes: usize,
}

impl DeviceBuffer {
    /// Memory whose contents are undefined.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn alloc(context: &Arc<Context>, bytes: usize) -> Result<DeviceBuffer> {
        let mut address = 0;
        if bytes > 0 {
            let _current = context.enter()?;
            // SAFETY: a pointer to a local; the context is current.
            unsafe { context.driver().cuMemAlloc_v2(&raw mut address, bytes)? };
        }
        Ok(DeviceBuffer { context: context.clone(), address, bytes })
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies from the host to byte `offset`, after work of the legacy stream and of streams that wait for it.
    ///
    /// # Errors
    /// [`MlaError::Platform`], [`MlaError::StrideOverrun`] past the end.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> Result<()> {
        let to = self.range("buffer", offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let _current = self.context.enter()?;
        let driver = self.context.driver();
        // SAFETY: the range is inside the buffer, and `from` is as long. The copy of pageable memory may return before
        // the last bytes are in place; waiting makes it safe for streams that do not order themselves after it.
        unsafe {
            driver.cuMemcpyHtoD_v2(to, from.as_ptr().cast(), from.len())?;
            driver.cuStreamSynchronize(Stream::default().raw())
        }
    }

    /// Copies to the host from byte `offset`, after all work of the context.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let from = self.range("buffer", offset, to.len())?;
        if to.is_empty() {
            return Ok(());
        }
        let _current = self.context.enter()?;
        let driver = self.context.driver();
        // SAFETY: the range is inside the buffer, and `to` is as long.
        unsafe {
            driver.cuCtxSynchronize()?;
            driver.cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from, to.len())
        }
    }

    /// Repeats the first `tile` bytes over the rest of the buffer, and waits.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn repeat(&mut self, tile: usize) -> Result<()> {
        self.range("tile", 0, tile)?;
        let _current = self.context.enter()?;
        let (driver, stream) = (self.context.driver(), Stream::default().raw());
        // Doubling what is there takes a few copies, each at the speed of the memory.
        let mut filled = tile;
        while filled < self.bytes && filled > 0 {
            let count = filled.min(self.bytes - filled);
            // SAFETY: [0, filled) holds data, [filled, filled + count) is inside the buffer, and they do not overlap.
            unsafe { driver.cuMemcpyDtoDAsync_v2(self.address + filled as u64, self.address, count, stream)? };
            filled += count;
        }
        // SAFETY: the legacy stream always exists.
        unsafe { driver.cuStreamSynchronize(stream) }
    }

    /// Enqueues setting every byte.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn fill(&self, value: u8, stream: Stream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        // SAFETY: the whole buffer.
        unsafe { self.context.driver().cuMemsetD8Async(self.address, value, self.bytes, stream.raw()) }
    }

    /// Enqueues setting `count` words from word `first`.
    ///
    /// # Errors
    /// [`MlaError::Platform`], [`MlaError::StrideOverrun`] past the end.
    pub(crate) fn fill_words(&self, first: usize, count: usize, value: u32, stream: Stream) -> Result<()> {
        let address = self.range("buffer", first * 4, count * 4)?;
        if count == 0 {
            return Ok(());
        }
        let _current = self.context.enter()?;
        // SAFETY: the range is inside the buffer.
        unsafe { self.context.driver().cuMemsetD32Async(address, value, count, stream.raw()) }
    }

    fn range(&self, param: &'static str, offset: usize, bytes: usize) -> Result<DevicePtr> {
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

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.address != 0 {
            let current = self.context.enter();
            // SAFETY: the address came from cuMemAlloc and is freed once. The driver waits for work that uses it.
            let _ = current.and_then(|_current| unsafe { self.context.driver().cuMemFree_v2(self.address) });
        }
    }
}

/// One i32 of pinned host memory that kernels reach by an address of their own: the host reads it without a copy and
/// without waiting.
pub(crate) struct HostWord {
    context: Arc<Context>,
    pointer: *mut c_void,
    address: DevicePtr,
}

// SAFETY: the word is only reached through atomics; the allocation may be freed from any thread.
unsafe impl Send for HostWord {}
// SAFETY: as above.
unsafe impl Sync for HostWord {}

impl HostWord {
    pub(crate) fn new(context: &Arc<Context>, value: i32) -> Result<HostWord> {
        let _current = context.enter()?;
        let driver = context.driver();
        let mut word = HostWord { context: context.clone(), pointer: std::ptr::null_mut(), address: 0 };
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: pointers to fields of a local; the second call gets the pointer that the first one made.
        unsafe {
            driver.cuMemHostAlloc(&raw mut word.pointer, size_of::<AtomicI32>(), flags)?;
            driver.cuMemHostGetDevicePointer_v2(&raw mut word.address, word.pointer, 0)?;
        }
        word.atomic().store(value, Ordering::SeqCst);
        Ok(word)
    }

    /// The word's address for kernels.
    pub(crate) fn address(&self) -> DevicePtr {
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
        if !self.pointer.is_null() {
            let current = self.context.enter();
            // SAFETY: the pointer came from cuMemHostAlloc and is freed once; the driver waits for work that uses it.
            let _ = current.and_then(|_current| unsafe { self.context.driver().cuMemFreeHost(self.pointer) });
        }
    }
}
