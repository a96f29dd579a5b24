//! The schedule: made by a kernel, from lengths that stay on the device.

use std::ffi::c_void;
use std::sync::Arc;

use super::params::ScheduleParams;
use super::variant::{TILE_M, m_tiles};
use crate::device::{
    Api, DevicePlan, Function, HostPlan, Launch, Plan, PlanAddresses, STATUS_OK, Stream, usable_pages_per_seq,
};
use crate::error::Result;
use crate::problem::Problem;
use crate::schedule::{DEFAULT_OVERHEAD_BLOCKS, ScheduleOptions, SplitPolicy, num_sm_parts};
use crate::tensor::TensorView;

/// What the status word stands for, in words.
pub(super) const FAILURE: &str = "its length or a block-table entry it uses is out of range";

/// Most parts: what the schedule and combine kernels keep track of.
pub(super) const MAX_PARTS: (usize, &str) = (1024, "1..=1024");

/// An overhead beyond any request, where splitting never pays.
const MAX_OVERHEAD_BLOCKS: u32 = 1 << 26;

/// Threads of the schedule kernel, which is one block.
const SCHEDULE_THREADS: u32 = 512;

/// Bytes that a slot takes for one M tile of one KV head: three a value of partial output (`PARTIAL_BYTES`, tile.h), and
/// two numbers for each row (`PARTIAL_ROWS`).
const SLOT_OUT_BYTES: usize = TILE_M * 512 * 3;
const SLOT_ROWS_BYTES: usize = TILE_M * 2 * 4;

/// A plan on the device, in upstream's layout, with the status word of the runs that use it.
///
/// Reused for all layers of a step. [`schedule_into`](super::Sm90Backend::schedule_into) plans again in place.
pub struct Sm90Schedule {
    /// Its scratch memory is an i64 a request: sums of costs, and then the list of split requests.
    memory: DevicePlan,
}

impl Sm90Schedule {
    pub(super) fn new(
        device: &Arc<dyn Api>,
        multiprocessors: u32,
        problem: &Problem,
        options: &ScheduleOptions,
    ) -> Result<Sm90Schedule> {
        let plan = Plan::new(problem, options, num_sm_parts(multiprocessors as usize, problem), MAX_PARTS)?;
        Ok(Sm90Schedule { memory: DevicePlan::new(device, plan, size_of::<i64>())? })
    }

    /// Enqueues the schedule kernel.
    pub(super) fn plan(
        &mut self,
        kernel: &Function,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
    ) -> Result<()> {
        self.memory.again(problem, cache_seqlens, stream, |plan, at, cache_seqlens| {
            let mut params = schedule_params(problem, plan, &at, cache_seqlens);
            let launch = Launch::row(kernel, 1, SCHEDULE_THREADS, true)?;
            // SAFETY: the kernel's one parameter. It reads b lengths, which the view vouches for, and writes the three
            // arrays of this schedule, which have room for at least b requests.
            unsafe { launch.enqueue(kernel, stream, &mut [(&raw mut params).cast::<c_void>()]) }
        })
    }

    /// How it cuts what.
    pub(super) fn shape(&self) -> &Plan {
        self.memory.plan()
    }

    /// What the decode kernels read: `parts`, `num_splits`, the split requests as `scratch`, the status word.
    pub(super) fn addresses(&self) -> PlanAddresses {
        self.memory.addresses()
    }

    /// Parallel parts.
    pub fn num_parts(&self) -> usize {
        self.memory.plan().num_parts()
    }
    /// Requests planned for.
    pub fn b(&self) -> usize {
        self.memory.plan().b()
    }

    /// Checks that the schedule was made for a problem of these shapes.
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        self.memory.plan().check(problem)
    }

    pub(super) fn workspace_layout(&self, problem: &Problem) -> (usize, usize) {
        workspace_layout(problem, self.memory.plan())
    }

    pub(super) fn workspace_bytes(&self, problem: &Problem) -> usize {
        let (out, rows) = self.workspace_layout(problem);
        out.saturating_add(rows)
    }

    /// The smallest request that a device-side check refused so far, without waiting: work still enqueued may add to
    /// it. [`MlaBackend::finish`](crate::MlaBackend::finish) waits, reports it and clears it.
    pub fn poll(&self) -> Option<usize> {
        failure(self.memory.status())
    }

    /// As [`poll`](Self::poll), and clears it.
    pub(super) fn take_failure(&self) -> Option<usize> {
        failure(self.memory.take_status())
    }

    /// Waits for the device and copies the plan to the host.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub fn to_host(&self) -> Result<HostPlan> {
        self.memory.to_host()
    }
}

/// What the schedule kernel is told.
pub(super) fn schedule_params(
    problem: &Problem,
    plan: &Plan,
    at: &PlanAddresses,
    cache_seqlens: u64,
) -> ScheduleParams {
    let page_size = problem.page_size().min(i32::MAX as usize) as i32;
    ScheduleParams {
        cache_seqlens,
        parts: at.parts,
        num_splits: at.num_splits,
        scratch: at.scratch,
        b: problem.b() as i32,
        num_parts: plan.num_parts() as i32,
        max_len: usable_pages_per_seq(problem).saturating_mul(page_size),
        fixed_split_blocks: plan.fixed_split_blocks(),
        ..costs(plan.policy())
    }
}

/// Slots of partial results that a run may write: known without the lengths, so an upper bound.
fn slots(problem: &Problem, plan: &Plan) -> usize {
    match plan.policy() {
        // A part shares at most its first and its last request with others.
        SplitPolicy::Balanced { .. } => 2 * plan.num_parts(),
        SplitPolicy::BatchInvariant { split_blocks } => {
            plan.capacity().saturating_mul(Plan::max_fixed_splits(problem, split_blocks))
        }
    }
}

/// Bytes of the partial outputs, then of what there is about their rows.
pub(super) fn workspace_layout(problem: &Problem, plan: &Plan) -> (usize, usize) {
    let tiles = slots(problem, plan).saturating_mul(m_tiles(problem)).saturating_mul(problem.h_kv());
    (tiles.saturating_mul(SLOT_OUT_BYTES), tiles.saturating_mul(SLOT_ROWS_BYTES))
}

/// The request that a status word names.
fn failure(status: i32) -> Option<usize> {
    usize::try_from(status).ok().filter(|_| status != STATUS_OK)
}

/// The cost model, in eighths of the time of a block. Upstream's overhead, the default of
/// [`SplitPolicy::Balanced`], stands for what was measured on these kernels; any other is taken as it is.
fn costs(policy: SplitPolicy) -> ScheduleParams {
    let cost_segment = match policy {
        SplitPolicy::Balanced { overhead_blocks } if overhead_blocks != DEFAULT_OVERHEAD_BLOCKS => {
            8 * overhead_blocks.min(MAX_OVERHEAD_BLOCKS) as i32
        }
        _ => 48,
    };
    ScheduleParams { cost_segment, cost_split: 8, cost_combine: 16, min_split_blocks: 1, ..Default::default() }
}
