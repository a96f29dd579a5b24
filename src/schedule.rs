//! How the KV of each request is cut over parallel parts.
//!
//! A schedule is made once a step and serves all layers. The plan and its layout are upstream's (FlashMLA commit
//! 9241ae3, `get_mla_metadata`): requests are laid end to end in blocks of 64 tokens, every request is charged a fixed
//! overhead, and the line is cut into `num_sm_parts` payloads of equal size. A part may therefore end inside a request,
//! which makes splits that a combine step merges.

use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Problem};

/// Overhead upstream charges a request, in blocks.
pub const DEFAULT_OVERHEAD_BLOCKS: u32 = 5;

/// Split size of the batch-invariant mode where the caller names none, in blocks (1024 tokens).
pub const DEFAULT_INVARIANT_BLOCKS: u32 = 16;

/// Most parts a schedule may have: far beyond any device, and 32 MiB of metadata.
pub const MAX_SM_PARTS: usize = 1 << 20;

/// How requests are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SplitPolicy {
    /// Equal payloads a part; where a request is cut depends on its batchmates.
    Balanced {
        /// What a request costs beyond its blocks, in blocks.
        overhead_blocks: u32,
    },
    /// Every request is cut each `split_blocks` blocks, whatever its batchmates: a row's result has the same bits in
    /// every batch.
    BatchInvariant {
        /// Blocks a split; the last split of a request may be shorter.
        split_blocks: u32,
    },
}

impl Default for SplitPolicy {
    fn default() -> Self {
        SplitPolicy::Balanced { overhead_blocks: DEFAULT_OVERHEAD_BLOCKS }
    }
}

impl SplitPolicy {
    /// The batch-invariant mode with its default split size.
    pub const BATCH_INVARIANT: SplitPolicy = SplitPolicy::BatchInvariant { split_blocks: DEFAULT_INVARIANT_BLOCKS };

    fn check(self) -> Result<()> {
        match self {
            SplitPolicy::BatchInvariant { split_blocks } if split_blocks == 0 || split_blocks > i32::MAX as u32 => {
                let value = i64::from(split_blocks);
                Err(MlaError::Parameter { param: "split_blocks", value, limit: "1..=2147483647" })
            }
            _ => Ok(()),
        }
    }
}

/// What a caller may choose about a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ScheduleOptions {
    /// Parallel parts; `None` lets the backend choose from its device.
    pub num_sm_parts: Option<usize>,
    /// How requests are cut.
    pub policy: SplitPolicy,
}

impl ScheduleOptions {
    /// The number of parts: the caller's, or `default` where there is none. `limit` is the most that a backend takes, with
    /// the words for it.
    ///
    /// # Errors
    /// [`MlaError::Parameter`] for a number of parts, or a split size, that is out of range.
    #[allow(dead_code, reason = "for backends with a device")]
    pub(crate) fn parts(&self, default: usize, limit: (usize, &'static str)) -> Result<usize> {
        let parts = self.num_sm_parts.unwrap_or_else(|| default.clamp(1, limit.0));
        check_parts(parts, limit)?;
        self.policy.check()?;
        Ok(parts)
    }
}

fn check_parts(parts: usize, (most, limit): (usize, &'static str)) -> Result<()> {
    if parts == 0 || parts > most {
        let value = i64::try_from(parts).unwrap_or(i64::MAX);
        return Err(MlaError::Parameter { param: "num_sm_parts", value, limit });
    }
    Ok(())
}

/// One row of upstream's `tile_scheduler_metadata`: the range of blocks a part works on.
///
/// The range starts at block `begin_block` of request `begin_req` and ends before block `end_block` of request
/// `end_req`, requests between being whole. A part without work has `begin_req > end_req`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct PartMetadata {
    /// First request.
    pub begin_req: i32,
    /// Last request, inclusive.
    pub end_req: i32,
    /// First block of the first request.
    pub begin_block: i32,
    /// End of the range in the last request, exclusive.
    pub end_block: i32,
    /// Number of the split of the first request that this part begins with.
    pub begin_split: i32,
    /// 1 where the first request has other splits.
    pub is_first_req_split: i32,
    /// 1 where the last request has other splits.
    pub is_last_req_split: i32,
    /// Always 0: rows are 32 bytes.
    pub padding: i32,
}

/// A contiguous run of blocks of one request that one worker handles: the unit of parallel work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Split {
    /// The request.
    pub request: usize,
    /// The split's number within its request, from 0.
    pub index: usize,
    /// First block.
    pub begin_block: usize,
    /// End, exclusive. Equal to `begin_block` only for a request of length 0.
    pub end_block: usize,
    /// Row of the partial buffers; `None` where the request has no other split, so that the result is final.
    pub partial: Option<usize>,
}

