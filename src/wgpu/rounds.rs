//! How often kernels may go round their loops on an adapter that is a CPU.
//!
//! Mesa's llvmpipe ends loops, without a word and with wrong results, once an invocation has gone round loops 65,535
//! times. So work is cut into more parts there, and what would still be too much is refused.

use super::plan::usable_pages_per_seq;
use super::refusal;
use crate::error::Result;
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::SplitPolicy;

/// Rounds of an invocation.
const MOST: u64 = 65_535;
/// Of combine, a split; of schedule, a request.
const ROUNDS_A_SPLIT: u64 = 4;
const ROUNDS_A_REQUEST: u64 = 8;
const WHY: &str = "of an adapter whose driver ends loops after 65535 rounds";

/// The fewest parts into which to cut a batch whose requests fill their block tables. Half of what is allowed is kept in
/// reserve: 300 rounds were seen for 32 tokens of 528 columns.
///
/// # Errors
/// [`MlaError::Unsupported`](crate::MlaError::Unsupported) where a loop over requests or over splits is too long.
pub(super) fn least_parts(problem: &Problem, policy: SplitPolicy) -> Result<usize> {
    let b = problem.b() as u64;
    let tokens = u64::from(usable_pages_per_seq(problem)) * problem.page_size() as u64;
    let blocks = tokens.div_ceil(BLOCK_TOKENS as u64);
    let splits = match policy {
        SplitPolicy::Balanced { .. } => 1,
        SplitPolicy::BatchInvariant { split_blocks } => blocks.div_ceil(u64::from(split_blocks.max(1))).max(1),
    };
    let loops = [("b", b, ROUNDS_A_REQUEST), ("block-table columns / split_blocks", splits, ROUNDS_A_SPLIT)];
    for (param, value, rounds) in loops {
        if value > MOST / rounds {
            return Err(refusal(param, value.to_string(), format!("0..={}, {WHY}", MOST / rounds)).into());
        }
    }
    let of_a_block = (problem.head_dim_k() as u64).saturating_add(280);
    let rounds = b.saturating_mul(blocks.saturating_mul(of_a_block).saturating_add(splits.saturating_mul(200)));
    Ok(usize::try_from(rounds.div_ceil(MOST)).unwrap_or(usize::MAX).max(1))
}

/// Whether a plan of so many parts can be run.
///
/// # Errors
/// [`MlaError::Unsupported`](crate::MlaError::Unsupported), those of [`least_parts`].
pub(super) fn check_parts(problem: &Problem, policy: SplitPolicy, parts: usize) -> Result<()> {
    match least_parts(problem, policy)? {
        least if parts < least => {
            Err(refusal("num_sm_parts", parts.to_string(), format!("{least} or more, {WHY}")).into())
        }
        _ => Ok(()),
    }
}
