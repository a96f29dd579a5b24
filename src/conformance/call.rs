//! One attention call with everything it needs: inputs, strides of the outputs, expected values, tolerances.

use std::fmt;

use super::check::Tolerance;
use super::tensor::{HostTensor, PoisonedOutputs};
use crate::call::{Inputs, KvCache, Query};
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::tensor::{DType, Device, contiguous_strides};

/// How the tensors of a call lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// As the call was loaded or generated.
    Given,
    /// `q` and `k_cache`, and outputs, without gaps.
    Fused,
    /// `q_nope`, `q_pe`, `ckv`, `kpe` in buffers of their own, heads outside tokens, NaN between rows; outputs likewise
    /// with gaps.
    Split,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Layout::Given => "given",
            Layout::Fused => "fused",
            Layout::Split => "split",
        })
    }
}

/// What a call should return.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Expected {
    /// [b, s_q, h_q, head_dim_v], row-major.
    pub out: Vec<f64>,
    /// [b, h_q, s_q], row-major.
    pub lse: Vec<f64>,
    /// Absolute allowance of each element of `out` where the inputs tell it; empty where only [`Tolerance`] counts.
    pub out_abs: Vec<f64>,
    /// Absolute allowance of each element of `lse`; empty likewise.
    pub lse_abs: Vec<f64>,
}

/// One attention call.
#[derive(Debug, Clone)]
pub struct Call {
    /// The file's stem, or the seed.
    pub name: String,
    /// Shapes, types and flags.
    pub problem: Problem,
    /// The inputs by name: `q` or `q_nope` and `q_pe`; `k_cache` or `ckv` and `kpe`; `block_table`; `cache_seqlens`;
    /// perhaps `visible_lengths`.
    pub tensors: Vec<(&'static str, HostTensor)>,
    /// Strides of `out` and `lse`; `None` for none between rows.
    pub output_strides: Option<([usize; 4], [usize; 3])>,
    /// Expected values, where known.
    pub expected: Option<Expected>,
    /// How far from them a result may be.
    pub tolerance: Tolerance,
}

/// Elements between rows of the split layout: NaN, which a kernel that reads a row too far would show. A multiple of
/// 16 bytes for every element type, as bulk copies of GPUs need.
const GAP: usize = 8;

/// Strides with a gap after each row, and the second dimension outside the third swapped where both exist: another
/// order than the fused layout's. Saturates: beside a size of 0 others may be of any size.
fn padded(shape: &[usize]) -> Vec<usize> {
    let row = (shape[3].max(1).div_ceil(GAP) + 1).saturating_mul(GAP);
    let second = row.saturating_mul(shape[1].max(1));
    vec![second.saturating_mul(shape[2].max(1)).saturating_add(GAP), row, second, 1]
}

/// NaN of the type, in its first bytes.
pub(super) fn nan(dtype: DType) -> [u8; 4] {
    match dtype {
        DType::Bf16 => 0x7FC0_7FC0u32.to_ne_bytes(),
        DType::F16 => 0x7E00_7E00u32.to_ne_bytes(),
        DType::F32 => f32::NAN.to_ne_bytes(),
        DType::I32 => 2_147_480_000i32.to_ne_bytes(),
    }
}

impl Call {
    /// Some of the requests, in the order of `picks`, over the same cache; without expected values.
    ///
    /// # Errors
    /// Those of [`Problem::builder`].
    ///
    /// # Panics
    /// If `picks` names a request that there is not.
    pub fn with_requests(&self, picks: &[usize]) -> Result<Call> {
        let problem = self.problem.to_builder().b(picks.len()).build()?;
        let mut tensors = Vec::new();
        for (name, tensor) in &self.tensors {
            let picked = match *name {
                "k_cache" | "ckv" | "kpe" => tensor.clone(),
                _ => {
                    let (bytes, mut shape) = (tensor.to_dense_bytes(), tensor.shape().to_vec());
                    let each = bytes.len() / shape[0].max(1);
                    shape[0] = picks.len();
                    let rows: Vec<&[u8]> = picks.iter().map(|i| &bytes[i * each..][..each]).collect();
                    HostTensor::from_bytes(name, tensor.dtype(), &shape, &rows.concat())?
                }
            };
            tensors.push((*name, picked));
        }
        Ok(Call { problem, tensors, output_strides: None, expected: None, ..self.clone() })
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&HostTensor> {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, t)| t)
    }

    /// A tensor by name, for writing.
    pub fn tensor_mut(&mut self, name: &str) -> Option<&mut HostTensor> {
        self.tensors.iter_mut().find(|(n, _)| *n == name).map(|(_, t)| t)
    }

