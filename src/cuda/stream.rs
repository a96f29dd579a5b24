//! Streams that callers lend, events, and graphs.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{CUevent, CUgraph, CUgraphExec, CUstream, CUstreamCaptureMode};

use super::context::Context;
use crate::error::Result;

/// A stream to enqueue on: a `CUstream` that the caller owns. The default is the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Stream(usize);

impl Stream {
    /// A stream by its handle (`CUstream`, `cudaStream_t`); null is the legacy default stream.
    ///
    /// # Safety
    /// The stream must be of the context that the backend uses, and alive whenever this value is passed to a call.
    pub unsafe fn from_raw(handle: *mut c_void) -> Stream {
        Stream(handle as usize)
    }

    pub(crate) fn raw(self) -> CUstream {
        self.0 as CUstream
    }
}

/// A stream of its own, destroyed when dropped. For callers that have none, and for graph capture, which the legacy
/// default stream does not allow.
pub struct OwnedStream {
    context: Arc<Context>,
    stream: Stream,
}

impl OwnedStream {
    pub(crate) fn new(context: &Arc<Context>) -> Result<OwnedStream> {
        let _current = context.enter()?;
        let mut handle: CUstream = std::ptr::null_mut();
        // SAFETY: a pointer to a local; the context is current. Flag 0: work of the legacy stream is waited for.
        unsafe { context.driver().cuStreamCreate(&raw mut handle, 0)? };
        Ok(OwnedStream { context: context.clone(), stream: Stream(handle as usize) })
    }

    /// The stream, to pass to calls while this value lives.
    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Waits for all work enqueued so far.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { self.context.driver().cuStreamSynchronize(self.stream.raw()) }
    }

    /// Records the work that `work` enqueues on this stream into a graph instead of running it.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform), and those of `work`.
    pub fn capture(&self, work: impl FnOnce(Stream) -> Result<()>) -> Result<Graph> {
        let _current = self.context.enter()?;
        let driver = self.context.driver();
        // Other threads may allocate meanwhile; what is captured here does not.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        unsafe { driver.cuStreamBeginCapture_v2(self.stream.raw(), mode)? };
        let worked = work(self.stream);
        let mut graph =
            Graph { context: self.context.clone(), graph: std::ptr::null_mut(), exec: std::ptr::null_mut() };
        // SAFETY: the capture began above and must end, whatever `work` returned.
        let ended = unsafe { driver.cuStreamEndCapture(self.stream.raw(), &raw mut graph.graph) };
        worked?;
        ended?;
        // SAFETY: the graph was just made.
        unsafe { driver.cuGraphInstantiateWithFlags(&raw mut graph.exec, graph.graph, 0)? };
        Ok(graph)
    }
}

impl Drop for OwnedStream {
    fn drop(&mut self) {
        let current = self.context.enter();
        // SAFETY: destroyed once; the driver finishes enqueued work first.
        let _ = current.and_then(|_current| unsafe { self.context.driver().cuStreamDestroy_v2(self.stream.raw()) });
    }
}

/// A captured sequence of work. Whatever memory it names must outlive its replays.
pub struct Graph {
    context: Arc<Context>,
    graph: CUgraph,
    exec: CUgraphExec,
}

// SAFETY: the driver allows a graph to be used from any thread, from one at a time.
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
        let _current = self.context.enter()?;
        // SAFETY: the caller's promise; the executable lives as long as `self`.
        unsafe { self.context.driver().cuGraphLaunch(self.exec, stream.raw()) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_current) = self.context.enter() else { return };
        let driver = self.context.driver();
        // SAFETY: both were made by `capture`, where not null, and are destroyed once.
        unsafe {
            if !self.exec.is_null() {
                let _ = driver.cuGraphExecDestroy(self.exec);
            }
            if !self.graph.is_null() {
                let _ = driver.cuGraphDestroy(self.graph);
            }
        }
    }
}

/// A point in a stream whose time can be read.
pub(crate) struct Event {
    context: Arc<Context>,
    handle: CUevent,
}

impl Event {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Event> {
        let _current = context.enter()?;
        let mut handle: CUevent = std::ptr::null_mut();
        // SAFETY: a pointer to a local; the context is current. Flag 0: with timing.
        unsafe { context.driver().cuEventCreate(&raw mut handle, 0)? };
        Ok(Event { context: context.clone(), handle })
    }

    pub(crate) fn record(&self, stream: Stream) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the event lives as long as `self`, the stream by the promise of `Stream::from_raw`.
        unsafe { self.context.driver().cuEventRecord(self.handle, stream.raw()) }
    }

    /// Waits for this event, and tells how long after `start` it came.
    pub(crate) fn since(&self, start: &Event) -> Result<Duration> {
        let _current = self.context.enter()?;
        let driver = self.context.driver();
        let mut milliseconds = 0f32;
        // SAFETY: both events live, and were recorded before this call.
        unsafe {
            driver.cuEventSynchronize(self.handle)?;
            driver.cuEventElapsedTime(&raw mut milliseconds, start.handle, self.handle)?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let current = self.context.enter();
        // SAFETY: destroyed once; the driver waits for what it needs.
        let _ = current.and_then(|_current| unsafe { self.context.driver().cuEventDestroy_v2(self.handle) });
    }
}
