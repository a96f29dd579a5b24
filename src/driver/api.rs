//! What [`crate::device`] asks of a platform, by a vendor's table.

use std::ffi::{CStr, c_void};
use std::time::Duration;

use super::device::Accelerator;
use crate::device::{Api, Handle, Launch, Stream};
use crate::error::Result;
use crate::tensor::Device;

// SAFETY (of every block below): the device is current while the guard is alive; pointers handed out are to locals;
// addresses and handles are the caller's promise.
impl Api for Accelerator {
    fn device(&self) -> Device {
        Device::Accelerator { platform: self.driver.vendor.platform, ordinal: self.facts.ordinal }
    }
    fn max_blocks(&self, threads: u32) -> u64 {
        self.driver.vendor.max_grid_threads / u64::from(threads.max(1))
    }

    unsafe fn alloc(&self, bytes: usize) -> Result<u64> {
        let _current = self.enter()?;
        let mut address = 0;
        // SAFETY: as said above.
        unsafe { self.driver.alloc(&raw mut address, bytes)? };
        Ok(address)
    }
    unsafe fn free(&self, address: u64) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.free(address) }
    }
    unsafe fn host_alloc(&self, bytes: usize) -> Result<(*mut c_void, u64)> {
        let _current = self.enter()?;
        let (mut pointer, mut address) = (std::ptr::null_mut(), 0);
        // SAFETY: as said above. What was allocated is freed where its address cannot be had.
        unsafe {
            self.driver.host_alloc(&raw mut pointer, bytes, self.driver.vendor.host_alloc_flags)?;
            if let Err(e) = self.driver.host_address(&raw mut address, pointer, 0) {
                let _ = self.driver.host_free(pointer);
                return Err(e);
            }
        }
        Ok((pointer, address))
    }
    unsafe fn host_free(&self, pointer: *mut c_void) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above; not every driver waits for work that uses it.
        unsafe {
            self.driver.synchronize()?;
            self.driver.host_free(pointer)
        }
    }
    unsafe fn copy_to_device(&self, to: u64, from: *const c_void, bytes: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above. Waiting makes the bytes visible to streams that do not order themselves after the copy.
        unsafe {
            self.driver.copy_to_device(to, from, bytes)?;
            self.driver.synchronize()
        }
    }
    unsafe fn copy_to_host(&self, to: *mut c_void, from: u64, bytes: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe {
            self.driver.synchronize()?;
            self.driver.copy_to_host(to, from, bytes)
        }
    }
    unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.copy_on_device(to, from, bytes, stream.raw()) }
    }
    unsafe fn fill_bytes(&self, address: u64, value: u8, count: usize, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.fill_bytes(address, value, count, stream.raw()) }
    }
    unsafe fn fill_words(&self, address: u64, value: i32, count: usize, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.fill_words(address, value, count, stream.raw()) }
    }

    unsafe fn stream_create(&self) -> Result<Handle> {
        let _current = self.enter()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: as said above.
        unsafe { self.driver.stream_create(&raw mut stream, 0)? };
        Ok(stream)
    }
    unsafe fn stream_destroy(&self, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above; not every driver finishes the work first.
        unsafe {
            self.driver.stream_synchronize(stream.raw())?;
            self.driver.stream_destroy(stream.raw())
        }
    }
    unsafe fn stream_synchronize(&self, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.stream_synchronize(stream.raw()) }
    }

    unsafe fn event_create(&self) -> Result<Handle> {
        let _current = self.enter()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: as said above.
        unsafe { self.driver.event_create(&raw mut event, 0)? };
        Ok(event)
    }
    unsafe fn event_destroy(&self, event: Handle) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.event_destroy(event) }
    }
    unsafe fn event_record(&self, event: Handle, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.event_record(event, stream.raw()) }
    }
    unsafe fn event_elapsed(&self, start: Handle, end: Handle) -> Result<Duration> {
        let _current = self.enter()?;
        let mut milliseconds = 0f32;
        // SAFETY: as said above.
        unsafe {
            self.driver.event_synchronize(end)?;
            self.driver.event_elapsed(&raw mut milliseconds, start, end)?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }

    fn is_binary(&self, bytes: &[u8]) -> bool {
        let known = self.driver.vendor.magics;
        known.is_empty() || known.iter().any(|magic| bytes.starts_with(magic))
    }
    unsafe fn module_load(&self, binary: &[u8]) -> Result<Handle> {
        let _current = self.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: as said above.
        unsafe { self.driver.module_load(&raw mut module, binary.as_ptr().cast())? };
        Ok(module)
    }
    unsafe fn module_unload(&self, module: Handle) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver.module_unload(module) }
    }
    unsafe fn module_function(&self, module: Handle, name: &CStr, _shared_bytes: u32) -> Result<Handle> {
        let _current = self.enter()?;
        let mut function = std::ptr::null_mut();
        // SAFETY: as said above. These platforms let every kernel have what the device has.
        unsafe { self.driver.module_function(&raw mut function, module, name.as_ptr())? };
        Ok(function)
    }
    unsafe fn launch(
        &self,
        function: Handle,
        launch: &Launch,
        shared_bytes: u32,
        stream: Stream,
        params: &mut [*mut c_void],
    ) -> Result<()> {
        let ([x, y, z], block) = (launch.grid, launch.block);
        let _current = self.enter()?;
        let (list, extra) = (params.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the list lives through the call; the rest is the caller's promise.
        unsafe { self.driver.launch(function, x, y, z, block, 1, 1, shared_bytes, stream.raw(), list, extra) }
    }
}
