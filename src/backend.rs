//! The trait every backend implements, and the table of backends.

use std::fmt;
use std::time::{Duration, Instant};

use crate::call::{Inputs, Outputs};
use crate::error::{MlaError, Result};
pub use crate::host::{HostBackend, RepeatedInputs, Timing};
use crate::problem::Problem;
use crate::schedule::ScheduleOptions;
use crate::tensor::{Device, TensorView, TensorViewMut};
use crate::workspace::Workspace;

/// Why a backend cannot serve a problem: the parameter, its value, and what the backend takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("backend {backend} does not support {param} {value}; it supports {limit}")]
pub struct Unsupported {
    /// The backend's name.
    pub backend: &'static str,
    /// The parameter.
    pub param: &'static str,
    /// Its value.
    pub value: String,
    /// What is supported instead.
    pub limit: String,
}

/// What has been seen of a backend, weakest to strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// Compiles to the vendor's instruction set.
    T1,
    /// Host code ran against the vendor's library without a device.
    T2,
    /// The kernel source ran on a CPU at the vendor's warp width.
    T3,
    /// Kernel source and host code ran on another vendor's device.
    T4,
    /// Ran on the hardware it is for.
    T5,
}

impl Evidence {
    /// What the tier says, in words.
    pub fn words(self) -> &'static str {
        match self {
            Evidence::T1 => "compiles to the vendor's instruction set",
            Evidence::T2 => "host code ran against the vendor's library without a device",
            Evidence::T3 => "the kernel source ran on a CPU at the vendor's warp width",
            Evidence::T4 => "kernel source and host code ran on another vendor's device",
            Evidence::T5 => "ran on the hardware it is for",
        }
    }
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Identity of an opened backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendInfo {
    /// Its feature's name: `cpu`, `sm90`, ...
    pub name: &'static str,
    /// The device in words, with the code path in use.
    pub device_name: String,
    /// Where its tensors live.
    pub device: Device,
    /// The tier that a run on this device proves.
    pub evidence: Evidence,
}

/// Memory of a backend, as tensors and scratch space. `device` is the backend's, for memory that does not know its own.
pub trait BackendBuffer {
    /// The tensor that `like` describes (shape, strides, type) over this memory.
    ///
    /// # Errors
    /// Those of [`TensorView::from_raw_parts`].
    fn view(&self, param: &'static str, like: &TensorView<'_>, device: Device) -> Result<TensorView<'_>>;

    /// As [`view`](Self::view), for writing.
    ///
    /// # Errors
    /// Those of [`TensorView::from_raw_parts`].
    fn view_mut(&mut self, param: &'static str, like: &TensorView<'_>, device: Device) -> Result<TensorViewMut<'_>>;

    /// This memory as a workspace.
    fn workspace(&mut self, device: Device) -> Workspace<'_>;
}

/// A backend, generic over where its memory lives.
///
/// The order of a step: [`schedule`](Self::schedule) once, then for each layer [`run`](Self::run) with a workspace of
/// at least [`workspace_bytes`](Self::workspace_bytes). `run` enqueues on the caller's stream; it allocates nothing and
/// waits for nothing.
pub trait MlaBackend: Send + Sync {
    /// Memory this backend allocated by [`upload`](Self::upload) or [`alloc`](Self::alloc).
    type Buffer: BackendBuffer;
    /// A plan in the form this backend's kernels read.
    type Schedule;
    /// Where work is enqueued. `()` where `run` itself does the work.
    type Stream: Copy + Default;

    /// Identity and device.
    fn info(&self) -> &BackendInfo;

    /// Whether it can serve `problem`.
    ///
    /// # Errors
    /// [`Unsupported`], with the reason.
    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported>;

    /// Allocates `bytes` bytes where this backend's tensors live.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    fn alloc(&self, bytes: usize) -> Result<Self::Buffer>;

