//! The schedule: made by a kernel, from lengths that stay on the device.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::params::ScheduleParams;
use super::variant::{TILE_M, m_tiles};
use crate::cuda::context::Context;
use crate::cuda::kernels::Function;
use crate::cuda::launch::Launch;
use crate::cuda::memory::{DeviceBuffer, HostWord};
use crate::cuda::stream::Stream;
use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::{DEFAULT_OVERHEAD_BLOCKS, PartMetadata, ScheduleOptions, SplitPolicy, num_sm_parts};
use crate::tensor::{DType, TensorView};

/// What the status word stands for, in words.
pub(super) const FAILURE: &str = "its length or a block-table entry it uses is out of range";

/// The status word while nothing failed; kernels write the smallest failed request over it.
const NO_FAILURE: i32 = i32::MAX;

/// Longest request in tokens: its last block must still be counted in 32 bits.
const MAX_TOKENS: u64 = i32::MAX as u64 + 1 - BLOCK_TOKENS as u64;

/// Most parts: what the schedule and combine kernels keep track of.
const MAX_PARTS: usize = 1024;

/// An overhead beyond any request, where splitting never pays.
const MAX_OVERHEAD_BLOCKS: u32 = 1 << 26;

/// Threads of the schedule kernel, which is one block.
const SCHEDULE_THREADS: u32 = 512;

/// Bytes of partial output and partial lse that a slot takes for one M tile of one KV head.
const SLOT_OUT_BYTES: usize = TILE_M * 512 * 4;
const SLOT_LSE_BYTES: usize = TILE_M * 4;

/// A plan on the device, in upstream's layout, with the status word of the runs that use it.
///
/// Reused for all layers of a step. [`schedule_into`](super::Sm90Backend::schedule_into) plans again in place.
pub struct Sm90Schedule {
    /// `parts` [num_parts, 8] i32, then `num_splits` [capacity + 1] i32, then scratch [capacity + 1] i64.
    buffer: DeviceBuffer,
    status: HostWord,
    shape: Shape,
    /// Requests planned for, and for how many there is room.
    b: usize,
    capacity: usize,
    num_parts: usize,
    policy: SplitPolicy,
}

/// What of a problem a schedule depends on, beside the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    s_q: usize,
    h_q: usize,
    h_kv: usize,
    page_size: usize,
    max_pages_per_seq: usize,
    num_pages: usize,
}

impl Shape {
    fn of(p: &Problem) -> Shape {
        Shape {
            s_q: p.s_q(),
            h_q: p.h_q(),
            h_kv: p.h_kv(),
            page_size: p.page_size(),
            max_pages_per_seq: p.max_pages_per_seq(),
            num_pages: p.num_pages(),
        }
    }

    fn check(&self, problem: &Problem) -> Result<()> {
        let (mine, its) = (self, Shape::of(problem));
        for (param, value, limit) in [
            ("s_q", mine.s_q, its.s_q),
            ("h_q", mine.h_q, its.h_q),
            ("h_kv", mine.h_kv, its.h_kv),
            ("page_size", mine.page_size, its.page_size),
            ("max_pages_per_seq", mine.max_pages_per_seq, its.max_pages_per_seq),
            ("num_pages", mine.num_pages, its.num_pages),
        ] {
            if value != limit {
                return Err(MlaError::ScheduleMismatch { param, value: value as i64, limit: limit as i64 });
            }
        }
        Ok(())
    }
}

/// Columns of the block table that kernels look at. None without pages, so that no length but 0 is valid; and no more
/// than 32-bit token counts can reach.
pub(super) fn usable_pages_per_seq(problem: &Problem) -> i32 {
    if problem.num_pages() == 0 {
        return 0;
    }
    let reachable = MAX_TOKENS / problem.page_size() as u64;
    (problem.max_pages_per_seq() as u64).min(reachable) as i32
}

/// A plan on the host, for a look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPlan {
    /// [num_sm_parts, 8] i32, one row a part.
    pub tile_scheduler_metadata: Vec<PartMetadata>,
    /// [b + 1] i32, cumulative.
    pub num_splits: Vec<i32>,
}