/// A plan for one batch of lengths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    tile_scheduler_metadata: Vec<PartMetadata>,
    num_splits: Vec<i32>,
    blocks: Vec<i32>,
    first_partial: Vec<i32>,
    policy: SplitPolicy,
}

/// The number of parts upstream uses on a device with `num_sms` multiprocessors, whose kernel handles 64 query rows of
/// one KV head a part.
pub fn num_sm_parts(num_sms: usize, problem: &Problem) -> usize {
    let row_tiles = (problem.s_q() * problem.heads_per_kv()).div_ceil(64);
    (num_sms / problem.h_kv() / row_tiles).max(1)
}

/// Plans a batch: lengths to [`Schedule`], `num_sm_parts` parts.
///
/// # Errors
/// [`MlaError::NegativeLength`]; [`MlaError::Parameter`] for 0 parts, more than [`MAX_SM_PARTS`], or a split size of 0;
/// [`MlaError::Overflow`] where the blocks of the batch do not fit the layout's i32.
pub fn get_mla_metadata(cache_seqlens: &[i32], num_sm_parts: usize, policy: SplitPolicy) -> Result<Schedule> {
    check_parts(num_sm_parts, (MAX_SM_PARTS, "1..=1048576"))?;
    policy.check()?;
    let mut blocks = Vec::with_capacity(cache_seqlens.len());
    for (request, len) in cache_seqlens.iter().enumerate() {
        let len = usize::try_from(*len).map_err(|_| MlaError::NegativeLength { request, value: *len })?;
        blocks.push(len.div_ceil(BLOCK_TOKENS) as i32);
    }
    let (tile_scheduler_metadata, num_splits) = match policy {
        SplitPolicy::Balanced { overhead_blocks } => balanced(&blocks, num_sm_parts, overhead_blocks)?,
        SplitPolicy::BatchInvariant { split_blocks } => invariant(&blocks, num_sm_parts, split_blocks)?,
    };
    let mut partials = 0;
    let mut first_partial = Vec::with_capacity(blocks.len() + 1);
    first_partial.push(0);
    for pair in num_splits.windows(2) {
        let splits = pair[1] - pair[0];
        partials += if splits > 1 { splits } else { 0 };
        first_partial.push(partials);
    }
    Ok(Schedule { tile_scheduler_metadata, num_splits, blocks, first_partial, policy })
}

type Plan = (Vec<PartMetadata>, Vec<i32>);

/// Where the planner stands: everything before is handed out.
#[derive(Clone, Copy, Default)]
struct Cursor {
    request: usize,
    block: i64,
    split: i32,
}

impl Cursor {
    /// Closes the part that began at `begin` and ends here.
    fn part(&self, begin: &Cursor, blocks: &[i32]) -> PartMetadata {
        let inside = self.block > 0;
        // Ending between requests means ending after the last block of the one before.
        let end_req = if inside { self.request as i64 } else { self.request as i64 - 1 };
        let end_blocks = usize::try_from(end_req).map_or(0, |r| i64::from(blocks[r]));
        let end_block = if inside { self.block } else { end_blocks };
        let mut first = begin.block != 0;
        let mut last = end_block != end_blocks;
        if begin.request as i64 == end_req {
            first |= last;
            last = first;
        }
        PartMetadata {
            begin_req: begin.request as i32,
            end_req: end_req as i32,
            begin_block: begin.block as i32,
            end_block: end_block as i32,
            begin_split: begin.split,
            is_first_req_split: i32::from(first),
            is_last_req_split: i32::from(last),
            padding: 0,
        }
    }
}