    /// Copies `bytes` to memory where this backend's tensors live.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    fn upload(&self, bytes: &[u8]) -> Result<Self::Buffer> {
        self.upload_repeated(bytes, bytes.len())
    }

    /// Memory of `bytes` bytes that repeats `tile` to its end: inputs of benchmarks, which need not travel whole.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<Self::Buffer>;

    /// Copies a buffer back, after all work enqueued so far.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    fn download(&self, buffer: &Self::Buffer, bytes: &mut [u8]) -> Result<()>;

    /// The tensor that `like` describes (shape, strides, type) over the memory of `buffer`.
    ///
    /// # Errors
    /// Those of [`TensorView::from_raw_parts`].
    fn view<'a>(&self, param: &'static str, buffer: &'a Self::Buffer, like: &TensorView<'_>) -> Result<TensorView<'a>> {
        buffer.view(param, like, self.info().device)
    }

    /// As [`view`](Self::view), for writing.
    ///
    /// # Errors
    /// Those of [`TensorView::from_raw_parts`].
    fn view_mut<'a>(
        &self,
        param: &'static str,
        buffer: &'a mut Self::Buffer,
        like: &TensorView<'_>,
    ) -> Result<TensorViewMut<'a>> {
        buffer.view_mut(param, like, self.info().device)
    }

    /// A buffer as a workspace.
    fn workspace<'a>(&self, buffer: &'a mut Self::Buffer) -> Workspace<'a> {
        buffer.workspace(self.info().device)
    }

    /// Plans a step. `inputs` gives cache_seqlens, where this backend's tensors live.
    ///
    /// # Errors
    /// Those of [`crate::schedule::get_mla_metadata`], and of the platform.
    fn schedule(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        stream: Self::Stream,
    ) -> Result<Self::Schedule>;

    /// Bytes of workspace that [`run`](Self::run) needs.
    fn workspace_bytes(&self, problem: &Problem, schedule: &Self::Schedule) -> usize;

    /// Enqueues one decode step.
    ///
    /// # Errors
    /// Every bad input has its own variant of [`MlaError`]; on an error nothing was written. What only the device can
    /// see is reported by [`finish`](Self::finish).
    fn run(
        &self,
        problem: &Problem,
        schedule: &Self::Schedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        stream: Self::Stream,
    ) -> Result<()>;

    /// Waits for the work enqueued on `stream` and reports what its device-side checks found.
    ///
    /// # Errors
    /// [`MlaError::DeviceCheck`], [`MlaError::Platform`].
    fn finish(&self, schedule: &Self::Schedule, stream: Self::Stream) -> Result<()>;

    /// Time that the work enqueued by `work` takes where it runs. The default waits and reads the host's clock.
    ///
    /// # Errors
    /// Those of `work` and [`finish`](Self::finish).
    fn elapsed(
        &self,
        schedule: &Self::Schedule,
        stream: Self::Stream,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Duration> {
        let start = Instant::now();
        work()?;
        self.finish(schedule, stream)?;
        Ok(start.elapsed())
    }

    /// Evicts caches before a timed run, where the backend can.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    fn flush_caches(&self, _stream: Self::Stream) -> Result<()> {
        Ok(())
    }
}

/// The convenience call: schedule, workspace, run and wait, on tensors where the backend's tensors live.
///
/// A loop over layers should make the schedule and the workspace once instead, and call [`MlaBackend::run`].
///
/// # Errors
/// As [`MlaBackend::run`] and [`MlaBackend::finish`].
pub fn flash_mla_with_kvcache<B: MlaBackend + ?Sized>(
    backend: &B,
    problem: &Problem,
    options: &ScheduleOptions,
    inputs: &Inputs<'_>,
    outputs: &mut Outputs<'_>,
    stream: B::Stream,
) -> Result<()> {
    let schedule = backend.schedule(problem, options, inputs, stream)?;
    let mut scratch = backend.alloc(backend.workspace_bytes(problem, &schedule))?;
    let mut workspace = backend.workspace(&mut scratch);
    backend.run(problem, &schedule, &mut workspace, inputs, outputs, stream)?;
    backend.finish(&schedule, stream)
}

/// A row of the table of backends that this build contains.
#[derive(Clone, Copy)]
pub struct Registration {
    /// The feature's name, which is the backend's name.
    pub name: &'static str,
    /// What it runs on, in a few words.
    pub target: &'static str,
    /// What it can serve on any device it is for, asked without opening one. The support matrix is made of these answers.
    pub supports: fn(&Problem) -> std::result::Result<(), Unsupported>,
    /// Opens it on the default device.
    pub open: fn() -> Result<Box<dyn HostBackend>>,
}

