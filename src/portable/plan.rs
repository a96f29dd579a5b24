//! The schedule of the portable kernels: what their kernels are told, and what their status word says.

use std::ffi::c_void;
use std::sync::Arc;

use super::params::{DecodeParams, ScheduleParams};
use super::tiles::{MERGE_THREADS, PIECE_BYTES, PIECE_ROWS, PIECES_A_ROW, THREADS};
use crate::device::{Api, DevicePlan, Function, HostPlan, Launch, Plan, STATUS_OK, Stream, usable_pages_per_seq};
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::schedule::{DEFAULT_OVERHEAD_BLOCKS, ScheduleOptions, SplitPolicy};
use crate::tensor::TensorView;

/// Most parts that a caller may ask for.
const MAX_PARTS: (usize, &str) = (65_535, "1..=65535");

/// Groups of 32 lanes in a block of the combine kernel, and the columns that one merges at a time.
const COMBINE_GROUPS: i32 = THREADS as i32 / 32;
const COMBINE_COLUMNS: usize = 128;

/// Warps in a block of the merge kernel.
const MERGE_WARPS: i32 = MERGE_THREADS as i32 / 32;

/// Blocks of the merge kernel that a large device runs at a time: 132 multiprocessors, one each.
const CONCURRENT_MERGES: u64 = 132;

/// Units that a large device merges at a time: 132 multiprocessors, 3 blocks each of 8 groups.
const CONCURRENT_UNITS: u64 = 3168;

/// Blocks of the combine kernel, about: several for each multiprocessor of any device.
const MAX_COMBINE_BLOCKS: u64 = 2048;

/// Blocks of the merge kernel, about. One to a multiprocessor at a time, each new round costs as much as its work.
const MAX_MERGE_BLOCKS: u64 = 2 * CONCURRENT_MERGES;

/// Rows of pieces that a slot has.
fn piece_groups(problem: &Problem) -> usize {
    (problem.s_q() * problem.heads_per_kv()).div_ceil(PIECE_ROWS).saturating_mul(problem.h_kv())
}

/// How partial results lie in the workspace, and by which kernel they are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Partials {
    /// Rows of f32, for the combine kernel.
    Rows,
    /// `backends/portable/pieces.h`, for the merge kernel.
    Pieces,
}

impl Partials {
    /// Bytes of the partial outputs in a slot.
    fn bytes(self, problem: &Problem) -> usize {
        match self {
            Partials::Rows => (problem.s_q() * problem.h_q()).saturating_mul(problem.head_dim_v()).saturating_mul(4),
            Partials::Pieces => piece_groups(problem).saturating_mul(PIECES_A_ROW * PIECE_BYTES),
        }
    }

    /// What there is to merge for one request: rows x [`COMBINE_COLUMNS`], or turns of a block's 16 warps.
    fn units(self, problem: &Problem, ways: i32) -> u64 {
        match self {
            Partials::Rows => {
                (problem.s_q() * problem.h_q()) as u64 * problem.head_dim_v().div_ceil(COMBINE_COLUMNS) as u64
            }
            Partials::Pieces => (piece_groups(problem) * PIECES_A_ROW) as u64 * ways as u64 / MERGE_WARPS as u64,
        }
    }

    /// Threads of a block of the kernel that merges.
    pub(super) fn threads(self) -> u32 {
        match self {
            Partials::Rows => THREADS,
            Partials::Pieces => MERGE_THREADS,
        }
    }

    /// Blocks of the kernel that merges.
    pub(super) fn blocks(self, problem: &Problem, params: &DecodeParams) -> u64 {
        let units = self.units(problem, params.combine_ways);
        problem.b() as u64 * units.div_ceil(params.combine_units as u64)
    }

    /// Groups that share the splits of one unit, in a balanced run: no more than a request has splits on average, and none
    /// where the device has other work for them.
    fn ways(self, problem: &Problem, splits: u64) -> i32 {
        let units = self.units(problem, 1).saturating_mul(problem.b() as u64).max(1);
        let (room, most) = match self {
            Partials::Rows => (CONCURRENT_UNITS / units, COMBINE_GROUPS),
            Partials::Pieces => (CONCURRENT_MERGES / units, MERGE_WARPS),
        };
        1 << room.min(splits).clamp(1, most as u64).ilog2()
    }

