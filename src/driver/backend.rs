//! The portable kernels through a vendor's driver.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::device::Accelerator;
use super::kernels::Kernels;
use super::memory::DriverBuffer;
use super::module::Function;
use super::plan::DriverSchedule;
use super::stream::{Event, OwnedStream, Stream};
use super::vendor::Vendor;
use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::error::{MlaError, Result};
use crate::portable::{self, COMBINE_SHARED, Decode, SCHEDULE_SHARED, THREADS, TileClass};
use crate::problem::Problem;
use crate::schedule::ScheduleOptions;
use crate::tensor::{DType, Device, TensorView, TensorViewMut};
use crate::workspace::Workspace;

/// Bytes written between timed runs: several times the last cache of any device.
const FLUSH_BYTES: usize = 1 << 30;

/// Alignment of the workspace.
const WORKSPACE_ALIGN: u64 = 16;

/// MLA decoding by the portable kernels on a device of a vendor whose driver is in [`crate::driver`].
pub struct DriverBackend {
    device: Arc<Accelerator>,
    info: BackendInfo,
    kernels: Kernels,
    schedule: Function,
    combine: [OnceLock<Function>; 2],
    decode: [OnceLock<Function>; Decode::COUNT],
    flush: Mutex<Option<DriverBuffer>>,
}

impl DriverBackend {
    /// Opens a device, or the first that the kernels run on.
    ///
    /// # Errors
    /// [`MlaError::Absent`] with the reason: no library, no device, no way to get kernels.
    pub(super) fn open(vendor: &'static Vendor, ordinal: Option<u32>) -> Result<DriverBackend> {
        let absent = |reason: String| MlaError::Absent { backend: vendor.platform.into(), reason };
        let driver = vendor.get().map_err(absent)?;
        let mut count = 0;
        // SAFETY: a pointer to a local.
        unsafe { driver.device_count(&raw mut count) }.map_err(|e| absent(e.to_string()))?;
        let candidates = ordinal.map_or(0..count.unsigned_abs(), |o| o..o.saturating_add(1));
        let mut reasons = Vec::new();
        for ordinal in candidates {
            match Accelerator::open(driver, ordinal).and_then(Self::on) {
                Ok(backend) => return Ok(backend),
                Err(e) => reasons.push(format!("device {ordinal}: {e}")),
            }
        }
        Err(absent(if reasons.is_empty() { "no device".into() } else { reasons.join("; ") }))
    }

    fn on(device: Arc<Accelerator>) -> Result<DriverBackend> {
        let (vendor, facts) = (device.driver.vendor, device.facts.clone());
        let refuse = |param, value: String, limit: &str| {
            MlaError::from(Unsupported { backend: vendor.platform, param, value, limit: limit.into() })
        };
        if facts.warp_size != vendor.kernels.warp {
            return Err(refuse("warp size", facts.warp_size.to_string(), &format!("{}", vendor.kernels.warp)));
        }
        let class = TileClass::of(facts.warp_size, facts.shared_memory_per_block).ok_or_else(|| {
            refuse("shared memory a block", facts.shared_memory_per_block.to_string(), "64 KiB or more")
        })?;
        let kernels = Kernels::new(&device, class)?;
        // A machine where no kernel can be had is found out here, not in a step.
        let module = kernels.module(DType::Bf16)?;
        let schedule = Function::new(&module, "polymla_schedule", THREADS, SCHEDULE_SHARED)?;
        let info = BackendInfo {
            name: vendor.platform,
            device_name: format!(
                "{} ({}), {} multiprocessors, {} version {}, kernels {}",
                facts.name,
                facts.arch,
                facts.multiprocessors,
                device.driver.library,
                device.driver.version,
                module.origin()
            ),
            device: Device::Accelerator { platform: vendor.platform, ordinal: facts.ordinal },
            evidence: Evidence::T5,
        };
        let combine = std::array::from_fn(|_| OnceLock::new());
        let decode = std::array::from_fn(|_| OnceLock::new());
        Ok(DriverBackend { device, info, kernels, schedule, combine, decode, flush: Mutex::new(None) })
    }

    /// A stream of its own, for callers that have none.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub fn create_stream(&self) -> Result<OwnedStream> {
        OwnedStream::new(&self.device)
    }

    /// Schedules again in place: other lengths, or a smaller batch. Allocates nothing and waits for nothing.
    ///
    /// `problem` has the shapes that the schedule was made for, with at most as many requests.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`] for other shapes or a larger batch; as [`MlaBackend::schedule`].
    pub fn schedule_into(
        &self,
        schedule: &mut DriverSchedule,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
    ) -> Result<()> {
        MlaBackend::supports(self, problem)?;
        schedule.enqueue(&self.schedule, problem, cache_seqlens, self.info.device, stream)
    }

    fn decode_function(&self, decode: Decode, dtype: DType) -> Result<&Function> {
        let cell = &self.decode[decode.index()];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        let shared = decode.shared_bytes(self.kernels.class());
        let function = Function::new(&self.kernels.module(dtype)?, &decode.name(), THREADS, shared)?;
        Ok(cell.get_or_init(|| function))
    }

    fn combine_function(&self, dtype: DType) -> Result<&Function> {
        let cell = &self.combine[usize::from(dtype == DType::Bf16)];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        let name = format!("polymla_combine_{dtype}");
        let function = Function::new(&self.kernels.module(dtype)?, &name, THREADS, COMBINE_SHARED)?;
        Ok(cell.get_or_init(|| function))
    }
}