    /// What the backend reads.
    ///
    /// # Errors
    /// [`MlaError::MissingTensor`], [`MlaError::Rank`].
    pub fn inputs(&self) -> Result<Inputs<'_>> {
        let maybe = |name: &'static str| self.tensor(name).map(|t| t.view(name)).transpose();
        let needed = |name: &'static str| {
            maybe(name)?.ok_or(MlaError::MissingTensor { param: name, limit: "every call needs it" })
        };
        Ok(Inputs {
            query: match maybe("q")? {
                Some(q) => Query::Fused(q),
                None => Query::Split { q_nope: needed("q_nope")?, q_pe: maybe("q_pe")? },
            },
            kv_cache: match maybe("k_cache")? {
                Some(k) => KvCache::Fused(k),
                None => KvCache::Split { ckv: needed("ckv")?, kpe: maybe("kpe")? },
            },
            block_table: needed("block_table")?,
            cache_seqlens: needed("cache_seqlens")?,
            visible_lengths: maybe("visible_lengths")?,
        })
    }

    /// The lengths of the requests.
    pub fn cache_seqlens(&self) -> Vec<i32> {
        self.tensor("cache_seqlens").map_or_else(Vec::new, |t| t.to_f64().into_iter().map(|x| x as i32).collect())
    }

    /// Outputs for this call, poisoned.
    ///
    /// # Errors
    /// [`MlaError::Overflow`].
    pub fn poisoned_outputs(&self) -> Result<PoisonedOutputs> {
        match &self.output_strides {
            None => PoisonedOutputs::dense(&self.problem),
            Some((out, lse)) => PoisonedOutputs::strided(&self.problem, out, lse),
        }
    }

    /// The same call with its tensors laid out anew.
    ///
    /// # Errors
    /// [`MlaError::MissingTensor`], [`MlaError::Overflow`], and those of [`Inputs::validate`].
    pub fn with_layout(&self, layout: Layout) -> Result<Call> {
        let p = &self.problem;
        if layout == Layout::Given {
            return Ok(self.clone());
        }
        self.inputs()?.validate(p, Device::Host)?;
        let mut call = Call { tensors: Vec::new(), output_strides: None, ..self.clone_header() };
        for (fused, nope, pe) in [("q", "q_nope", "q_pe"), ("k_cache", "ckv", "kpe")] {
            let whole = self.fused(fused, nope, pe)?;
            if layout == Layout::Fused {
                call.tensors.push((fused, whole));
                continue;
            }
            let gap = nan(whole.dtype());
            call.tensors.push((nope, whole.columns(nope, 0..p.head_dim_v(), padded, &gap)?));
            if p.rope() > 0 {
                call.tensors.push((pe, whole.columns(pe, p.head_dim_v()..p.head_dim_k(), padded, &gap)?));
            }
        }
        for name in ["block_table", "cache_seqlens", "visible_lengths"] {
            if let Some(t) = self.tensor(name) {
                let mut copy = HostTensor::from_bytes(name, t.dtype(), t.shape(), &t.to_dense_bytes())?;
                if layout == Layout::Split && t.shape().len() == 2 {
                    let strides = |shape: &[usize]| vec![shape[1].saturating_add(GAP), 1];
                    copy = copy.columns(name, 0..t.shape()[1], strides, &nan(DType::I32))?;
                }
                call.tensors.push((name, copy));
            }
        }
        if layout == Layout::Split {
            let out = padded(&[p.b(), p.s_q(), p.h_q(), p.head_dim_v()]);
            let row = p.s_q().saturating_add(3);
            let lse = [row.saturating_mul(p.h_q()).saturating_add(5), row, 1];
            call.output_strides = Some(([out[0], out[1], out[2], out[3]], lse));
        }
        Ok(call)
    }

    /// A tensor of all head_dim_k columns, without gaps, whichever way the call holds it.
    fn fused(&self, fused: &'static str, nope: &'static str, pe: &'static str) -> Result<HostTensor> {
        if let Some(t) = self.tensor(fused) {
            return HostTensor::from_bytes(fused, t.dtype(), t.shape(), &t.to_dense_bytes());
        }
        let missing = MlaError::MissingTensor { param: fused, limit: "neither it nor its two parts are there" };
        let left = self.tensor(nope).ok_or(missing)?;
        let mut shape = left.shape().to_vec();
        shape[3] = self.problem.head_dim_k();
        let dense = contiguous_strides(&shape);
        let mut whole = HostTensor::filled(fused, left.dtype(), &shape, &dense[..4], 0, &[0; 4])?;
        whole.paste(left, 0, 0);
        if let Some(right) = self.tensor(pe).filter(|_| self.problem.rope() > 0) {
            whole.paste(right, 0, self.problem.head_dim_v());
        }
        Ok(whole)
    }

    fn clone_header(&self) -> Call {
        Call {
            name: self.name.clone(),
            problem: self.problem.clone(),
            tensors: Vec::new(),
            output_strides: None,
            expected: self.expected.clone(),
            tolerance: self.tolerance,
        }
    }
}