impl Sm90Schedule {
    pub(super) fn new(context: &Arc<Context>, problem: &Problem, options: &ScheduleOptions) -> Result<Sm90Schedule> {
        let parts = options
            .num_sm_parts
            .unwrap_or_else(|| num_sm_parts(context.facts().multiprocessors as usize, problem).min(MAX_PARTS));
        if parts == 0 || parts > MAX_PARTS {
            let value = i64::try_from(parts).unwrap_or(i64::MAX);
            return Err(MlaError::Parameter { param: "num_sm_parts", value, limit: "1..=1024" });
        }
        if let SplitPolicy::BatchInvariant { split_blocks } = options.policy
            && (split_blocks == 0 || split_blocks > i32::MAX as u32)
        {
            let value = i64::from(split_blocks);
            return Err(MlaError::Parameter { param: "split_blocks", value, limit: "1..=2147483647" });
        }
        let capacity = problem.b();
        let mut schedule = Sm90Schedule {
            buffer: DeviceBuffer::alloc(context, Self::layout(parts, capacity).2 + (capacity + 1) * 8)?,
            status: HostWord::new(context, NO_FAILURE)?,
            shape: Shape::of(problem),
            b: capacity,
            capacity,
            num_parts: parts,
            policy: options.policy,
        };
        // Parts without work and requests without splits, should a kernel ever look before the plan is there.
        schedule.buffer.write(0, &vec![0; schedule.buffer.bytes()])?;
        Ok(schedule)
    }

    /// Byte offsets of `parts`, `num_splits` and the scratch memory.
    fn layout(num_parts: usize, capacity: usize) -> (usize, usize, usize) {
        let num_splits = num_parts * size_of::<PartMetadata>();
        (0, num_splits, (num_splits + (capacity + 1) * 4).next_multiple_of(8))
    }

    fn offsets(&self) -> (usize, usize, usize) {
        Self::layout(self.num_parts, self.capacity)
    }

    /// Enqueues the schedule kernel.
    pub(super) fn plan(
        &mut self,
        kernel: &Function,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
    ) -> Result<()> {
        self.shape.check(problem)?;
        let b = problem.b();
        if b > self.capacity {
            return Err(MlaError::ScheduleMismatch { param: "b", value: self.capacity as i64, limit: b as i64 });
        }
        let device = kernel.context().device();
        if cache_seqlens.device() != device {
            return Err(MlaError::WrongDevice { param: "cache_seqlens", value: cache_seqlens.device(), limit: device });
        }
        if cache_seqlens.dtype() != DType::I32 {
            let (value, limit) = (cache_seqlens.dtype(), DType::I32);
            return Err(MlaError::DTypeMismatch { param: "cache_seqlens", value, limit });
        }
        if cache_seqlens.shape() != [b] {
            let value = cache_seqlens.shape().first().copied().unwrap_or(0);
            return Err(MlaError::Shape { param: "cache_seqlens", dim: 0, value, limit: b });
        }
        let (parts, num_splits, scratch) = self.offsets();
        let base = self.buffer.address();
        let mut params = ScheduleParams {
            cache_seqlens: cache_seqlens.address().unwrap_or(0),
            parts: base + parts as u64,
            num_splits: base + num_splits as u64,
            scratch: base + scratch as u64,
            b: b as i32,
            num_parts: self.num_parts as i32,
            max_len: usable_pages_per_seq(problem).saturating_mul(problem.page_size().min(i32::MAX as usize) as i32),
            fixed_split_blocks: self.fixed_split_blocks(),
            ..self.costs()
        };
        let launch = Launch { grid: [1; 3], block: SCHEDULE_THREADS, programmatic: true };
        // SAFETY: the kernel's one parameter. It reads b lengths, which the view vouches for, and writes the three
        // arrays of this schedule, which have room for `capacity` >= b requests.
        unsafe { launch.enqueue(kernel, stream, &mut [(&raw mut params).cast::<c_void>()])? };
        // A captured run still visits the requests beyond this batch: they must look unsplit, not like the last plan.
        self.buffer.fill_words(num_splits / 4 + b + 1, self.capacity - b, 0, stream)?;
        self.b = b;
        Ok(())
    }