/// The backends compiled into this build, best first.
pub fn registry() -> &'static [Registration] {
    &[
        #[cfg(feature = "sm90")]
        Registration {
            name: crate::cuda::sm90::NAME,
            target: "NVIDIA Hopper (compute capability 9.0)",
            supports: crate::cuda::sm90::supports,
            open: || Ok(Box::new(crate::cuda::sm90::Sm90Backend::new()?)),
        },
        #[cfg(feature = "cuda")]
        Registration {
            name: crate::cuda::portable::NAME,
            target: "NVIDIA of compute capability 7.5 and later",
            supports: crate::cuda::portable::supports,
            open: || Ok(Box::new(crate::cuda::portable::first_device()?)),
        },
        #[cfg(feature = "hip")]
        Registration {
            name: "hip",
            target: "AMD and Hygon through HIP (waves of 64)",
            supports: |problem| crate::driver::supports("hip", problem),
            open: || Ok(Box::new(crate::driver::open("hip")?)),
        },
        #[cfg(feature = "musa")]
        Registration {
            name: "musa",
            target: "Moore Threads through MUSA (warps of 32 or 128)",
            supports: |problem| crate::driver::supports("musa", problem),
            open: || Ok(Box::new(crate::driver::open("musa")?)),
        },
        #[cfg(feature = "maca")]
        Registration {
            name: "maca",
            target: "MetaX through MACA (waves of 64)",
            supports: |problem| crate::driver::supports("maca", problem),
            open: || Ok(Box::new(crate::driver::open("maca")?)),
        },
        #[cfg(feature = "corex")]
        Registration {
            name: "corex",
            target: "Iluvatar CoreX (warps of 64)",
            supports: |problem| crate::driver::supports("corex", problem),
            open: || Ok(Box::new(crate::driver::open("corex")?)),
        },
        #[cfg(feature = "wgpu")]
        Registration {
            name: crate::wgpu::NAME,
            target: "any adapter of Vulkan, Metal or DX12, through WGSL",
            supports: crate::wgpu::supports,
            open: || Ok(Box::new(crate::wgpu::WgpuBackend::new()?)),
        },
        #[cfg(feature = "cpu")]
        Registration {
            name: "cpu",
            target: "any CPU (AVX-512, AVX2, NEON, portable)",
            supports: |_| Ok(()),
            open: || Ok(Box::new(crate::cpu::CpuBackend::new()?)),
        },
        #[cfg(feature = "onnx")]
        Registration {
            name: crate::onnx::NAME,
            target: "NPU compilers that take ONNX; executed here on the CPU",
            supports: crate::onnx::supports,
            open: || Ok(Box::new(crate::onnx::OnnxBackend::new())),
        },
    ]
}

/// Opens a backend by name.
///
/// # Errors
/// [`MlaError::Absent`] where this build does not contain it or it cannot run here.
pub fn open(name: &str) -> Result<Box<dyn HostBackend>> {
    match registry().iter().find(|r| r.name == name) {
        Some(registration) => (registration.open)(),
        None => {
            let built: Vec<_> = registry().iter().map(|r| r.name).collect();
            Err(MlaError::Absent {
                backend: name.to_string(),
                reason: format!("this build contains {}", built.join(", ")),
            })
        }
    }
}

/// A backend that was passed over, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// The backend's name.
    pub name: &'static str,
    /// Absent or unsupported, with the reason.
    pub reason: MlaError,
}

/// Opens the best backend that runs here and supports the problem.
///
/// # Errors
/// Every backend of the build with its refusal.
pub fn select(problem: &Problem) -> std::result::Result<Box<dyn HostBackend>, Vec<Refusal>> {
    let mut refusals = Vec::new();
    for registration in registry() {
        let opened = (registration.open)().and_then(|b| match b.supports(problem) {
            Ok(()) => Ok(b),
            Err(refused) => Err(refused.into()),
        });
        match opened {
            Ok(backend) => return Ok(backend),
            Err(reason) => refusals.push(Refusal { name: registration.name, reason }),
        }
    }
    Err(refusals)
}
