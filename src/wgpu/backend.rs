//! The backend: which path a problem takes, and the trait.

use std::sync::Arc;
use std::time::Duration;

use super::context::Context;
use super::memory::{self, WgpuBuffer};
use super::pipelines::{Pipeline, Pipelines};
use super::plan::WgpuSchedule;
use super::rounds;
use super::run::{self, Kernels, Scratch};
use super::shaders::{Build, Kernel, Path};
use super::timing::Clock;
use super::{NAME, PATH_VARIABLE, WORKGROUPS_VARIABLE, chunks, environment, refusal, supports};
use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::schedule::{PartMetadata, ScheduleOptions};
use crate::tensor::{DType, Device};
use crate::workspace::Workspace;

/// The most scratch memory asked for where less would do in several chunks.
const WORKSPACE_BYTES: u64 = 1 << 30;

/// Processors of adapters that were measured: wgpu does not tell how many an adapter has.
const PROCESSORS: [(&str, usize); 1] = [("NVIDIA H200", 132)];

/// Whether a matrix path takes the sizes of a problem: keys are loaded 8 columns at a time, results stored 16.
fn suits_matrices(p: &Problem, path: Path) -> bool {
    let (most_k, most_v) = path.most_columns();
    p.head_dim_k() <= most_k
        && p.head_dim_v() <= most_v
        && p.head_dim_k().is_multiple_of(8)
        && p.head_dim_v().is_multiple_of(16)
}

/// The path of a problem that matrices would be for, but for its sizes or strides.
fn without_matrices(problem: &Problem) -> Path {
    match problem.dtype() {
        DType::F16 => Path::NativeF16,
        _ => Path::Subgroups,
    }
}

/// MLA decoding by WGSL kernels.
pub struct WgpuBackend {
    context: Context,
    info: BackendInfo,
    pipelines: Pipelines,
    /// The path that was asked for, which is then the only one taken.
    forced: Option<Path>,
    /// Workgroups that fill the device, where the caller said so.
    workgroups: Option<usize>,
    /// Bound where a kernel declares a tensor that a call does not have.
    dummy: ::wgpu::Buffer,
    clock: Clock,
}

impl WgpuBackend {
    /// Opens the best adapter of this machine.
    ///
    /// # Errors
    /// [`MlaError::Absent`] with the reason; [`MlaError::Environment`].
    pub fn new() -> Result<WgpuBackend> {
        let named = environment(PATH_VARIABLE);
        let forced = Path::ALL.into_iter().find(|path| path.name() == named);
        if forced.is_none() && !named.is_empty() {
            let limit = Path::ALL.map(Path::name).join(", ");
            return Err(MlaError::Environment { param: PATH_VARIABLE, value: named, limit });
        }
        let backend = Self::on(Context::open()?, None)?;
        match forced {
            Some(path) => backend.with_path(path),
            None => Ok(backend),
        }
    }

    /// Opens the best adapter of this machine with the features and limits that every WebGPU implementation grants, as
    /// a browser would.
    ///
    /// # Errors
    /// [`MlaError::Absent`] with the reason.
    pub fn web_default() -> Result<WgpuBackend> {
        Self::on(Context::open_web_default()?, None)
    }

    /// A backend over a device of the caller's, who keeps its callbacks. Paths are chosen from the features that the
    /// device was opened with. Buffers must be of this device: wgpu tells those of other instances apart by nothing.
    ///
    /// Matrices only where [`WgpuBackend::with_path`] asks for them: a device does not tell their sizes, which must be
    /// 16 x 16 x 16, f16 into f32; [`Path::Matrix64`] wants `MEMORY_DECORATION_VOLATILE` too.
    ///
    /// # Errors
    /// [`MlaError::Absent`] where the device was opened with limits that the kernels do not fit; [`MlaError::Platform`].
    pub fn from_device(
        adapter: ::wgpu::AdapterInfo,
        device: ::wgpu::Device,
        queue: ::wgpu::Queue,
    ) -> Result<WgpuBackend> {
        Self::on(Context::new(adapter, device, queue), None)
    }

    /// The same backend, taking one path only.
    ///
    /// # Errors
    /// [`MlaError::Unsupported`] where the device lacks what the path needs.
    pub fn with_path(self, path: Path) -> Result<WgpuBackend> {
        if !self.has(path) {
            let limit = Path::ALL.into_iter().filter(|p| self.has(*p)).map(Path::name).collect::<Vec<_>>().join(", ");
            return Err(refusal("path", path.name().into(), limit).into());
        }
        Self::on(self.context, Some(path))
    }

