//! The schedule: made by a kernel, from lengths that stay on the device.

use super::chunks::Shape;
use super::context::Context;
use super::memory::{Place, USAGE};
use super::params::{NUM_SPLITS_AT, Params, STATUS_OK};
use super::pipelines::Pipeline;
use super::submit::{Binding, Dispatch, Uniforms, submit};
use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::{PartMetadata, ScheduleOptions, SplitPolicy};
use crate::tensor::TensorView;

/// Longest request in tokens: its last block must still be counted in 31 bits.
const MAX_TOKENS: u64 = i32::MAX as u64 + 1 - BLOCK_TOKENS as u64;

/// Most parts: a dimension of a dispatch.
const MAX_PARTS: (usize, &str) = (65_535, "1..=65535");

/// Dispatches whose parameters are on the device at once.
pub(super) const PARAMS_SLOTS: usize = 64;

/// A plan on the device, in upstream's layout, with the status word of the runs that use it. Reused for all layers of
/// a step.
pub struct WgpuSchedule {
    shape: [(&'static str, usize); 7],
    num_parts: usize,
    policy: SplitPolicy,
    /// Status, `num_splits` [b + 1] i32, `parts` [num_parts, 8] i32.
    pub(super) plan: ::wgpu::Buffer,
    pub(super) params: Uniforms,
}

fn shape(p: &Problem) -> [(&'static str, usize); 7] {
    [
        ("b", p.b()),
        ("s_q", p.s_q()),
        ("h_q", p.h_q()),
        ("h_kv", p.h_kv()),
        ("page_size", p.page_size()),
        ("max_pages_per_seq", p.max_pages_per_seq()),
        ("num_pages", p.num_pages()),
    ]
}

/// Columns of the block table that kernels look at: no more than 32-bit token counts can reach.
pub(super) fn usable_pages_per_seq(problem: &Problem) -> u32 {
    let reachable = MAX_TOKENS / problem.page_size() as u64;
    (problem.max_pages_per_seq() as u64).min(reachable) as u32
}

impl WgpuSchedule {
    /// Room for a plan; `default_parts` where the caller names no number.
    pub(super) fn new(
        context: &Context,
        problem: &Problem,
        options: &ScheduleOptions,
        default_parts: usize,
    ) -> Result<WgpuSchedule> {
        let num_parts = options.parts(default_parts, MAX_PARTS)?;
        let words = NUM_SPLITS_AT + problem.b() + 1 + num_parts * 8;
        Ok(WgpuSchedule {
            shape: shape(problem),
            num_parts,
            policy: options.policy,
            plan: context.buffer(words * 4, USAGE)?,
            params: Uniforms::new(context)?,
        })
    }

    /// Enqueues the schedule kernel.
    pub(super) fn enqueue(
        &self,
        context: &Context,
        kernel: &Pipeline,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        dummy: &::wgpu::Buffer,
    ) -> Result<()> {
        let mut params = self.params(problem);
        let align = u64::from(context.limits.min_storage_buffer_offset_alignment);
        let lengths = match Place::of("cache_seqlens", cache_seqlens)? {
            Some(place) => {
                let (binding, start) = place.bind(0, problem.b() as u64, align);
                params.cache_seqlens = start;
                Binding::Part(binding)
            }
            None => Binding::Whole(dummy),
        };
        let dispatch = Dispatch {
            pipeline: kernel,
            bindings: vec![lengths, Binding::Whole(&self.plan)],
            params,
            groups: [1, 1, 1],
        };
        submit(context, &self.params, &[dispatch])
    }

    /// The parameters that the problem and the plan decide, whatever the chunk.
    pub(super) fn params(&self, problem: &Problem) -> Params {
        Params {
            requests: problem.b() as u32,
            b: problem.b() as u32,
            s_q: problem.s_q() as u32,
            heads_per_kv: problem.heads_per_kv() as u32,
            head_dim_k: problem.head_dim_k() as u32,
            head_dim_v: problem.head_dim_v() as u32,
            page_size: problem.page_size() as u32,
            num_pages: problem.num_pages() as u32,
            max_pages_per_seq: usable_pages_per_seq(problem),
            mask: match problem.mask() {
                crate::Mask::None => 0,
                crate::Mask::Causal => 1,
                crate::Mask::VisibleLengths => 2,
            },
            scale_log2: problem.scale_log2(),
            num_parts: self.num_parts as u32,
            subtiles: 1,
            split_blocks: match self.policy {
                SplitPolicy::Balanced { .. } => 0,
                SplitPolicy::BatchInvariant { split_blocks } => split_blocks,
            },
            overhead_blocks: match self.policy {
                SplitPolicy::Balanced { overhead_blocks } => overhead_blocks.min(i32::MAX as u32),
                SplitPolicy::BatchInvariant { .. } => 0,
            },
            ..Params::default()
        }
    }

    /// Checks that the plan was made for a problem of these shapes.
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`].
    pub(super) fn check(&self, problem: &Problem) -> Result<()> {
        for ((param, value), (_, limit)) in self.shape.into_iter().zip(shape(problem)) {
            if value != limit {
                return Err(MlaError::ScheduleMismatch { param, value: value as i64, limit: limit as i64 });
            }
        }
        Ok(())
    }

    /// What decides the size of the workspace.
    pub(super) fn sizes(&self, problem: &Problem, rows: usize) -> Shape {
        let rows_per_kv = problem.s_q() * problem.heads_per_kv();
        let (slots, slots_per_request) = match self.policy {
            // Every request has a split, and the end of every part may add one.
            SplitPolicy::Balanced { .. } => (self.num_parts as u64, 1),
            SplitPolicy::BatchInvariant { split_blocks } => {
                let tokens = u64::from(usable_pages_per_seq(problem)) * problem.page_size() as u64;
                (0, tokens.div_ceil(BLOCK_TOKENS as u64).div_ceil(u64::from(split_blocks)).max(1))
            }
        };
        Shape {
            requests: problem.b() as u64,
            row_tiles: (problem.h_kv() * rows_per_kv.div_ceil(rows)) as u64,
            rows: rows as u64,
            s_q: problem.s_q() as u64,
            head_dim_v: problem.head_dim_v() as u64,
            slots,
            slots_per_request,
        }
    }

    /// What device-side checks found, once the work is done; cleared.
    pub(super) fn take_verdict(&self, context: &Context) -> Result<()> {
        let mut status = [0u8; 4];
        context.read(&self.plan, 0, &mut status)?;
        let status = u32::from_le_bytes(status);
        if status == STATUS_OK {
            return Ok(());
        }
        context.write(&self.plan, &STATUS_OK.to_le_bytes())?;
        let request = status as usize;
        if request >= self.b() {
            return Err(MlaError::Overflow {
                param: "schedule blocks with overhead",
                value: "more than 31 bits hold".into(),
                limit: i32::MAX as u64,
            });
        }
        const REASON: &str = "its length, a visible length or a block-table entry it uses is out of range";
        Err(MlaError::DeviceCheck { request, reason: REASON })
    }

    /// Parallel parts.
    pub fn num_parts(&self) -> usize {
        self.num_parts
    }
    /// How requests are split.
    pub(super) fn policy(&self) -> SplitPolicy {
        self.policy
    }
    /// Requests planned for.
    pub fn b(&self) -> usize {
        self.shape[0].1
    }

    pub(super) fn to_host(&self, context: &Context) -> Result<(Vec<PartMetadata>, Vec<i32>)> {
        let mut num_splits = vec![0i32; self.b() + 1];
        let mut parts = vec![PartMetadata::default(); self.num_parts];
        let at = (NUM_SPLITS_AT * 4) as u64;
        context.read(&self.plan, at, bytemuck::cast_slice_mut(&mut num_splits))?;
        context.read(&self.plan, at + num_splits.len() as u64 * 4, bytemuck::cast_slice_mut(&mut parts))?;
        Ok((parts, num_splits))
    }
}
