//! The arithmetic of a schedule that is made on the device: sizes, parameters, checks.

use super::params::{DecodeParams, STATUS_OK, ScheduleParams};
use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::{PartMetadata, ScheduleOptions, SplitPolicy};
use crate::tensor::{DType, Device, TensorView};

/// Longest request in tokens: its last block must still be counted in 32 bits.
const MAX_TOKENS: u64 = i32::MAX as u64 + 1 - BLOCK_TOKENS as u64;

/// Most parts that a caller may ask for.
const MAX_PARTS: usize = 65_535;

/// What a plan needs, whatever platform holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    shape: [(&'static str, usize); 6],
    /// Requests planned for, and for how many there is room.
    b: usize,
    capacity: usize,
    num_parts: usize,
    policy: SplitPolicy,
}

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

/// Columns of the block table that kernels look at: no more than 32-bit token counts can reach.
pub(crate) fn usable_pages_per_seq(problem: &Problem) -> i32 {
    let reachable = MAX_TOKENS / problem.page_size() as u64;
    (problem.max_pages_per_seq() as u64).min(reachable) as i32
}

impl Plan {
    /// A plan for `problem`; `default_parts` where the caller names no number.
    ///
    /// # Errors
    /// [`MlaError::Parameter`].
    pub(crate) fn new(problem: &Problem, options: &ScheduleOptions, default_parts: usize) -> Result<Plan> {
        let num_parts = options.num_sm_parts.unwrap_or_else(|| default_parts.clamp(1, MAX_PARTS));
        if num_parts == 0 || num_parts > MAX_PARTS {
            let value = i64::try_from(num_parts).unwrap_or(i64::MAX);
            return Err(MlaError::Parameter { param: "num_sm_parts", value, limit: "1..=65535" });
        }
        if let SplitPolicy::BatchInvariant { split_blocks } = options.policy
            && (split_blocks == 0 || split_blocks > i32::MAX as u32)
        {
            let value = i64::from(split_blocks);
            return Err(MlaError::Parameter { param: "split_blocks", value, limit: "1..=2147483647" });
        }
        let (b, policy) = (problem.b(), options.policy);
        Ok(Plan { shape: shape(problem), b, capacity: b, num_parts, policy })
    }

    /// Byte offset of `num_splits` behind `parts`.
    pub(crate) fn num_splits_offset(&self) -> usize {
        self.num_parts * size_of::<PartMetadata>()
    }
    /// Bytes of both arrays.
    pub(crate) fn bytes(&self) -> usize {
        self.num_splits_offset() + (self.capacity + 1) * 4
    }
    /// Parallel parts.
    pub(crate) fn num_parts(&self) -> usize {
        self.num_parts
    }
    /// Requests planned for.
    pub(crate) fn b(&self) -> usize {
        self.b
    }

    /// What of `num_splits` lies behind the requests planned for: byte offset and words. A captured run still visits
    /// those requests: they must look unsplit.
    pub(crate) fn unused(&self) -> (usize, usize) {
        (self.num_splits_offset() + (self.b + 1) * 4, self.capacity - self.b)
    }

