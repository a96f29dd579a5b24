//! What every backend with a device of its own shares: memory, streams, binaries, launches, and the plan that lives on
//! the device. A platform implements [`Api`] once; everything else is written against it.
//!
//! | file | job |
//! |---|---|
//! | `mod.rs` | the calls that a platform gives |
//! | `memory.rs` | buffers, a host word that kernels can write |
//! | `stream.rs` | borrowed and owned streams, graphs, events |
//! | `module.rs` | binaries, kernels, launches |
//! | `plan.rs` | a schedule in upstream's layout, made on the device |

mod memory;
mod module;
mod plan;
mod stream;

use std::ffi::{CStr, c_void};
use std::time::Duration;

pub use memory::DeviceBuffer;
pub(crate) use memory::HostWord;
pub(crate) use module::{Function, Launch, Module};
pub use plan::HostPlan;
#[cfg(feature = "sm90")]
pub(crate) use plan::PlanAddresses;
pub(crate) use plan::{DevicePlan, Plan, STATUS_OK, usable_pages_per_seq};
pub(crate) use stream::Event;
pub use stream::{Graph, OwnedStream, Stream};

use crate::error::{MlaError, Result};
use crate::tensor::Device;

/// A stream, event, module, function or graph of a driver.
pub(crate) type Handle = *mut c_void;

/// Smallest scale that kernels are told: a hidden score is -infinity before it is scaled, and -infinity * 0 would be NaN.
/// Scores of any size below 1e20 still come out as 0, as they do with a scale of 0.
pub(crate) const MIN_SCALE_LOG2: f32 = 1e-30;

/// Bytes written between timed runs: several times the last cache of any device.
pub(crate) const FLUSH_BYTES: usize = 1 << 30;

/// A device in use, as far as memory and launches go. Every call makes the device current on its thread for as long as it
/// lasts, and then what was current before. Errors are [`MlaError::Platform`].
///
/// # Safety
/// Each function is as safe as the driver's function that it stands for: addresses and handles must come from the same
/// device and be alive, ranges must lie inside their allocation. The types of this module keep to that.
#[allow(clippy::missing_safety_doc, reason = "said once for all of them, above")]
pub(crate) trait Api: Send + Sync {
    /// The device in the contract's terms.
    fn device(&self) -> Device;
    /// Most blocks of a launch with so many threads a block.
    fn max_blocks(&self, threads: u32) -> u64;

    /// Memory of the device.
    unsafe fn alloc(&self, bytes: usize) -> Result<u64>;
    /// Frees it, after the work that uses it.
    unsafe fn free(&self, address: u64) -> Result<()>;
    /// Host memory that kernels can reach: where it is for the host, and for kernels.
    unsafe fn host_alloc(&self, bytes: usize) -> Result<(*mut c_void, u64)>;
    /// Frees it, after the work that uses it.
    unsafe fn host_free(&self, pointer: *mut c_void) -> Result<()>;
    /// Copies from the host, and waits until the bytes are in place for every stream.
    unsafe fn copy_to_device(&self, to: u64, from: *const c_void, bytes: usize) -> Result<()>;
    /// Copies to the host, after all work of the device.
    unsafe fn copy_to_host(&self, to: *mut c_void, from: u64, bytes: usize) -> Result<()>;
    /// Enqueues a copy within the device.
    unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<()>;
    /// Enqueues setting bytes.
    unsafe fn fill_bytes(&self, address: u64, value: u8, count: usize, stream: Stream) -> Result<()>;
    /// Enqueues setting 32-bit words.
    unsafe fn fill_words(&self, address: u64, value: i32, count: usize, stream: Stream) -> Result<()>;

    /// Makes a stream.
    unsafe fn stream_create(&self) -> Result<Handle>;
    /// Destroys it; work enqueued on it is finished first.
    unsafe fn stream_destroy(&self, stream: Stream) -> Result<()>;
    /// Waits for it.
    unsafe fn stream_synchronize(&self, stream: Stream) -> Result<()>;

    /// Makes an event that can be timed.
    unsafe fn event_create(&self) -> Result<Handle>;
    /// Destroys it.
    unsafe fn event_destroy(&self, event: Handle) -> Result<()>;
    /// Enqueues it.
    unsafe fn event_record(&self, event: Handle, stream: Stream) -> Result<()>;
    /// Waits for `end`, and tells how long after `start` it came.
    unsafe fn event_elapsed(&self, start: Handle, end: Handle) -> Result<Duration>;

    /// Whether these bytes begin like a binary of this platform. The driver reads the length from the binary's own header.
    fn is_binary(&self, bytes: &[u8]) -> bool;
    /// Loads a binary.
    unsafe fn module_load(&self, binary: &[u8]) -> Result<Handle>;
    /// Unloads it.
    unsafe fn module_unload(&self, module: Handle) -> Result<()>;
    /// Finds a kernel, and allows it so much dynamic shared memory.
    unsafe fn module_function(&self, module: Handle, name: &CStr, shared_bytes: u32) -> Result<Handle>;
    /// Enqueues a kernel.
    unsafe fn launch(
        &self,
        function: Handle,
        launch: &Launch,
        shared_bytes: u32,
        stream: Stream,
        params: &mut [*mut c_void],
    ) -> Result<()>;

    /// Work enqueued on the stream is recorded from now on instead of run.
    unsafe fn capture_begin(&self, _stream: Stream) -> Result<()> {
        Err(self.no_graphs())
    }
    /// Ends the recording; the graph, and its executable unless `discard`.
    unsafe fn capture_end(&self, _stream: Stream, _discard: bool) -> Result<(Handle, Handle)> {
        Err(self.no_graphs())
    }
    /// Enqueues a recorded graph.
    unsafe fn graph_launch(&self, _exec: Handle, _stream: Stream) -> Result<()> {
        Err(self.no_graphs())
    }
    /// Destroys a graph and its executable, where they are not null.
    unsafe fn graph_destroy(&self, _graph: Handle, _exec: Handle) -> Result<()> {
        Ok(())
    }

    /// This platform records no graphs through this crate. Callers capture with the platform's own functions.
    fn no_graphs(&self) -> MlaError {
        let backend = match self.device() {
            Device::Accelerator { platform, .. } => platform,
            Device::Host => "cpu",
        };
        MlaError::Platform { backend, call: "capture", message: "graphs are captured by the caller here".into() }
    }
}
