//! Random problems from a seed, with everything in them that a kernel is likely to get wrong.

use super::call::Call;
use crate::error::Result;

/// What random problems may look like.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Limits {}

/// The problem that `seed` makes. The same seed and limits make the same problem on every machine.
///
/// # Errors
/// Those of the reference, for limits that make no valid problem.
pub fn random_call(_seed: u64, _limits: &Limits) -> Result<Call> {
    todo!("generator")
}