    fn on(context: Context, forced: Option<Path>) -> Result<WgpuBackend> {
        context.check_limits()?;
        let dummy = context.buffer(256, memory::USAGE)?;
        let named = environment(WORKGROUPS_VARIABLE);
        let workgroups = match named.parse() {
            Ok(n) if (1..=65_535).contains(&n) => Some(n),
            _ if !named.is_empty() => {
                let limit = "1 to 65535".into();
                return Err(MlaError::Environment { param: WORKGROUPS_VARIABLE, value: named, limit });
            }
            _ => None,
        };
        let mut backend = WgpuBackend {
            info: BackendInfo {
                name: NAME,
                device_name: String::new(),
                device: Device::Accelerator { platform: NAME, ordinal: 0 },
                // A software adapter runs the kernels on this machine's CPU.
                evidence: match context.adapter.device_type {
                    ::wgpu::DeviceType::Cpu => Evidence::T3,
                    _ => Evidence::T5,
                },
            },
            context,
            pipelines: Pipelines::default(),
            forced,
            workgroups,
            dummy,
            clock: Clock::default(),
        };
        let adapter = &backend.context.adapter;
        let paths = Path::ALL.into_iter().filter(|p| match backend.forced {
            Some(forced) => forced == *p,
            None => backend.has(*p) && !p.is_emulated(),
        });
        backend.info.device_name = format!(
            "{} ({:?}, {}), paths {}",
            adapter.name,
            adapter.backend,
            adapter.driver_info,
            paths.map(Path::name).collect::<Vec<_>>().join(" ")
        );
        Ok(backend)
    }

    /// The device.
    pub fn device(&self) -> &::wgpu::Device {
        &self.context.device
    }
    /// The queue that work is enqueued on.
    pub fn queue(&self) -> &::wgpu::Queue {
        &self.context.queue
    }

    /// Whether the device has what a path needs.
    pub fn has(&self, path: Path) -> bool {
        let (features, adapter) = (self.context.features, &self.context.adapter);
        // A row's 8 lanes must be in one subgroup.
        let subgroups = features.contains(::wgpu::Features::SUBGROUP) && adapter.subgroup_min_size >= 8;
        match path {
            Path::Plain => true,
            Path::Subgroups => subgroups,
            Path::NativeF16 => subgroups && features.contains(::wgpu::Features::SHADER_F16),
            Path::Matrix16 | Path::Matrix32 | Path::Matrix64 => {
                let one_size = (adapter.subgroup_min_size, adapter.subgroup_max_size) == (32, 32);
                let volatile =
                    path != Path::Matrix64 || features.contains(::wgpu::Features::MEMORY_DECORATION_VOLATILE);
                let matrices = self.context.matrices && one_size && volatile;
                matrices && self.has(Path::NativeF16) && self.has_room(48 << 10, 256)
            }
            Path::EmulatedMatrix16 | Path::EmulatedMatrix32 | Path::EmulatedMatrix64 => {
                self.has(Path::NativeF16) && self.has_room(24 << 10, 256)
            }
        }
    }

    /// Whether a workgroup may be as large as the matrix paths' are.
    fn has_room(&self, shared: u32, invocations: u32) -> bool {
        let limits = &self.context.limits;
        limits.max_compute_workgroup_storage_size >= shared
            && limits.max_compute_invocations_per_workgroup >= invocations
    }

    /// The path that a problem takes: the one asked for, or the best that the device has; a plainer one where that does
    /// not exist for the problem. Tensors whose rows begin anywhere take [`Path::NativeF16`] instead of matrices.
    pub fn path(&self, problem: &Problem) -> Path {
        let matrix = match problem.s_q() * problem.heads_per_kv() {
            ..=16 => Path::Matrix16,
            33.. if self.has(Path::Matrix64) => Path::Matrix64,
            _ => Path::Matrix32,
        };
        let wanted = self.forced.unwrap_or_else(|| {
            let order = [matrix, Path::NativeF16, Path::Subgroups];
            let taken =
                |p: &Path| self.has(*p) && p.takes(problem.dtype()) && (!p.is_matrix() || self.context.known_matrices);
            order.into_iter().find(taken).unwrap_or(Path::Plain)
        });
        match wanted {
            _ if !wanted.takes(problem.dtype()) && self.has(Path::Subgroups) => Path::Subgroups,
            _ if !wanted.takes(problem.dtype()) => Path::Plain,
            _ if wanted.is_matrix() && !suits_matrices(problem, wanted) => without_matrices(problem),
            _ => wanted,
        }
    }

