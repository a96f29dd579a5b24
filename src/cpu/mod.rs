//! The CPU backend: reads pages in place, on a rayon pool, with the best instruction set this CPU has.

use std::sync::Arc;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::{Schedule, ScheduleOptions, get_mla_metadata};
use crate::tensor::Device;
use crate::workspace::Workspace;

mod buffer;
mod combine;
mod engine;
mod geometry;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod simd;
mod stage;
mod tile;
mod wide;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use buffer::CpuBuffer;
pub use isa::{ISA_VARIABLE, Isa};

/// The CPU backend.
///
/// Work is cut by the schedule alone, so results have the same bits whatever the number of threads.
pub struct CpuBackend {
    info: BackendInfo,
    isa: Isa,
    pool: Option<Arc<rayon::ThreadPool>>,
    threads: usize,
}

impl CpuBackend {
    /// Runs on rayon's global pool, with the instruction set that suits this CPU best ([`Isa::preferred`]) or the one that the environment
    /// variable `POLYMLA_CPU_ISA` names: `portable`, `neon`, `avx2`, `avx512f`, `avx512bf16`.
    ///
    /// # Errors
    /// [`MlaError::Environment`] where the variable names an instruction set this CPU lacks, or none.
    pub fn new() -> Result<Self> {
        Self::build(Isa::from_environment()?, None)
    }

    /// Runs on the caller's pool. Otherwise as [`new`](Self::new).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_pool(pool: Arc<rayon::ThreadPool>) -> Result<Self> {
        Self::build(Isa::from_environment()?, Some(pool))
    }

    /// Runs on rayon's global pool with the instruction set given.
    ///
    /// # Errors
    /// [`MlaError::Absent`] where this CPU lacks it.
    pub fn with_isa(isa: Isa) -> Result<Self> {
        Self::build(isa, None)
    }

    /// Runs on the caller's pool with the instruction set given.
    ///
    /// # Errors
    /// As [`with_isa`](Self::with_isa).
    pub fn with_isa_and_pool(isa: Isa, pool: Arc<rayon::ThreadPool>) -> Result<Self> {
        Self::build(isa, Some(pool))
    }

    fn build(isa: Isa, pool: Option<Arc<rayon::ThreadPool>>) -> Result<Self> {
        if !isa.is_available() {
            let reason = format!("this CPU has no {isa}");
            return Err(MlaError::Absent { backend: "cpu".into(), reason });
        }
        let threads = pool.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads());
        let plural = if threads == 1 { "" } else { "s" };
        let info = BackendInfo {
            name: "cpu",
            device_name: format!("{} ({isa}, {threads} thread{plural})", std::env::consts::ARCH),
            device: Device::Host,
            evidence: Evidence::T5,
        };
        Ok(CpuBackend { info, isa, pool, threads })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads work is spread over.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `f(0)` to `f(n - 1)` on the pool and waits for all of them.
    fn spread(&self, n: usize, f: &(dyn Fn(usize) + Sync)) {
        let all = || (0..n).into_par_iter().with_max_len(1).for_each(f);
        match &self.pool {
            _ if n <= 1 => (0..n).for_each(f),
            Some(pool) => pool.install(all),
            None => all(),
        }
    }

    /// Parts for a batch of `blocks` blocks: one for each 16 blocks, which keeps the merging of partial results below a
    /// twentieth of the work and gives enough parts for the cores of a large machine. The number of threads must not
    /// count: it would change where requests are cut, and so the bits of the results.
    fn default_parts(lengths: &[i32]) -> usize {
        let blocks: usize = lengths.iter().map(|len| len.max(&0).unsigned_abs() as usize / BLOCK_TOKENS + 1).sum();
        blocks.div_ceil(16).clamp(1, 256)
    }
}

impl MlaBackend for CpuBackend {
    type Buffer = CpuBuffer;
    type Schedule = Schedule;
    type Stream = ();

    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        match self.isa.kernels(problem) {
            Some(_) => Ok(()),
            None => Err(Unsupported {
                backend: "cpu",
                param: "kv_format",
                value: problem.kv_format().to_string(),
                limit: "bf16, f16, f32".into(),
            }),
        }
    }

    fn alloc(&self, bytes: usize) -> Result<CpuBuffer> {
        CpuBuffer::new(bytes)
    }

    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<CpuBuffer> {
        CpuBuffer::repeated(tile, bytes)
    }

    fn download(&self, buffer: &CpuBuffer, bytes: &mut [u8]) -> Result<()> {
        buffer.read(bytes)
    }

    fn schedule(&self, problem: &Problem, options: &ScheduleOptions, inputs: &Inputs<'_>, _: ()) -> Result<Schedule> {
        inputs.validate(problem, Device::Host)?;
        let lengths = inputs.check_host_lengths(problem)?;
        let parts = options.num_sm_parts.unwrap_or_else(|| Self::default_parts(&lengths));
        get_mla_metadata(&lengths, parts, options.policy)
    }

    fn workspace_bytes(&self, problem: &Problem, schedule: &Schedule) -> usize {
        engine::Plan::new(problem, schedule, self.threads).bytes
    }

    fn run(
        &self,
        problem: &Problem,
        schedule: &Schedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        _: (),
    ) -> Result<()> {
        self.supports(problem)?;
        inputs.validate(problem, Device::Host)?;
        outputs.validate(problem, inputs, Device::Host)?;
        inputs.check_host_tables(problem)?;
        schedule.check(problem, &inputs.host_seqlens()?)?;
        let plan = engine::Plan::new(problem, schedule, self.threads);
        let memory = workspace.host(plan.bytes)?.as_mut_ptr();
        let call = geometry::Call::new(problem, inputs, outputs)?;
        if let Some(kernels) = self.isa.kernels(problem) {
            // SAFETY: everything was validated above; the workspace is aligned and large enough; the instruction set
            // was found on this CPU when the backend was built.
            unsafe { engine::run(&call, schedule, &plan, kernels, memory, |n, f| self.spread(n, f)) };
        }
        Ok(())
    }

    fn finish(&self, _: &Schedule, _: ()) -> Result<()> {
        Ok(())
    }
}