    /// Takes over another batch of the same shapes, and gives the schedule kernel's parameters for it. `base` is where
    /// the arrays lie.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`] for other shapes or a larger batch, [`MlaError::WrongDevice`],
    /// [`MlaError::DTypeMismatch`], [`MlaError::Shape`].
    pub(crate) fn again(
        &mut self,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        device: Device,
        base: u64,
        status: u64,
    ) -> Result<ScheduleParams> {
        self.check_shape(problem)?;
        let b = problem.b();
        if b > self.capacity {
            return Err(MlaError::ScheduleMismatch { param: "b", value: self.capacity as i64, limit: b as i64 });
        }
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
        self.b = b;
        Ok(ScheduleParams {
            cache_seqlens: cache_seqlens.address().unwrap_or(0),
            parts: base,
            num_splits: base + self.num_splits_offset() as u64,
            status,
            max_tokens: i64::from(usable_pages_per_seq(problem)) * problem.page_size() as i64,
            b: b as i32,
            num_parts: self.num_parts as i32,
            overhead_blocks: match self.policy {
                SplitPolicy::Balanced { overhead_blocks } => i32::try_from(overhead_blocks).unwrap_or(i32::MAX),
                SplitPolicy::BatchInvariant { .. } => 0,
            },
            fixed_split_blocks: self.fixed_split_blocks(),
        })
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

    /// Blocks a split in batch-invariant mode, 0 otherwise.
    fn fixed_split_blocks(&self) -> i32 {
        match self.policy {
            SplitPolicy::Balanced { .. } => 0,
            SplitPolicy::BatchInvariant { split_blocks } => split_blocks as i32,
        }
    }

    /// Slots of partial results: the splits of the batch, known without the lengths, so an upper bound.
    fn slots(&self, problem: &Problem) -> usize {
        let slots = match self.policy {
            // Every request has a split, and the end of every part may add one.
            SplitPolicy::Balanced { .. } => self.capacity + self.num_parts,
            SplitPolicy::BatchInvariant { split_blocks } => {
                let tokens = usable_pages_per_seq(problem) as usize * problem.page_size();
                let splits = tokens.div_ceil(BLOCK_TOKENS).div_ceil(split_blocks as usize).max(1);
                self.capacity.saturating_mul(splits)
            }
        };
        slots.min(i32::MAX as usize)
    }

    /// Bytes of the partial outputs, then of the partial lse.
    fn workspace_layout(&self, problem: &Problem) -> (usize, usize) {
        let rows = self.slots(problem).saturating_mul(problem.s_q() * problem.h_q());
        // The lse follows the outputs; both stay aligned to 16 bytes.
        let out = rows.saturating_mul(problem.head_dim_v()).saturating_mul(4);
        (out.checked_next_multiple_of(16).unwrap_or(usize::MAX), rows.saturating_mul(4))
    }

    /// Bytes of workspace that a run needs.
    pub(crate) fn workspace_bytes(&self, problem: &Problem) -> usize {
        let (out, lse) = self.workspace_layout(problem);
        out.saturating_add(lse)
    }

    /// Fills in what the plan and its memory decide. `base` is where the arrays lie.
    pub(crate) fn fill(&self, params: &mut DecodeParams, problem: &Problem, base: u64, workspace: u64, status: u64) {
        params.parts = base;
        params.num_splits = base + self.num_splits_offset() as u64;
        params.partial_out = workspace;
        params.partial_lse = workspace + self.workspace_layout(problem).0 as u64;
        params.status = status;
        params.num_parts = self.num_parts as i32;
        params.fixed_split_blocks = self.fixed_split_blocks();
        params.slots = self.slots(problem) as i32;
        let rows = problem.s_q() * problem.h_q();
        // Few rows a block and many ways where there are few rows, so that the merge of a long request is spread over the
        // device. A batch-invariant run must add in the same order in every batch.
        (params.combine_rows, params.combine_ways) = match self.policy {
            SplitPolicy::BatchInvariant { .. } => (4, 4),
            SplitPolicy::Balanced { .. } if problem.b() * rows <= 512 => (1, 8),
            SplitPolicy::Balanced { .. } => (16, 1),
        };
    }

    /// What a status word says once the work is done.
    ///
    /// # Errors
    /// [`MlaError::DeviceCheck`], [`MlaError::Overflow`].
    pub(crate) fn verdict(&self, status: i32) -> Result<()> {
        match usize::try_from(status) {
            Ok(request) if request == STATUS_OK as usize => Ok(()),
            Ok(request) if request >= self.b => Err(MlaError::Overflow {
                param: "schedule blocks with overhead",
                value: "more than 32 bits hold".into(),
                limit: i32::MAX as u64,
            }),
            Ok(request) => Err(MlaError::DeviceCheck { request, reason: FAILURE }),
            // No kernel writes a negative number.
            Err(_) => Err(MlaError::DeviceCheck { request: 0, reason: "the status word was overwritten" }),
        }
    }
}

/// What the status word stands for, in words.
const FAILURE: &str = "its length, a visible length or a block-table entry it uses is out of range";
