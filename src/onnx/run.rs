//! Executes a graph on this CPU, with tract.

use tract_onnx::prelude::*;

use crate::error::{MlaError, Result};
use crate::tensor::{DType, TensorView, TensorViewMut};

use super::NAME;
use super::proto::Model;

type Plan = SimplePlan<TypedFact, Box<dyn TypedOp>, TypedModel>;

/// A graph made ready.
pub(super) struct Program {
    plan: Plan,
}

fn platform(call: &'static str) -> impl Fn(TractError) -> MlaError {
    move |e| MlaError::Platform { backend: NAME, call, message: format!("{e:#}") }
}

/// The elements that bytes of any alignment hold.
pub(super) fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// One input: its parts, side by side in the last dimension, without gaps.
fn dense(parts: &[(&'static str, &TensorView<'_>)]) -> Result<Tensor> {
    let (_, first) = parts[0];
    let size = first.dtype().size();
    let mut shape = first.shape().to_vec();
    let last = shape.len() - 1;
    shape[last] = parts.iter().map(|(_, part)| part.shape()[last]).sum();
    let memory = parts.iter().map(|(name, part)| part.host_bytes(name)).collect::<Result<Vec<_>>>()?;
    let rows: usize = shape[..last].iter().product();
    let mut bytes = Vec::with_capacity(rows * shape[last] * size);
    let mut index = vec![0; shape.len()];
    for row in 0..rows {
        let mut rest = row;
        for d in (0..last).rev() {
            index[d] = rest % shape[d];
            rest /= shape[d];
        }
        // A part of no columns has no first element.
        for ((_, part), memory) in parts.iter().zip(&memory).filter(|((_, part), _)| part.shape()[last] > 0) {
            // The last stride of an input is 1, and its constructor checked that the row lies inside its memory.
            let at = part.offset(&index) * size;
            bytes.extend_from_slice(&memory[at..at + part.shape()[last] * size]);
        }
    }
    let make = platform("tensor");
    match first.dtype() {
        DType::F16 => Tensor::from_shape::<half::f16>(&shape, &elements(&bytes)).map_err(make),
        DType::F32 => Tensor::from_shape::<f32>(&shape, &elements(&bytes)).map_err(make),
        DType::I32 => Tensor::from_shape::<i32>(&shape, &elements(&bytes)).map_err(make),
        value => Err(MlaError::DTypeMismatch { param: parts[0].0, value, limit: DType::F16 }),
    }
}

/// Copies the elements of a result, without gaps, into an output of any strides.
fn store<T: Datum + bytemuck::Pod>(param: &'static str, result: &Tensor, to: &mut TensorViewMut<'_>) -> Result<()> {
    let shape = to.shape().to_vec();
    if result.shape() != shape {
        let message = format!("{param} has shape {:?} instead of {shape:?}", result.shape());
        return Err(MlaError::Platform { backend: NAME, call: "run", message });
    }
    let values = result.as_slice::<T>().map_err(platform("run"))?;
    let mut index = vec![0; shape.len()];
    let mut offsets = Vec::with_capacity(values.len());
    let view = to.as_view();
    for n in 0..values.len() {
        let mut rest = n;
        for d in (0..shape.len()).rev() {
            index[d] = rest % shape[d];
            rest /= shape[d];
        }
        offsets.push(view.offset(&index) * size_of::<T>());
    }
    let memory = to.host_bytes_mut(param)?;
    for (at, value) in offsets.into_iter().zip(values) {
        memory[at..at + size_of::<T>()].copy_from_slice(bytemuck::bytes_of(value));
    }
    Ok(())
}

impl Program {
    pub fn new(model: &Model) -> Result<Program> {
        let bytes = model.to_bytes();
        let model = tract_onnx::onnx().model_for_read(&mut &bytes[..]).map_err(platform("read the graph"))?;
        let model = model.into_optimized().map_err(platform("optimise the graph"))?;
        Ok(Program { plan: model.into_runnable().map_err(platform("plan the graph"))? })
    }

    /// Runs the graph. `inputs` in its order, each as the parts that lie side by side in its last dimension.
    pub fn run(
        &self,
        inputs: &[Vec<(&'static str, &TensorView<'_>)>],
        out: &mut TensorViewMut<'_>,
        lse: &mut TensorViewMut<'_>,
    ) -> Result<()> {
        let inputs = inputs.iter().map(|parts| Ok(dense(parts)?.into_tvalue())).collect::<Result<TVec<TValue>>>()?;
        let results = self.plan.run(inputs).map_err(platform("run"))?;
        match out.dtype() {
            DType::F16 => store::<half::f16>("out", &results[0], out)?,
            _ => store::<f32>("out", &results[0], out)?,
        }
        store::<f32>("lse", &results[1], lse)
    }
}
