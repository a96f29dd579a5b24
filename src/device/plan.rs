//! A schedule that is made on the device, in upstream's layout: sizes, checks, memory. What a backend's own kernels want
//! beside it is the backend's business.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Api, DeviceBuffer, HostWord, Stream};
use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::{PartMetadata, ScheduleOptions, SplitPolicy};
use crate::tensor::{DType, TensorView};

/// The status word while nothing failed; kernels write the smallest failed request over it.
pub(crate) const STATUS_OK: i32 = i32::MAX;

/// Longest request in tokens: its last block must still be counted in 32 bits.
const MAX_TOKENS: u64 = i32::MAX as u64 + 1 - BLOCK_TOKENS as u64;

/// What of a problem a schedule depends on, beside the batch.
fn shape(p: &Problem) -> [(&'static str, usize); 6] {
    [
        ("s_q", p.s_q()),
        ("h_q", p.h_q()),
        ("h_kv", p.h_kv()),
        ("page_size", p.page_size()),
        ("max_pages_per_seq", p.max_pages_per_seq()),
        ("num_pages", p.num_pages()),
    ]
}

/// Columns of the block table that kernels look at. None without pages, so that no length but 0 is valid; and no more
/// than 32-bit token counts can reach.
pub(crate) fn usable_pages_per_seq(problem: &Problem) -> i32 {
    if problem.num_pages() == 0 {
        return 0;
    }
    let reachable = MAX_TOKENS / problem.page_size() as u64;
    (problem.max_pages_per_seq() as u64).min(reachable) as i32
}

/// The arithmetic of a plan, whatever device holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    shape: [(&'static str, usize); 6],
    /// Requests planned for, and for how many there is room.
    b: usize,
    capacity: usize,
    num_parts: usize,
    policy: SplitPolicy,
}

impl Plan {
    /// A plan for `problem`; `default_parts` where the caller names no number. `limit` is the most parts that the kernels
    /// take, with the words for it.
    ///
    /// # Errors
    /// [`MlaError::Parameter`].
    pub(crate) fn new(
        problem: &Problem,
        options: &ScheduleOptions,
        default_parts: usize,
        limit: (usize, &'static str),
    ) -> Result<Plan> {
        let num_parts = options.parts(default_parts, limit)?;
        let (b, policy) = (problem.b(), options.policy);
        Ok(Plan { shape: shape(problem), b, capacity: b, num_parts, policy })
    }

    /// Byte offset of `num_splits` behind `parts`.
    fn num_splits_offset(&self) -> usize {
        self.num_parts * size_of::<PartMetadata>()
    }
    /// Byte offset of what a backend keeps behind both arrays.
    fn scratch_offset(&self) -> usize {
        (self.num_splits_offset() + (self.capacity + 1) * 4).next_multiple_of(8)
    }
    /// Parallel parts.
    pub(crate) fn num_parts(&self) -> usize {
        self.num_parts
    }
    /// Requests planned for.
    pub(crate) fn b(&self) -> usize {
        self.b
    }
    /// Requests that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }
    /// How it cuts.
    pub(crate) fn policy(&self) -> SplitPolicy {
        self.policy
    }

    /// Blocks a split in batch-invariant mode, 0 otherwise.
    pub(crate) fn fixed_split_blocks(&self) -> i32 {
        match self.policy {
            SplitPolicy::Balanced { .. } => 0,
            SplitPolicy::BatchInvariant { split_blocks } => split_blocks as i32,
        }
    }

    /// Most splits of one request in batch-invariant mode.
    pub(crate) fn max_fixed_splits(problem: &Problem, split_blocks: u32) -> usize {
        let tokens = usable_pages_per_seq(problem) as usize * problem.page_size();
        tokens.div_ceil(BLOCK_TOKENS).div_ceil(split_blocks as usize).max(1)
    }

    fn check_shape(&self, problem: &Problem) -> Result<()> {
        for ((param, value), (_, limit)) in self.shape.into_iter().zip(shape(problem)) {
            if value != limit {
                return Err(MlaError::ScheduleMismatch { param, value: value as i64, limit: limit as i64 });
            }
        }
        Ok(())
    }

    /// Checks that the plan was made for a problem of these shapes.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`].
    pub(crate) fn check(&self, problem: &Problem) -> Result<()> {
        self.check_shape(problem)?;
        if problem.b() != self.b {
            let (value, limit) = (self.b as i64, problem.b() as i64);
            return Err(MlaError::ScheduleMismatch { param: "b", value, limit });
        }
        Ok(())
    }
}

/// A plan on the host, for a look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPlan {
    /// [num_sm_parts, 8] i32, one row a part.
    pub tile_scheduler_metadata: Vec<PartMetadata>,
    /// [b + 1] i32, cumulative.
    pub num_splits: Vec<i32>,
}