    /// Units of a block: as many as it merges at a time, or as many times that as leave [`MAX_COMBINE_BLOCKS`] or
    /// [`MAX_MERGE_BLOCKS`].
    fn units_a_block(self, problem: &Problem, ways: i32) -> i32 {
        let units = self.units(problem, ways).saturating_mul(problem.b() as u64);
        let (turn, blocks) = match self {
            Partials::Rows => ((COMBINE_GROUPS / ways) as u64, MAX_COMBINE_BLOCKS),
            Partials::Pieces => (1, MAX_MERGE_BLOCKS),
        };
        let turns = units.div_ceil(blocks).div_ceil(turn).max(1);
        i32::try_from(turns * turn).unwrap_or(i32::MAX)
    }
}

/// The overhead that the schedule kernel is told. Upstream's, the default, leaves it open (-1): the kernel takes the one whose
/// plan it expects to end first. Any other is taken as it is.
fn overhead(policy: SplitPolicy) -> i32 {
    match policy {
        SplitPolicy::Balanced { overhead_blocks: DEFAULT_OVERHEAD_BLOCKS } => -1,
        SplitPolicy::Balanced { overhead_blocks } => i32::try_from(overhead_blocks).unwrap_or(i32::MAX),
        SplitPolicy::BatchInvariant { .. } => 0,
    }
}

/// What merging a split costs, in 1/1024 of a block's time. Measured on an H200: 130 splits of 128 rows took 19 us, where a
/// block took 3.4.
fn merge_cost(problem: &Problem) -> i32 {
    i32::try_from((problem.s_q() * problem.h_q()).div_ceil(8).saturating_mul(3)).unwrap_or(i32::MAX)
}

/// A plan on the device, in upstream's layout, with the status word of the runs that use it.
///
/// Reused for all layers of a step. [`schedule_into`](super::PortableBackend::schedule_into) plans again in place.
pub struct PortableSchedule {
    memory: DevicePlan,
}

impl PortableSchedule {
    pub(super) fn new(
        device: &Arc<dyn Api>,
        problem: &Problem,
        options: &ScheduleOptions,
        default_parts: usize,
    ) -> Result<PortableSchedule> {
        let plan = Plan::new(problem, options, default_parts, MAX_PARTS)?;
        Ok(PortableSchedule { memory: DevicePlan::new(device, plan, 0)? })
    }