/// `i64::div_ceil` for the non-negative numbers here; the method is not stable for signed integers yet.
fn div_ceil(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

fn total_fits(param: &'static str, total: i64) -> Result<()> {
    if total > i64::from(i32::MAX) {
        return Err(MlaError::Overflow { param, value: total.to_string(), limit: i32::MAX as u64 });
    }
    Ok(())
}

fn balanced(blocks: &[i32], num_sm_parts: usize, overhead_blocks: u32) -> Result<Plan> {
    let overhead = i64::from(overhead_blocks);
    // A request of length 0 still has to be visited, so it counts one block.
    let charged = |r: usize| i64::from(blocks[r].max(1));
    let total: i64 = (0..blocks.len()).map(|r| charged(r) + overhead).sum();
    total_fits("schedule blocks with overhead", total)?;
    // The extra overhead pays for a request that a part takes over half done.
    let payload = div_ceil(total, num_sm_parts as i64) + overhead;

    let mut parts = Vec::with_capacity(num_sm_parts);
    let mut num_splits = Vec::with_capacity(blocks.len() + 1);
    num_splits.push(0);
    let mut at = Cursor::default();
    for _ in 0..num_sm_parts {
        let begin = at;
        let mut room = payload;
        while at.request < blocks.len() {
            let rest = charged(at.request) - at.block;
            if room < rest + overhead {
                // Cut here, unless not even one block would fit beside the overhead.
                if room > overhead {
                    at.block += room - overhead;
                    at.split += 1;
                }
                break;
            }
            room -= rest + overhead;
            let splits_before = *num_splits.last().unwrap_or(&0);
            num_splits.push(splits_before + at.split + 1);
            at = Cursor { request: at.request + 1, ..Cursor::default() };
        }
        parts.push(at.part(&begin, blocks));
    }
    debug_assert!(at.request == blocks.len() && at.block == 0);
    Ok((parts, num_splits))
}

fn invariant(blocks: &[i32], num_sm_parts: usize, split_blocks: u32) -> Result<Plan> {
    let size = i64::from(split_blocks);
    let splits = |r: usize| div_ceil(i64::from(blocks[r]), size).max(1);
    let total: i64 = (0..blocks.len()).map(splits).sum();
    total_fits("schedule splits", total)?;
    let mut num_splits = Vec::with_capacity(blocks.len() + 1);
    let mut sum = 0i64;
    num_splits.push(0);
    for r in 0..blocks.len() {
        sum += splits(r);
        num_splits.push(sum as i32);
    }
    // Splits are fixed; parts only choose how many consecutive ones to take, as evenly as can be, the first parts one
    // more, so that parts without work come last.
    let mut parts = Vec::with_capacity(num_sm_parts);
    let mut at = Cursor::default();
    let num_sm_parts = num_sm_parts as i64;
    for part in 0..num_sm_parts {
        let begin = at;
        let mut take = total / num_sm_parts + i64::from(part < total % num_sm_parts);
        while take > 0 {
            let here = (splits(at.request) - i64::from(at.split)).min(take);
            take -= here;
            at.split += here as i32;
            at.block += here * size;
            if i64::from(at.split) == splits(at.request) {
                at = Cursor { request: at.request + 1, ..Cursor::default() };
            }
        }
        parts.push(at.part(&begin, blocks));
    }
    Ok((parts, num_splits))
}

impl Schedule {
    /// Upstream's `tile_scheduler_metadata`, [num_sm_parts, 8] i32, one [`PartMetadata`] a row.
    pub fn tile_scheduler_metadata(&self) -> &[PartMetadata] {
        &self.tile_scheduler_metadata
    }
    /// Upstream's `num_splits`, [b + 1] i32, cumulative: request r owns partial rows `num_splits[r]..num_splits[r + 1]`.
    pub fn num_splits(&self) -> &[i32] {
        &self.num_splits
    }
    /// How requests were cut.
    pub fn policy(&self) -> SplitPolicy {
        self.policy
    }
    /// Requests planned for.
    pub fn b(&self) -> usize {
        self.blocks.len()
    }
    /// Splits of the whole batch.
    pub fn total_splits(&self) -> usize {
        self.num_splits.last().map_or(0, |n| *n as usize)
    }
    /// Rows of the partial buffers: the splits of all requests that have more than one.
    pub fn total_partials(&self) -> usize {
        self.first_partial.last().map_or(0, |n| *n as usize)
    }
    /// The partial rows of request `r`, in split order; empty where it has one split, or is not of the batch.
    pub fn partials_of(&self, r: usize) -> std::ops::Range<usize> {
        match self.first_partial.get(r..).unwrap_or_default() {
            [first, end, ..] => *first as usize..*end as usize,
            _ => 0..0,
        }
    }
    /// Blocks of 64 tokens that request `r` has; 0 where it is not of the batch.
    pub fn request_blocks(&self, r: usize) -> usize {
        self.blocks.get(r).map_or(0, |blocks| *blocks as usize)
    }

    /// The splits of one part of this schedule, in order. All parts together yield every split of the batch once.
    pub fn splits_of(&self, part: &PartMetadata) -> impl Iterator<Item = Split> + '_ {
        let part = *part;
        (part.begin_req..=part.end_req).flat_map(move |r| {
            let request = r as usize;
            let begin = if r == part.begin_req { part.begin_block } else { 0 } as usize;
            let end = if r == part.end_req { part.end_block as usize } else { self.request_blocks(request) };
            let first = if r == part.begin_req { part.begin_split as usize } else { 0 };
            // Balanced parts hold one split a request; batch-invariant ones are cut at every multiple of the size.
            let size = match self.policy {
                SplitPolicy::Balanced { .. } => usize::MAX,
                SplitPolicy::BatchInvariant { split_blocks } => split_blocks as usize,
            };
            let partials = self.partials_of(request);
            let count = end.saturating_sub(begin).div_ceil(size).max(1);
            (0..count).map(move |i| Split {
                request,
                index: first.saturating_add(i),
                begin_block: begin.saturating_add(i.saturating_mul(size)),
                end_block: begin.saturating_add((i + 1).saturating_mul(size)).min(end),
                partial: (!partials.is_empty()).then_some(partials.start.saturating_add(first).saturating_add(i)),
            })
        })
    }

    /// Every split of the batch, part after part.
    pub fn splits(&self) -> impl Iterator<Item = Split> + '_ {
        self.tile_scheduler_metadata.iter().flat_map(|part| self.splits_of(part))
    }

    /// Checks that the schedule was made for this batch and these lengths (to the block).
    ///
    /// # Errors
    /// [`MlaError::ScheduleMismatch`].
    pub fn check(&self, problem: &Problem, cache_seqlens: &[i32]) -> Result<()> {
        let mismatch = |param, value: usize, limit: usize| {
            Err(MlaError::ScheduleMismatch { param, value: value as i64, limit: limit as i64 })
        };
        if self.b() != problem.b() {
            return mismatch("b", self.b(), problem.b());
        }
        for (blocks, len) in self.blocks.iter().zip(cache_seqlens) {
            let needed = usize::try_from(*len).unwrap_or(0).div_ceil(BLOCK_TOKENS);
            if *blocks as usize != needed {
                return mismatch("blocks of a request", *blocks as usize, needed);
            }
        }
        Ok(())
    }
}