/// Where a plan lies on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PlanAddresses {
    pub(crate) parts: u64,
    pub(crate) num_splits: u64,
    pub(crate) scratch: u64,
    pub(crate) status: u64,
}

/// A plan with its memory and the status word of the runs that use it.
pub(crate) struct DevicePlan {
    plan: Plan,
    api: Arc<dyn Api>,
    /// `parts` [num_parts, 8] i32, `num_splits` [capacity + 1] i32, the backend's scratch memory.
    buffer: DeviceBuffer,
    status: HostWord,
}

impl DevicePlan {
    /// Memory for `plan`, with `scratch_bytes` for each request and one more.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn new(api: &Arc<dyn Api>, plan: Plan, scratch_bytes: usize) -> Result<DevicePlan> {
        let bytes = plan.scratch_offset() + (plan.capacity + 1) * scratch_bytes;
        let mut buffer = DeviceBuffer::alloc(api, bytes)?;
        // Parts without work and requests without splits, should a kernel ever look before the plan is there.
        buffer.write(0, &vec![0; bytes])?;
        Ok(DevicePlan { plan, api: api.clone(), buffer, status: HostWord::new(api, STATUS_OK)? })
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(crate) fn addresses(&self) -> PlanAddresses {
        let base = self.buffer.address();
        PlanAddresses {
            parts: base,
            num_splits: base + self.plan.num_splits_offset() as u64,
            scratch: base + self.plan.scratch_offset() as u64,
            status: self.status.address(),
        }
    }

    /// Takes over another batch of the same shapes. `enqueue` is handed the address of its lengths and must enqueue the
    /// schedule kernel, for a batch of `problem.b()`, on `stream`.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`] for other shapes or a larger batch, [`MlaError::WrongDevice`],
    /// [`MlaError::DTypeMismatch`], [`MlaError::Shape`], [`MlaError::InnerStride`]; those of `enqueue`.
    pub(crate) fn again(
        &mut self,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        stream: Stream,
        enqueue: impl FnOnce(&Plan, PlanAddresses, u64) -> Result<()>,
    ) -> Result<()> {
        self.plan.check_shape(problem)?;
        let (b, capacity) = (problem.b(), self.plan.capacity);
        if b > capacity {
            return Err(MlaError::ScheduleMismatch { param: "b", value: capacity as i64, limit: b as i64 });
        }
        let device = self.api.device();
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
        if b > 1 && cache_seqlens.strides() != [1] {
            return Err(MlaError::InnerStride { param: "cache_seqlens", value: cache_seqlens.strides()[0] });
        }
        enqueue(&self.plan, self.addresses(), cache_seqlens.address().unwrap_or(0))?;
        // A captured run still visits the requests beyond this batch: they must look unsplit, not like the last plan.
        let unused = self.plan.num_splits_offset() + (b + 1) * 4;
        self.buffer.fill_words(unused, capacity - b, 0, stream)?;
        self.plan.b = b;
        Ok(())
    }

    /// The status word, without waiting: work still enqueued may change it.
    pub(crate) fn status(&self) -> i32 {
        self.status.atomic().load(Ordering::Acquire)
    }

    /// The status word, cleared.
    pub(crate) fn take_status(&self) -> i32 {
        self.status.atomic().swap(STATUS_OK, Ordering::AcqRel)
    }

    /// Waits for the device and copies the plan to the host.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn to_host(&self) -> Result<HostPlan> {
        let mut parts = vec![PartMetadata::default(); self.plan.num_parts];
        let mut num_splits = vec![0i32; self.plan.b + 1];
        self.buffer.read(0, bytemuck::cast_slice_mut(&mut parts))?;
        self.buffer.read(self.plan.num_splits_offset(), bytemuck::cast_slice_mut(&mut num_splits))?;
        Ok(HostPlan { tile_scheduler_metadata: parts, num_splits })
    }
}