    /// The path of a call: `path`, or one without matrices where the tensors' rows begin anywhere.
    fn path_of_call(&self, problem: &Problem, inputs: &Inputs<'_>) -> Path {
        match self.path(problem) {
            path if path.is_matrix() && !run::rows_suit_matrices(inputs) => without_matrices(problem),
            path => path,
        }
    }

    /// Whether the driver ends long loops: [`rounds`] says which.
    fn ends_loops(&self) -> bool {
        self.context.adapter.device_type == ::wgpu::DeviceType::Cpu
    }

    /// Parts that fill the device.
    fn default_parts(&self, path: Path, row_tiles: u64, slices: usize) -> usize {
        let adapter = &self.context.adapter;
        // Of 16 rows two workgroups fit a processor, of more rows one.
        let together = if path.rows() > 16 { 1 } else { 2 };
        let processors = PROCESSORS.iter().find(|(name, _)| adapter.name.contains(name)).map(|(_, n)| n * together);
        let fill = match (adapter.device_type, processors) {
            (_, Some(n)) if path.is_matrix() => n,
            // Workgroups beyond what runs at once cost little: each is long, and the last ones even out.
            (::wgpu::DeviceType::Cpu, _) => 8,
            (::wgpu::DeviceType::DiscreteGpu, _) if path.is_matrix() => 264 * together,
            (::wgpu::DeviceType::DiscreteGpu, _) => 528,
            _ => 128,
        };
        self.workgroups.unwrap_or(fill) / (row_tiles as usize * slices).max(1)
    }

    fn kernel(&self, kernel: Kernel, path: Path, problem: &Problem, windows: bool) -> Result<Arc<Pipeline>> {
        // The small kernels have one path, and the first two do not know the element type.
        let (path, dtype) = match kernel {
            Kernel::Schedule => (Path::Plain, DType::F32),
            Kernel::Prepare => (path, DType::F32),
            Kernel::Combine | Kernel::Decode => (path, problem.dtype()),
        };
        let full = match kernel {
            Kernel::Decode => path.is_full(problem) && !windows,
            Kernel::Combine => problem.head_dim_v().is_multiple_of(4),
            _ => false,
        };
        self.pipelines.get(&self.context, (kernel, path, dtype, if full { Build::Full } else { Build::Any }))
    }

    /// The kernel for splits whose numbers do not fit matrices of f16: for bf16 only.
    fn remains(&self, path: Path, problem: &Problem) -> Result<Option<Arc<Pipeline>>> {
        let bf16 = DType::Bf16;
        let needed = path.is_matrix() && problem.dtype() == bf16;
        let get = || self.pipelines.get(&self.context, (Kernel::Decode, Path::Subgroups, bf16, Build::Remains));
        needed.then(get).transpose()
    }

    /// Waits for the device and copies a plan to the host: `tile_scheduler_metadata` and `num_splits`.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub fn plan(&self, schedule: &WgpuSchedule) -> Result<(Vec<PartMetadata>, Vec<i32>)> {
        schedule.to_host(&self.context)
    }
}

