//! The Hopper backend: wgmma and TMA kernels (`backends/sm90/`), planned and launched from here.
//!
//! | file | job |
//! |---|---|
//! | `mod.rs` | the backend: device, what it supports, buffers |
//! | `variant.rs`, `units.rs` | which kernel serves which problem, and how each is compiled |
//! | `plan.rs` | the schedule, made on the device |
//! | `run.rs` | one step: parameters, workspace, launches |
//! | `maps.rs` | tensor maps of the KV cache |
//! | `params.rs` | the kernels' parameters, mirrored |
//! | `emulated.rs` | tests: the same kernels on a CPU |

#[cfg(all(test, feature = "conformance", target_os = "linux", target_arch = "x86_64"))]
mod emulated;
mod maps;
mod params;
mod plan;
mod run;
mod units;
mod variant;

use std::ffi::c_void;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::context::Context;
use super::driver::{Driver, PLATFORM};
use super::kernels::{CompiledKernels, KernelSet, Loader, Unit};
use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::device::{Api, DeviceBuffer, Event, FLUSH_BYTES, Function, OwnedStream, Stream};
use crate::error::{MlaError, Result};
use crate::problem::{KvFormat, Problem};
use crate::schedule::ScheduleOptions;
use crate::tensor::TensorView;
use crate::workspace::Workspace;

pub use plan::Sm90Schedule;

pub use crate::device::HostPlan;
use variant::Variant;

/// The backend's name.
pub const NAME: &str = "sm90";

/// The one compute capability that `sm_90a` code runs on.
const COMPUTE_CAPABILITY: (u32, u32) = (9, 0);

mod built {
    include!(concat!(env!("OUT_DIR"), "/sm90_kernels.rs"));
}

static KERNELS: KernelSet =
    KernelSet { backend: NAME, arch: "sm_90a", files: built::FILES, units: units::UNITS, embedded: built::EMBEDDED };

/// MLA decoding on an NVIDIA Hopper device.
///
/// A schedule loads the kernels of its problem. An `out` that is not written 16 bytes at a time (rows that begin anywhere
/// else, or columns with gaps) takes another one, which the first such [`run`](crate::MlaBackend::run) loads, and compiles where
/// it has to: run a call of that kind once before it is recorded into a graph.
pub struct Sm90Backend {
    context: Arc<Context>,
    device: Arc<dyn Api>,
    info: BackendInfo,
    loader: Loader,
    schedule: Function,
    combine: [OnceLock<Function>; 2],
    decode: [OnceLock<Function>; Variant::COUNT],
    flush: Mutex<Option<DeviceBuffer>>,
}

fn absent(reason: String) -> MlaError {
    MlaError::Absent { backend: NAME.into(), reason }
}

/// Whether this backend can serve `problem` on the devices it is for.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub fn supports(problem: &Problem) -> std::result::Result<(), Unsupported> {
    let refuse =
        |param, value: String, limit: &str| Err(Unsupported { backend: NAME, param, value, limit: limit.to_string() });
    if !matches!(problem.kv_format(), KvFormat::Bf16 | KvFormat::F16) {
        return refuse("kv_format", problem.kv_format().to_string(), "bf16 and f16");
    }
    if problem.head_dim_v() != 512 {
        return refuse("head_dim_v", problem.head_dim_v().to_string(), "512");
    }
    if !matches!(problem.head_dim_k(), 512 | 576) {
        return refuse("head_dim_k", problem.head_dim_k().to_string(), "576 (rope 64) and 512 (rope 0)");
    }
    run::check_sizes(problem)
}

/// Compiles every kernel of this backend with the NVRTC library of this path, for a look at its logs (registers,
/// spills) or its code. Needs no device.
///
/// # Errors
/// [`MlaError::Platform`], with the kernel and the compiler's log.
pub fn compile_kernels(nvrtc: &Path) -> Result<CompiledKernels> {
    KERNELS.compile_all(nvrtc)
}

/// How each kernel of this backend is compiled: name, source file under `backends/sm90/`, defines.
pub fn kernel_units() -> impl Iterator<Item = (&'static str, &'static str, &'static [&'static str])> {
    units::UNITS.iter().copied()
}

/// The names of the kernels that nvcc compiled into this build; none where the build found no nvcc.
pub fn embedded_kernels() -> impl Iterator<Item = &'static str> {
    built::EMBEDDED.iter().map(|(name, _)| *name)
}

impl Sm90Backend {
    /// Opens the first device of compute capability 9.0, in its primary context.
    ///
    /// # Errors
    /// [`MlaError::Absent`] with the reason: no driver, no such device, no way to get kernels.
    pub fn new() -> Result<Self> {
        let driver = Driver::get().map_err(absent)?;
        let mut count = 0;
        // SAFETY: a pointer to a local.
        unsafe { driver.cuDeviceGetCount(&raw mut count) }.map_err(|e| absent(e.to_string()))?;
        let mut seen = Vec::new();
        for ordinal in 0..count.unsigned_abs() {
            let context = Context::primary(driver, ordinal).map_err(|e| absent(e.to_string()))?;
            let facts = context.facts();
            if facts.compute_capability == COMPUTE_CAPABILITY {
                return Self::open(context);
            }
            let (major, minor) = facts.compute_capability;
            seen.push(format!("{} of {major}.{minor}", facts.name));
        }
        let seen = if seen.is_empty() { "no device".to_string() } else { seen.join(", ") };
        Err(absent(format!("a device of compute capability 9.0 is needed; this machine has {seen}")))
    }

