//! The portable kernels on a device, whatever driver it has.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::kernels::Kernels;
use super::plan::{Partials, PortableSchedule};
use super::tiles::{COMBINE_SHARED, Decode, MERGE_SHARED, SCHEDULE_SHARED};
use super::{params, supports};
use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::device::{Api, DeviceBuffer, Event, FLUSH_BYTES, Function, Launch, OwnedStream, Stream};
use crate::error::Result;
use crate::problem::Problem;
use crate::schedule::ScheduleOptions;
use crate::tensor::{DType, TensorView};
use crate::workspace::Workspace;

/// Alignment of the workspace.
const WORKSPACE_ALIGN: usize = 16;

/// MLA decoding by the portable kernels.
pub struct PortableBackend {
    device: Arc<dyn Api>,
    info: BackendInfo,
    multiprocessors: usize,
    kernels: Kernels,
    schedule: Function,
    combine: [OnceLock<Function>; 4],
    decode: [OnceLock<Function>; Decode::COUNT],
    flush: Mutex<Option<DeviceBuffer>>,
}

impl PortableBackend {
    /// A backend named `name` on a device; `words` say what device that is.
    ///
    /// # Errors
    /// [`MlaError::Platform`] where no kernel can be had.
    pub(crate) fn new(
        device: Arc<dyn Api>,
        name: &'static str,
        words: &str,
        multiprocessors: u32,
        kernels: Kernels,
        evidence: Evidence,
    ) -> Result<PortableBackend> {
        // A machine where no kernel can be had is found out here, not in a step.
        let module = kernels.module(DType::Bf16)?;
        let schedule = Function::new(&module, "polymla_schedule", SCHEDULE_SHARED)?;
        let device_name = format!("{words}, kernels {}", module.origin());
        let info = BackendInfo { name, device_name, device: device.device(), evidence };
        let combine = std::array::from_fn(|_| OnceLock::new());
        let decode = std::array::from_fn(|_| OnceLock::new());
        let multiprocessors = multiprocessors as usize;
        Ok(PortableBackend {
            device,
            info,
            multiprocessors,
            kernels,
            schedule,
            combine,
            decode,
            flush: Mutex::new(None),
        })
    }

    /// A stream of its own, for callers that have none.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub fn create_stream(&self) -> Result<OwnedStream> {
        OwnedStream::new(&self.device)
    }

    /// Schedules again in place: other lengths, or a smaller batch. Allocates nothing and waits for nothing, so it may
    /// be captured, and a captured [`run`](MlaBackend::run) that used `schedule` follows it when replayed.
    ///
    /// `problem` has the shapes that the schedule was made for, with at most as many requests. Requests of a captured
    /// run beyond the new batch are left out: their outputs keep what was there.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`](crate::MlaError::ScheduleMismatch) for other shapes or a larger batch; as
    /// [`MlaBackend::schedule`].
    pub fn schedule_into(
        &self,
        schedule: &mut PortableSchedule,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
    ) -> Result<()> {
        MlaBackend::supports(self, problem)?;
        schedule.enqueue(&self.schedule, problem, cache_seqlens, stream)
    }

    fn decode_function(&self, decode: Decode, dtype: DType) -> Result<&Function> {
        let cell = &self.decode[decode.index()];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        let shared = decode.shared_bytes(self.kernels.class());
        let function = Function::new(&self.kernels.module(dtype)?, &decode.name(), shared)?;
        Ok(cell.get_or_init(|| function))
    }

    fn partials(&self, decode: Decode) -> Partials {
        if self.kernels.leaves_pieces(decode) { Partials::Pieces } else { Partials::Rows }
    }

    fn combine_function(&self, partials: Partials, dtype: DType) -> Result<&Function> {
        let (kind, shared) = match partials {
            Partials::Rows => ("combine", COMBINE_SHARED),
            Partials::Pieces => ("merge", MERGE_SHARED),
        };
        let cell = &self.combine[usize::from(partials == Partials::Pieces) * 2 + usize::from(dtype == DType::Bf16)];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        let function = Function::new(&self.kernels.module(dtype)?, &format!("polymla_{kind}_{dtype}"), shared)?;
        Ok(cell.get_or_init(|| function))
    }
}

impl MlaBackend for PortableBackend {
    type Buffer = DeviceBuffer;
    type Schedule = PortableSchedule;
    type Stream = Stream;

    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        supports(self.info.name, problem)
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
    ) -> Result<PortableSchedule> {
        MlaBackend::supports(self, problem)?;
        inputs.validate(problem, self.info.device)?;
        // Kernels are loaded here, so that `run` finds them in place.
        let (kernel, blocks_per_part) = self.kernels.class().decode(problem, true);
        for aligned in [true, false] {
            self.decode_function(self.kernels.class().decode(problem, aligned).0, problem.dtype())?;
        }
        self.combine_function(self.partials(kernel), problem.dtype())?;
        let parts = self.multiprocessors / blocks_per_part.max(1);
        let mut schedule = PortableSchedule::new(&self.device, problem, options, parts)?;
        schedule.enqueue(&self.schedule, problem, &inputs.cache_seqlens, stream)?;
        Ok(schedule)
    }

    fn workspace_bytes(&self, problem: &Problem, schedule: &PortableSchedule) -> usize {
        schedule.workspace_bytes(problem, self.partials(self.kernels.class().decode(problem, true).0))
    }

    fn run(
        &self,
        problem: &Problem,
        schedule: &PortableSchedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        stream: Stream,
    ) -> Result<()> {
        let device = self.info.device;
        MlaBackend::supports(self, problem)?;
        inputs.validate(problem, device)?;
        outputs.validate(problem, inputs, device)?;
        schedule.check(problem)?;
        let scratch = workspace.checked(self.workspace_bytes(problem, schedule), WORKSPACE_ALIGN, device)?;
        if problem.rows() == 0 {
            return Ok(());
        }
        let mut params = params(problem, inputs, outputs);
        let (kernel, blocks_per_part) = self.kernels.class().decode(problem, params.aligned());
        let partials = self.partials(kernel);
        schedule.fill(&mut params, problem, scratch, partials);
        let (decode, combine) =
            (self.decode_function(kernel, problem.dtype())?, self.combine_function(partials, problem.dtype())?);
        let blocks = blocks_per_part as u64 * schedule.num_parts() as u64;
        let decode_launch = Launch::row(decode, blocks, kernel.threads(self.kernels.class()), true)?;
        let combine_launch = Launch::row(combine, partials.blocks(problem, &params), partials.threads(), true)?;
        let mut list = [(&raw mut params).cast::<c_void>()];
        // SAFETY: the kernels' one parameter. What its addresses name is vouched for by the views, checked against the
        // problem above, by the schedule and by the workspace, checked for its size.
        unsafe {
            decode_launch.enqueue(decode, stream, &mut list)?;
            combine_launch.enqueue(combine, stream, &mut list)
        }
    }

    fn finish(&self, schedule: &PortableSchedule, stream: Stream) -> Result<()> {
        // SAFETY: the stream is alive, by the promise of `Stream::from_raw`.
        unsafe { self.device.stream_synchronize(stream)? };
        schedule.take_verdict()
    }

    fn elapsed(
        &self,
        schedule: &PortableSchedule,
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

impl std::fmt::Debug for PortableBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.info.name, self.info.device_name)
    }
}
