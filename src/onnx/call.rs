//! Conformance calls, converted as an export converts them.

use half::bf16;

use crate::conformance::{Call, HostTensor, Layout};
use crate::error::Result;
use crate::problem::Problem;
use crate::tensor::DType;

use super::run::elements;
use super::{Losses, to_f16};

/// The class of `problem` with f16 where it has bf16; softmax_scale and mask as they are.
///
/// # Errors
/// Those of [`ProblemBuilder::build`](crate::problem::ProblemBuilder::build).
pub fn problem_in_f16(problem: &Problem) -> Result<Problem> {
    let dtype = if problem.dtype() == DType::Bf16 { DType::F16 } else { problem.dtype() };
    problem.to_builder().dtype(dtype).build()
}

/// A call as the graph takes it: `q` and `k_cache` fused and without gaps, bf16 as f16 (see [`to_f16`]).
///
/// # Errors
/// Those of [`Call::with_layout`].
pub fn call_for_graph(call: &Call) -> Result<(Call, Losses)> {
    let mut call = call.with_layout(Layout::Fused)?;
    call.problem = problem_in_f16(&call.problem)?;
    let mut losses = Losses::default();
    for (name, tensor) in &mut call.tensors {
        if tensor.dtype() == DType::Bf16 {
            let values: Vec<bf16> = elements(&tensor.to_dense_bytes());
            let (converted, lost) = to_f16(&values);
            losses.saturated += lost.saturated;
            losses.rounded += lost.rounded;
            *tensor = HostTensor::from_bytes(name, DType::F16, tensor.shape(), bytemuck::cast_slice(&converted))?;
        }
    }
    Ok((call, losses))
}
