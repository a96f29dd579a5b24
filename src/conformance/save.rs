//! Writing what [`golden`](super::golden) reads.

use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView as FileTensor;

use super::call::Call;
use super::golden::{FileError, FileReason};
use super::tensor::{HostTensor, PoisonedOutputs};
use crate::problem::Mask;
use crate::tensor::DType;

/// Writes `out` and `lse` of a call, without gaps, with the call's metadata.
///
/// # Errors
/// [`FileError`], with the path and what the system said.
pub fn save(path: impl AsRef<Path>, call: &Call, results: &PoisonedOutputs) -> Result<(), FileError> {
    write(path.as_ref(), call, &[("out", &results.out), ("lse", &results.lse)])
}

/// Writes the inputs of a call, without gaps, so that [`golden::load`](super::golden::load) reads it again.
///
/// # Errors
/// As [`save`].
pub fn save_inputs(path: impl AsRef<Path>, call: &Call) -> Result<(), FileError> {
    let tensors: Vec<_> = call.tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    write(path.as_ref(), call, &tensors)
}

fn write(path: &Path, call: &Call, tensors: &[(&'static str, &HostTensor)]) -> Result<(), FileError> {
    let written = bytes(call, tensors).and_then(|bytes| Ok(std::fs::write(path, bytes)?));
    written.map_err(|reason| FileError { path: path.into(), reason })
}

fn bytes(call: &Call, tensors: &[(&'static str, &HostTensor)]) -> Result<Vec<u8>, FileReason> {
    let p = &call.problem;
    let of_file = |dtype| match dtype {
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::F32 => Dtype::F32,
        DType::I32 => Dtype::I32,
    };
    let dense: Vec<_> = tensors.iter().map(|(name, t)| (*name, *t, t.to_dense_bytes())).collect();
    let views = dense.iter().map(|(name, t, bytes)| {
        FileTensor::new(of_file(t.dtype()), t.shape().to_vec(), bytes).map(|view| (*name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    let metadata = [
        ("kind", "dense_decode".to_string()),
        ("softmax_scale", p.softmax_scale().to_string()),
        ("page_block_size", p.page_size().to_string()),
        ("head_dim_v", p.head_dim_v().to_string()),
        ("causal", (p.mask() == Mask::Causal).to_string()),
    ];
    let metadata = metadata.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
    Ok(safetensors::serialize(views, Some(metadata))?)
}
