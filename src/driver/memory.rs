//! Memory: buffers of the device, and a word of the host that kernels can write.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use super::device::Accelerator;
use super::stream::Stream;
use crate::error::{MlaError, Result};

/// Device memory, freed when dropped. An empty buffer has address 0 and takes no memory.
pub struct DriverBuffer {
    device: Arc<Accelerator>,
    address: u64,
    bytes: usize,
}

impl DriverBuffer {
    /// Memory whose contents are undefined.
    pub(super) fn alloc(device: &Arc<Accelerator>, bytes: usize) -> Result<DriverBuffer> {
        let mut address = 0;
        if bytes > 0 {
            let _current = device.enter()?;
            // SAFETY: a pointer to a local; the device is current.
            unsafe { device.driver.alloc(&raw mut address, bytes)? };
        }
        Ok(DriverBuffer { device: device.clone(), address, bytes })
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }
    /// The size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies from the host to the start of the buffer, and waits.
    ///
    /// # Errors
    /// [`MlaError::Platform`], [`MlaError::StrideOverrun`] past the end.
    pub fn write(&mut self, from: &[u8]) -> Result<()> {
        let to = self.range("buffer", 0, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: the range is inside the buffer, and `from` is as long. Waiting makes the bytes visible to streams that
        // do not order themselves after the copy.
        unsafe {
            self.device.driver.copy_to_device(to, from.as_ptr().cast(), from.len())?;
            self.device.driver.synchronize()
        }
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
        let _current = self.device.enter()?;
        // SAFETY: the range is inside the buffer, and `to` is as long.
        unsafe {
            self.device.driver.synchronize()?;
            self.device.driver.copy_to_host(to.as_mut_ptr().cast(), from, to.len())
        }
    }

    /// Repeats the first `tile` bytes over the rest of the buffer, and waits.
    pub(super) fn repeat(&mut self, tile: usize) -> Result<()> {
        self.range("tile", 0, tile)?;
        let _current = self.device.enter()?;
        let (driver, stream) = (self.device.driver, Stream::default().raw());
        // Doubling what is there takes a few copies, each at the speed of the memory.
        let mut filled = tile;
        while filled < self.bytes && filled > 0 {
            let count = filled.min(self.bytes - filled);
            // SAFETY: [0, filled) holds data, [filled, filled + count) is inside the buffer, and they do not overlap.
            unsafe { driver.copy_on_device(self.address + filled as u64, self.address, count, stream)? };
            filled += count;
        }
        // SAFETY: the default stream always exists.
        unsafe { driver.stream_synchronize(stream) }
    }

    /// Enqueues setting every byte.
    pub(super) fn fill(&self, value: u8, stream: Stream) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: the whole buffer.
        unsafe { self.device.driver.fill_bytes(self.address, value, self.bytes, stream.raw()) }
    }

    /// Enqueues setting `count` words from byte `offset`.
    pub(super) fn fill_words(&self, offset: usize, count: usize, value: c_int, stream: Stream) -> Result<()> {
        let address = self.range("buffer", offset, count.saturating_mul(4))?;
        if count == 0 {
            return Ok(());
        }
        let _current = self.device.enter()?;
        // SAFETY: the range is inside the buffer.
        unsafe { self.device.driver.fill_words(address, value, count, stream.raw()) }
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

impl Drop for DriverBuffer {
    fn drop(&mut self) {
        if self.address != 0 {
            let current = self.device.enter();
            // SAFETY: the driver's own address, freed once. The driver waits for work that uses it.
            let _ = current.and_then(|_current| unsafe { self.device.driver.free(self.address) });
        }
    }
}

/// One i32 of host memory that kernels reach by an address of their own: the host reads it without a copy and without
/// waiting.
pub(super) struct HostWord {
    device: Arc<Accelerator>,
    pointer: *mut c_void,
    address: u64,
}

// SAFETY: the word is only reached through atomics; the allocation may be freed from any thread.
unsafe impl Send for HostWord {}
// SAFETY: as above.
unsafe impl Sync for HostWord {}

impl HostWord {
    pub(super) fn new(device: &Arc<Accelerator>, value: i32) -> Result<HostWord> {
        let _current = device.enter()?;
        let mut word = HostWord { device: device.clone(), pointer: std::ptr::null_mut(), address: 0 };
        let flags = device.driver.vendor.host_alloc_flags;
        // SAFETY: pointers to fields of a local; the second call gets the pointer that the first one made.
        unsafe {
            device.driver.host_alloc(&raw mut word.pointer, size_of::<AtomicI32>(), flags)?;
            device.driver.host_address(&raw mut word.address, word.pointer, 0)?;
        }
        word.atomic().store(value, Ordering::SeqCst);
        Ok(word)
    }

    /// The word's address for kernels.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// The word. What a kernel wrote is seen at the latest once its stream was waited for.
    pub(super) fn atomic(&self) -> &AtomicI32 {
        // SAFETY: page-aligned memory of at least four bytes that lives as long as `self`; the host only reaches it
        // here.
        unsafe { AtomicI32::from_ptr(self.pointer.cast()) }
    }
}

impl Drop for HostWord {
    fn drop(&mut self) {
        if !self.pointer.is_null() {
            let current = self.device.enter();
            // SAFETY: the driver's own pointer, freed once, after the work that uses it.
            let _ = current.and_then(|_current| unsafe {
                self.device.driver.synchronize()?;
                self.device.driver.host_free(self.pointer)
            });
        }
    }
}