    /// Enqueues the schedule kernel.
    pub(super) fn enqueue(
        &mut self,
        kernel: &Function,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
    ) -> Result<()> {
        self.memory.again(problem, cache_seqlens, stream, |plan, at, cache_seqlens| {
            let mut params = ScheduleParams {
                cache_seqlens,
                parts: at.parts,
                num_splits: at.num_splits,
                status: at.status,
                max_tokens: i64::from(usable_pages_per_seq(problem)) * problem.page_size() as i64,
                b: problem.b() as i32,
                num_parts: plan.num_parts() as i32,
                overhead_blocks: overhead(plan.policy()),
                fixed_split_blocks: plan.fixed_split_blocks(),
                merge_cost: merge_cost(problem),
                ..Default::default()
            };
            // It waits for nothing by itself, so it must not start early.
            let launch = Launch::row(kernel, 1, THREADS, false)?;
            // SAFETY: the kernel's one parameter. It reads b lengths, which the view vouches for, and writes both arrays
            // of this schedule, which have room for at least b requests.
            unsafe { launch.enqueue(kernel, stream, &mut [(&raw mut params).cast::<c_void>()]) }
        })
    }

    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        self.memory.plan().check(problem)
    }

    /// Slots of partial results: the splits of the batch, known without the lengths, so an upper bound.
    fn slots(&self, problem: &Problem) -> usize {
        let plan = self.memory.plan();
        let slots = match plan.policy() {
            // Every request has a split, and the end of every part may add one.
            SplitPolicy::Balanced { .. } => plan.capacity() + plan.num_parts(),
            SplitPolicy::BatchInvariant { split_blocks } => {
                plan.capacity().saturating_mul(Plan::max_fixed_splits(problem, split_blocks))
            }
        };
        slots.min(i32::MAX as usize)
    }

    /// Bytes of the partial outputs, then of the partial lse.
    fn workspace_layout(&self, problem: &Problem, partials: Partials) -> (usize, usize) {
        let slots = self.slots(problem);
        // The lse follows the outputs; both stay aligned to 16 bytes.
        let out = slots.saturating_mul(partials.bytes(problem));
        let rows = slots.saturating_mul(problem.s_q() * problem.h_q());
        (out.checked_next_multiple_of(16).unwrap_or(usize::MAX), rows.saturating_mul(4))
    }

    /// Bytes of workspace that a run needs.
    pub(super) fn workspace_bytes(&self, problem: &Problem, partials: Partials) -> usize {
        let (out, lse) = self.workspace_layout(problem, partials);
        out.saturating_add(lse)
    }

    /// Fills in what the plan and the workspace decide.
    pub(super) fn fill(&self, params: &mut DecodeParams, problem: &Problem, workspace: u64, partials: Partials) {
        let (plan, at) = (self.memory.plan(), self.memory.addresses());
        params.parts = at.parts;
        params.num_splits = at.num_splits;
        params.partial_out = workspace;
        params.partial_lse = workspace + self.workspace_layout(problem, partials).0 as u64;
        params.status = at.status;
        params.num_parts = plan.num_parts() as i32;
        params.requests_a_part = problem.b() as f32 / plan.num_parts().max(1) as f32;
        params.fixed_split_blocks = plan.fixed_split_blocks();
        params.slots = self.slots(problem) as i32;
        // A batch-invariant run must add in one order in every batch.
        let splits = (problem.b() + plan.num_parts()) as u64 / problem.b().max(1) as u64;
        params.combine_ways = match plan.policy() {
            SplitPolicy::BatchInvariant { .. } => 4,
            SplitPolicy::Balanced { .. } => partials.ways(problem, splits),
        };
        params.combine_units = partials.units_a_block(problem, params.combine_ways);
    }

    /// What device-side checks found so far, cleared.
    pub(super) fn take_verdict(&self) -> Result<()> {
        self.verdict(self.memory.take_status())
    }

    /// What device-side checks found so far, without waiting: work still enqueued may add to it.
    /// [`MlaBackend::finish`](crate::MlaBackend::finish) waits, reports it and clears it.
    ///
    /// # Errors
    /// As [`MlaBackend::finish`](crate::MlaBackend::finish).
    pub fn poll(&self) -> Result<()> {
        self.verdict(self.memory.status())
    }

    fn verdict(&self, status: i32) -> Result<()> {
        match usize::try_from(status) {
            Ok(_) if status == STATUS_OK => Ok(()),
            Ok(request) if request >= self.b() => Err(MlaError::Overflow {
                param: "schedule blocks with overhead",
                value: "more than 32 bits hold".into(),
                limit: i32::MAX as u64,
            }),
            Ok(request) => Err(MlaError::DeviceCheck { request, reason: FAILURE }),
            // No kernel writes a negative number.
            Err(_) => Err(MlaError::DeviceCheck { request: 0, reason: "the status word was overwritten" }),
        }
    }

    /// Parallel parts.
    pub fn num_parts(&self) -> usize {
        self.memory.plan().num_parts()
    }
    /// Requests planned for.
    pub fn b(&self) -> usize {
        self.memory.plan().b()
    }

    /// Waits for the device and copies the plan to the host.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub fn to_host(&self) -> Result<HostPlan> {
        self.memory.to_host()
    }
}

/// What the status word stands for, in words.
const FAILURE: &str = "its length, a visible length or a block-table entry it uses is out of range";