    /// The cost model, in eighths of the time of a block. Upstream's overhead, the default of
    /// [`SplitPolicy::Balanced`], stands for what was measured on these kernels; any other is taken as it is.
    fn costs(&self) -> ScheduleParams {
        let cost_segment = match self.policy {
            SplitPolicy::Balanced { overhead_blocks } if overhead_blocks != DEFAULT_OVERHEAD_BLOCKS => {
                8 * overhead_blocks.min(MAX_OVERHEAD_BLOCKS) as i32
            }
            _ => 48,
        };
        ScheduleParams { cost_segment, cost_split: 8, cost_combine: 16, min_split_blocks: 1, ..Default::default() }
    }

    /// Blocks a split in batch-invariant mode, 0 otherwise.
    pub(super) fn fixed_split_blocks(&self) -> i32 {
        match self.policy {
            SplitPolicy::Balanced { .. } => 0,
            SplitPolicy::BatchInvariant { split_blocks } => split_blocks as i32,
        }
    }

    /// The buffers the decode kernels read: `parts`, `num_splits`, the status word.
    pub(super) fn addresses(&self) -> (u64, u64, u64) {
        let (parts, num_splits, _) = self.offsets();
        (self.buffer.address() + parts as u64, self.buffer.address() + num_splits as u64, self.status.address())
    }

    /// Parallel parts.
    pub fn num_parts(&self) -> usize {
        self.num_parts
    }
    /// Requests planned for.
    pub fn b(&self) -> usize {
        self.b
    }

    /// Checks that the schedule was made for a problem of these shapes.
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        self.shape.check(problem)?;
        if problem.b() != self.b {
            let (value, limit) = (self.b as i64, problem.b() as i64);
            return Err(MlaError::ScheduleMismatch { param: "b", value, limit });
        }
        Ok(())
    }

    /// Slots of partial results that a run may write: known without the lengths, so an upper bound.
    fn slots(&self, problem: &Problem) -> usize {
        match self.policy {
            // A part shares at most its first and its last request with others.
            SplitPolicy::Balanced { .. } => 2 * self.num_parts,
            SplitPolicy::BatchInvariant { split_blocks } => {
                let tokens = usable_pages_per_seq(problem) as usize * problem.page_size();
                let splits = tokens.div_ceil(BLOCK_TOKENS).div_ceil(split_blocks as usize).max(1);
                self.capacity.saturating_mul(splits)
            }
        }
    }

    /// Bytes of the partial outputs, then of the partial lse.
    pub(super) fn workspace_layout(&self, problem: &Problem) -> (usize, usize) {
        let tiles = self.slots(problem).saturating_mul(m_tiles(problem)).saturating_mul(problem.h_kv());
        (tiles.saturating_mul(SLOT_OUT_BYTES), tiles.saturating_mul(SLOT_LSE_BYTES))
    }

    pub(super) fn workspace_bytes(&self, problem: &Problem) -> usize {
        let (out, lse) = self.workspace_layout(problem);
        out.saturating_add(lse)
    }

    /// The smallest request that a device-side check refused so far, without waiting: work still enqueued may add to
    /// it. [`MlaBackend::finish`](crate::MlaBackend::finish) waits, reports it and clears it.
    pub fn poll(&self) -> Option<usize> {
        usize::try_from(self.status.atomic().load(Ordering::Acquire)).ok().filter(|r| *r != NO_FAILURE as usize)
    }

    /// As [`poll`](Self::poll), and clears it.
    pub(super) fn take_failure(&self) -> Option<usize> {
        usize::try_from(self.status.atomic().swap(NO_FAILURE, Ordering::AcqRel))
            .ok()
            .filter(|r| *r != NO_FAILURE as usize)
    }

    /// Waits for the device and copies the plan to the host.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub fn to_host(&self) -> Result<HostPlan> {
        let mut parts = vec![PartMetadata::default(); self.num_parts];
        let mut num_splits = vec![0i32; self.b + 1];
        let (parts_at, num_splits_at, _) = self.offsets();
        self.buffer.read(parts_at, bytemuck::cast_slice_mut(&mut parts))?;
        self.buffer.read(num_splits_at, bytemuck::cast_slice_mut(&mut num_splits))?;
        Ok(HostPlan { tile_scheduler_metadata: parts, num_splits })
    }
}
