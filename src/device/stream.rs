//! Streams that callers lend, streams of their own, graphs, events.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::{Api, Handle};
use crate::error::Result;

/// A stream to enqueue on: a `CUstream`, `hipStream_t` or the like that the caller owns. The default is the device's
/// default stream (CUDA's legacy one).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Stream(usize);

impl Stream {
    /// A stream by its handle; null is the default stream.
    ///
    /// # Safety
    /// The stream must be of the context or device that the backend uses, and alive whenever this value is passed to a
    /// call.
    pub unsafe fn from_raw(handle: *mut c_void) -> Stream {
        Stream(handle as usize)
    }

    pub(crate) fn raw(self) -> Handle {
        self.0 as Handle
    }
}

/// A stream of its own, destroyed when dropped. For callers that have none, and for graph capture, which CUDA's legacy
/// default stream does not allow.
pub struct OwnedStream {
    api: Arc<dyn Api>,
    stream: Stream,
}

impl OwnedStream {
    pub(crate) fn new(api: &Arc<dyn Api>) -> Result<OwnedStream> {
        // SAFETY: making a stream needs nothing.
        let handle = unsafe { api.stream_create()? };
        Ok(OwnedStream { api: api.clone(), stream: Stream(handle as usize) })
    }

    /// The stream, to pass to calls while this value lives: the compiler does not see to that, and a driver that is handed
    /// a stream that is gone may do anything, as with [`Stream::from_raw`].
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Waits for all work enqueued so far.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { self.api.stream_synchronize(self.stream) }
    }

    /// Records the work that `work` enqueues on this stream into a graph instead of running it. CUDA only; elsewhere
    /// callers capture with the platform's own functions.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform), and those of `work`.
    pub fn capture(&self, work: impl FnOnce(Stream) -> Result<()>) -> Result<Graph> {
        // SAFETY: the stream lives as long as `self`.
        unsafe { self.api.capture_begin(self.stream)? };
        let worked = work(self.stream);
        // SAFETY: the capture began above and must end, whatever `work` returned.
        let ended = unsafe { self.api.capture_end(self.stream, worked.is_err()) };
        let graph = ended.map(|(graph, exec)| Graph { api: self.api.clone(), graph, exec });
        worked?;
        graph
    }
}

impl Drop for OwnedStream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { self.api.stream_destroy(self.stream) };
    }
}

/// A captured sequence of work. Whatever memory it names must outlive its replays.
pub struct Graph {
    api: Arc<dyn Api>,
    graph: Handle,
    exec: Handle,
}

// SAFETY: drivers allow a graph to be used from any thread, from one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Enqueues the whole sequence.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    ///
    /// # Safety
    /// All memory that the captured calls named must still be theirs.
    pub unsafe fn launch(&mut self, stream: Stream) -> Result<()> {
        // SAFETY: the caller's promise; the executable lives as long as `self`.
        unsafe { self.api.graph_launch(self.exec, stream) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both were made by a capture and are destroyed once.
        let _ = unsafe { self.api.graph_destroy(self.graph, self.exec) };
    }
}

/// A point in a stream whose time can be read.
pub(crate) struct Event {
    api: Arc<dyn Api>,
    handle: Handle,
}

impl Event {
    pub(crate) fn new(api: &Arc<dyn Api>) -> Result<Event> {
        // SAFETY: making an event needs nothing.
        let handle = unsafe { api.event_create()? };
        Ok(Event { api: api.clone(), handle })
    }

    pub(crate) fn record(&self, stream: Stream) -> Result<()> {
        // SAFETY: the event lives as long as `self`, the stream by the promise of `Stream::from_raw`.
        unsafe { self.api.event_record(self.handle, stream) }
    }

    /// Waits for this event, and tells how long after `start` it came.
    pub(crate) fn since(&self, start: &Event) -> Result<Duration> {
        // SAFETY: both events live, and were recorded before this call.
        unsafe { self.api.event_elapsed(start.handle, self.handle) }
    }

    /// Time between events around `work` on a stream.
    pub(crate) fn around(api: &Arc<dyn Api>, stream: Stream, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        let (start, end) = (Event::new(api)?, Event::new(api)?);
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        end.since(&start)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver waits for what it needs.
        let _ = unsafe { self.api.event_destroy(self.handle) };
    }
}