impl MlaBackend for WgpuBackend {
    type Buffer = WgpuBuffer;
    type Schedule = WgpuSchedule;
    type Stream = ();

    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        supports(problem)
    }

    fn alloc(&self, bytes: usize) -> Result<WgpuBuffer> {
        self.context.alloc(bytes)
    }

    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<WgpuBuffer> {
        let buffer = self.alloc(bytes)?;
        self.context.fill(&buffer, &tile[..tile.len().min(bytes)])?;
        Ok(buffer)
    }

    fn download(&self, buffer: &WgpuBuffer, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() > buffer.bytes() {
            let (value, limit) = (bytes.len() as u64, buffer.bytes() as u64);
            return Err(MlaError::StrideOverrun { param: "buffer", value, limit });
        }
        self.context.read(&buffer.buffer, 0, bytes)
    }

    fn schedule(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        _stream: (),
    ) -> Result<WgpuSchedule> {
        MlaBackend::supports(self, problem)?;
        inputs.validate(problem, self.info.device)?;
        let (path, of_call) = (self.path(problem), self.path_of_call(problem, inputs));
        // Kernels are compiled here, so that `run` finds them in place.
        let windows = run::has_windows(&self.context, problem, &inputs.kv_cache)?;
        for kernel in [Kernel::Prepare, Kernel::Decode, Kernel::Combine] {
            self.kernel(kernel, of_call, problem, windows)?;
        }
        self.remains(of_call, problem)?;
        let rows_per_kv = problem.s_q() * problem.heads_per_kv();
        let row_tiles = (problem.h_kv() * rows_per_kv.div_ceil(path.rows())) as u64;
        let parts = self.default_parts(path, row_tiles, problem.head_dim_v().div_ceil(path.columns()));
        let parts = if self.ends_loops() { parts.max(rounds::least_parts(problem, options.policy)?) } else { parts };
        let schedule = WgpuSchedule::new(&self.context, problem, options, parts)?;
        let kernel = self.kernel(Kernel::Schedule, path, problem, windows)?;
        schedule.enqueue(&self.context, &kernel, problem, &inputs.cache_seqlens, &self.dummy)?;
        Ok(schedule)
    }

    fn workspace_bytes(&self, problem: &Problem, schedule: &WgpuSchedule) -> usize {
        let shape = schedule.sizes(problem, self.path(problem).rows());
        // Of a cache without gaps: one with gaps may have more windows, and then goes in smaller chunks.
        let (size, limit) = (problem.dtype().size() as u64, self.context.binding_bytes());
        let page = problem.page_size() as u64 * problem.h_kv() as u64 * problem.head_dim_k() as u64 * size;
        let windows = (problem.num_pages() as u64).div_ceil((limit / page.max(1)).max(1)).max(1);
        let chunk = shape.chunk(shape.requests, windows, limit.min(WORKSPACE_BYTES));
        let chunk = chunk.unwrap_or(chunks::Chunk { requests: 1, row_tiles: 1 });
        usize::try_from(shape.layout(chunk, windows).words.saturating_mul(4)).unwrap_or(usize::MAX)
    }

    fn run(
        &self,
        problem: &Problem,
        schedule: &WgpuSchedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        _stream: (),
    ) -> Result<()> {
        let device = self.info.device;
        MlaBackend::supports(self, problem)?;
        inputs.validate(problem, device)?;
        outputs.validate(problem, inputs, device)?;
        schedule.check(problem)?;
        let needed = self.workspace_bytes(problem, schedule);
        if workspace.bytes() < needed {
            return Err(MlaError::WorkspaceTooSmall { value: workspace.bytes(), limit: needed });
        }
        let wrong = MlaError::WrongDevice { param: "workspace", value: workspace.device(), limit: device };
        let (object, offset) = workspace.object().filter(|_| workspace.device() == device).ok_or(wrong)?;
        let Some(buffer) = object.downcast_ref::<::wgpu::Buffer>() else {
            return Err(refusal("workspace", "an object of another kind".into(), "a wgpu::Buffer").into());
        };
        let align = u64::from(self.context.limits.min_storage_buffer_offset_alignment);
        if !offset.is_multiple_of(align) {
            return Err(MlaError::Alignment { param: "workspace", value: offset, limit: align as usize });
        }
        let bytes = workspace.bytes() as u64;
        if offset.saturating_add(bytes) > buffer.size() {
            let (value, limit) = (offset.saturating_add(bytes), buffer.size());
            return Err(MlaError::StrideOverrun { param: "workspace", value, limit });
        }
        if problem.rows() == 0 {
            return Ok(());
        }
        if self.ends_loops() {
            rounds::check_parts(problem, schedule.policy(), schedule.num_parts())?;
        }
        let path = self.path_of_call(problem, inputs);
        let remains = self.remains(path, problem)?;
        let windows = run::has_windows(&self.context, problem, &inputs.kv_cache)?;
        let kernel = |kernel| self.kernel(kernel, path, problem, windows);
        let [prepare, decode, combine] = [kernel(Kernel::Prepare)?, kernel(Kernel::Decode)?, kernel(Kernel::Combine)?];
        let kernels = Kernels {
            prepare: &prepare,
            decode: &decode,
            combine: &combine,
            remains: remains.as_deref().map(|kernel| (kernel, (path.rows() / Path::Subgroups.rows()) as u32)),
            columns: path.columns(),
        };
        let shape = schedule.sizes(problem, path.rows());
        let scratch = Scratch { buffer, offset, bytes };
        run::run(&self.context, &kernels, schedule, &shape, problem, inputs, outputs, scratch, &self.dummy)
    }

    fn finish(&self, schedule: &WgpuSchedule, _stream: ()) -> Result<()> {
        schedule.take_verdict(&self.context)
    }

    fn elapsed(&self, schedule: &WgpuSchedule, stream: (), work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        self.clock.elapsed(&self.context, work, &|| self.finish(schedule, stream))
    }

    fn flush_caches(&self, _stream: ()) -> Result<()> {
        self.clock.flush_caches(&self.context)
    }
}

impl std::fmt::Debug for WgpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.info.name, self.info.device_name)
    }
}