    /// Opens device `ordinal` in its primary context, the one that the CUDA runtime, PyTorch and cudarc use.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_device(ordinal: u32) -> Result<Self> {
        let driver = Driver::get().map_err(absent)?;
        Self::open(Context::primary(driver, ordinal).map_err(|e| absent(e.to_string()))?)
    }

    /// Works in a context (`CUcontext`) that the caller owns.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// # Safety
    /// `context` must be a live context, and outlive this backend and all that it makes.
    pub unsafe fn from_context(context: *mut c_void) -> Result<Self> {
        let driver = Driver::get().map_err(absent)?;
        // SAFETY: the caller's promise.
        Self::open(unsafe { Context::borrowed(driver, context.cast()) }.map_err(|e| absent(e.to_string()))?)
    }

    fn open(context: Arc<Context>) -> Result<Self> {
        let facts = context.facts().clone();
        if facts.compute_capability != COMPUTE_CAPABILITY {
            let (major, minor) = facts.compute_capability;
            return Err(absent(format!(
                "a device of compute capability 9.0 is needed; device {} is {} of {major}.{minor}",
                facts.ordinal, facts.name
            )));
        }
        let loader = Loader::new(&context, &KERNELS)?;
        // The smallest unit, always needed: a machine where no kernel can be had is found out here, not in a step.
        let module = loader.module("schedule").map_err(|e| absent(e.to_string()))?;
        let schedule = Function::new(&module, "polymla_schedule", 0)?;
        let info = BackendInfo {
            name: NAME,
            device_name: format!("{}, {} SMs, kernels {}", facts.name, facts.multiprocessors, module.origin()),
            device: context.device(),
            evidence: Evidence::T5,
        };
        let combine = std::array::from_fn(|_| OnceLock::new());
        let decode = std::array::from_fn(|_| OnceLock::new());
        let device: Arc<dyn Api> = context.clone();
        Ok(Sm90Backend { context, device, info, loader, schedule, combine, decode, flush: Mutex::new(None) })
    }

    /// A stream of its own: for callers that have none, and to capture graphs.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub fn create_stream(&self) -> Result<OwnedStream> {
        OwnedStream::new(&self.device)
    }
}

impl MlaBackend for Sm90Backend {
    type Buffer = DeviceBuffer;
    type Schedule = Sm90Schedule;
    type Stream = Stream;

    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        supports(problem)
    }

    fn alloc(&self, bytes: usize) -> Result<DeviceBuffer> {
        DeviceBuffer::alloc(&self.device, bytes)
    }

    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<DeviceBuffer> {
        DeviceBuffer::repeated(&self.device, tile, bytes)
    }

    fn download(&self, buffer: &DeviceBuffer, bytes: &mut [u8]) -> Result<()> {
        buffer.read(0, bytes)
    }

    fn schedule(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        stream: Stream,
    ) -> Result<Sm90Schedule> {
        supports(problem)?;
        inputs.validate(problem, self.info.device)?;
        // Kernels are loaded here, so that `run` finds them in place.
        self.prepare(problem)?;
        let mut schedule = Sm90Schedule::new(&self.device, self.context.facts().multiprocessors, problem, options)?;
        schedule.plan(&self.schedule, problem, &inputs.cache_seqlens, stream)?;
        Ok(schedule)
    }

    fn workspace_bytes(&self, problem: &Problem, schedule: &Sm90Schedule) -> usize {
        schedule.workspace_bytes(problem)
    }

    fn run(
        &self,
        problem: &Problem,
        schedule: &Sm90Schedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        stream: Stream,
    ) -> Result<()> {
        self.enqueue(problem, schedule, workspace, inputs, outputs, stream)
    }

    fn finish(&self, schedule: &Sm90Schedule, stream: Stream) -> Result<()> {
        // SAFETY: the stream is alive, by the promise of `Stream::from_raw`.
        unsafe { self.device.stream_synchronize(stream)? };
        match schedule.take_failure() {
            None => Ok(()),
            Some(request) => Err(MlaError::DeviceCheck { request, reason: plan::FAILURE }),
        }
    }

    fn elapsed(
        &self,
        schedule: &Sm90Schedule,
        stream: Stream,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Duration> {
        let took = Event::around(&self.device, stream, work)?;
        self.finish(schedule, stream)?;
        Ok(took)
    }

    fn flush_caches(&self, stream: Stream) -> Result<()> {
        let mut flush = self.flush.lock().unwrap_or_else(PoisonError::into_inner);
        if flush.is_none() {
            *flush = Some(self.alloc(FLUSH_BYTES)?);
        }
        flush.as_ref().map_or(Ok(()), |buffer| buffer.fill(0, stream))
    }
}

impl Sm90Backend {
    /// Schedules again in place: other lengths, or a smaller batch. Allocates nothing and waits for nothing, so it may
    /// be captured, and a captured [`run`](MlaBackend::run) that used `schedule` follows it when replayed.
    ///
    /// `problem` has the shapes that the schedule was made for, with at most as many requests. Requests of a captured
    /// run beyond the new batch are left out: their outputs keep what was there.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`] for other shapes or a larger batch; as [`MlaBackend::schedule`].
    pub fn schedule_into(
        &self,
        schedule: &mut Sm90Schedule,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
    ) -> Result<()> {
        supports(problem)?;
        schedule.plan(&self.schedule, problem, cache_seqlens, stream)
    }
}

impl std::fmt::Debug for Sm90Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm90 on {PLATFORM}: {}", self.info.device_name)
    }
}
