//! Streams that callers lend, streams of their own, events.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::device::Accelerator;
use super::table::Handle;
use crate::error::Result;

/// A stream to enqueue on: a `hipStream_t` (or the like) that the caller owns. The default is the default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Stream(usize);

impl Stream {
    /// A stream by its handle; null is the default stream.
    ///
    /// # Safety
    /// The stream must be of the backend's device, and alive whenever this value is passed to a call.
    pub unsafe fn from_raw(handle: *mut c_void) -> Stream {
        Stream(handle as usize)
    }

    pub(super) fn raw(self) -> Handle {
        self.0 as Handle
    }
}

/// A stream of its own, destroyed when dropped.
pub struct OwnedStream {
    device: Arc<Accelerator>,
    stream: Stream,
}

impl OwnedStream {
    pub(super) fn new(device: &Arc<Accelerator>) -> Result<OwnedStream> {
        let _current = device.enter()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: a pointer to a local; the device is current.
        unsafe { device.driver.stream_create(&raw mut handle)? };
        Ok(OwnedStream { device: device.clone(), stream: Stream(handle as usize) })
    }

    /// The stream, to pass to calls while this value lives.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}

impl Drop for OwnedStream {
    fn drop(&mut self) {
        let current = self.device.enter();
        // SAFETY: made by `new`, destroyed once, after its work.
        let _ = current.and_then(|_current| unsafe {
            self.device.driver.stream_synchronize(self.stream.raw())?;
            self.device.driver.stream_destroy(self.stream.raw())
        });
    }
}

/// A point in a stream whose time can be read.
pub(super) struct Event {
    device: Arc<Accelerator>,
    handle: Handle,
}

impl Event {
    pub(super) fn new(device: &Arc<Accelerator>) -> Result<Event> {
        let _current = device.enter()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: a pointer to a local; the device is current.
        unsafe { device.driver.event_create(&raw mut handle)? };
        Ok(Event { device: device.clone(), handle })
    }

    pub(super) fn record(&self, stream: Stream) -> Result<()> {
        let _current = self.device.enter()?;
        // SAFETY: the event lives as long as `self`, the stream by the promise of `Stream::from_raw`.
        unsafe { self.device.driver.event_record(self.handle, stream.raw()) }
    }

    /// Waits for this event, and tells how long after `start` it came.
    pub(super) fn since(&self, start: &Event) -> Result<Duration> {
        let _current = self.device.enter()?;
        let mut milliseconds = 0f32;
        // SAFETY: both events live, and were recorded before this call.
        unsafe {
            self.device.driver.event_synchronize(self.handle)?;
            self.device.driver.event_elapsed(&raw mut milliseconds, start.handle, self.handle)?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let current = self.device.enter();
        // SAFETY: destroyed once; the driver waits for what it needs.
        let _ = current.and_then(|_current| unsafe { self.device.driver.event_destroy(self.handle) });
    }
}