impl MlaBackend for DriverBackend {
    type Buffer = DriverBuffer;
    type Schedule = DriverSchedule;
    type Stream = Stream;

    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        portable::supports(self.info.name, problem)
    }

    fn alloc(&self, bytes: usize) -> Result<DriverBuffer> {
        DriverBuffer::alloc(&self.device, bytes)
    }

    fn upload(&self, bytes: &[u8]) -> Result<DriverBuffer> {
        let mut buffer = self.alloc(bytes.len())?;
        buffer.write(bytes)?;
        Ok(buffer)
    }

    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<DriverBuffer> {
        let mut buffer = self.alloc(bytes)?;
        let tile = &tile[..tile.len().min(bytes)];
        buffer.write(tile)?;
        buffer.repeat(tile.len())?;
        Ok(buffer)
    }

    fn download(&self, buffer: &DriverBuffer, bytes: &mut [u8]) -> Result<()> {
        buffer.read(0, bytes)
    }

    fn view<'a>(&self, param: &'static str, buffer: &'a DriverBuffer, like: &TensorView<'_>) -> Result<TensorView<'a>> {
        let (address, bytes, device) = (buffer.address(), buffer.bytes() as u64, self.info.device);
        // SAFETY: the buffer's memory, borrowed for 'a; freeing it waits for enqueued work.
        unsafe { TensorView::from_raw_parts(param, address, bytes, like.dtype(), like.shape(), like.strides(), device) }
    }

    fn view_mut<'a>(
        &self,
        param: &'static str,
        buffer: &'a mut DriverBuffer,
        like: &TensorView<'_>,
    ) -> Result<TensorViewMut<'a>> {
        let (address, bytes, device) = (buffer.address(), buffer.bytes() as u64, self.info.device);
        // SAFETY: as in `view`, and the borrow is exclusive.
        unsafe {
            TensorViewMut::from_raw_parts(param, address, bytes, like.dtype(), like.shape(), like.strides(), device)
        }
    }

    fn workspace<'a>(&self, buffer: &'a mut DriverBuffer) -> Workspace<'a> {
        // SAFETY: the buffer's memory, borrowed exclusively for 'a; freeing it waits for enqueued work.
        unsafe { Workspace::from_raw_parts(buffer.address(), buffer.bytes(), self.info.device) }
    }

    fn schedule(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        stream: Stream,
    ) -> Result<DriverSchedule> {
        MlaBackend::supports(self, problem)?;
        inputs.validate(problem, self.info.device)?;
        // Kernels are loaded here, so that `run` finds them in place.
        let (decode, blocks_per_part) = self.kernels.class().decode(problem);
        self.decode_function(decode, problem.dtype())?;
        self.combine_function(problem.dtype())?;
        let parts = self.device.facts.multiprocessors as usize / blocks_per_part.max(1);
        let mut schedule = DriverSchedule::new(&self.device, problem, options, parts)?;
        schedule.enqueue(&self.schedule, problem, &inputs.cache_seqlens, self.info.device, stream)?;
        Ok(schedule)
    }

    fn workspace_bytes(&self, problem: &Problem, schedule: &DriverSchedule) -> usize {
        schedule.plan().workspace_bytes(problem)
    }

    fn run(
        &self,
        problem: &Problem,
        schedule: &DriverSchedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        stream: Stream,
    ) -> Result<()> {
        let device = self.info.device;
        MlaBackend::supports(self, problem)?;
        inputs.validate(problem, device)?;
        outputs.validate(problem, inputs, device)?;
        schedule.plan().check(problem)?;
        let needed = self.workspace_bytes(problem, schedule);
        if workspace.bytes() < needed {
            return Err(MlaError::WorkspaceTooSmall { value: workspace.bytes(), limit: needed });
        }
        let Some(scratch) = workspace.address().filter(|_| workspace.device() == device) else {
            return Err(MlaError::WrongDevice { param: "workspace", value: workspace.device(), limit: device });
        };
        if !scratch.is_multiple_of(WORKSPACE_ALIGN) {
            return Err(MlaError::Alignment { param: "workspace", value: scratch, limit: WORKSPACE_ALIGN as usize });
        }
        if problem.rows() == 0 {
            return Ok(());
        }
        let mut params = portable::params(problem, inputs, outputs);
        schedule.fill(&mut params, problem, scratch);
        let (kernel, blocks_per_part) = self.kernels.class().decode(problem);
        let (decode, combine) =
            (self.decode_function(kernel, problem.dtype())?, self.combine_function(problem.dtype())?);
        let decode_blocks = decode.check_grid(blocks_per_part as u64 * schedule.plan().num_parts() as u64)?;
        let rows = (problem.s_q() * problem.h_q()) as u64;
        let combine_blocks = combine.check_grid(problem.b() as u64 * rows.div_ceil(params.combine_rows as u64))?;
        // SAFETY: the kernels' one parameter. What its addresses name is vouched for by the views, checked against the
        // problem above, by the schedule and by the workspace, checked for its size.
        unsafe {
            decode.enqueue(decode_blocks, &mut params, stream)?;
            combine.enqueue(combine_blocks, &mut params, stream)
        }
    }

    fn finish(&self, schedule: &DriverSchedule, stream: Stream) -> Result<()> {
        {
            let _current = self.device.enter()?;
            // SAFETY: the stream is alive, by the promise of `Stream::from_raw`.
            unsafe { self.device.driver.stream_synchronize(stream.raw())? };
        }
        schedule.take_verdict()
    }

    fn elapsed(
        &self,
        schedule: &DriverSchedule,
        stream: Stream,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Duration> {
        let (start, end) = (Event::new(&self.device)?, Event::new(&self.device)?);
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        let took = end.since(&start)?;
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

impl std::fmt::Debug for DriverBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.info.name, self.info.device_name)
    }
}
