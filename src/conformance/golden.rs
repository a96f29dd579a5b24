//! Calls in safetensors files: the golden format, which is also how a user brings tensors of his own.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `q`, or `q_nope` and `q_pe` | [b, s_q, h_q, columns] | bf16, f16 or f32 |
//! | `k_cache`, or `ckv` and `kpe` | [num_pages, page_size, h_kv, columns] | as q |
//! | `block_table` | [b, max_pages_per_seq] | i32 |
//! | `cache_seqlens` | `[b]` | i32 |
//! | `visible_lengths` | [b, s_q] | i32, optional |
//! | `ref_out`, `ref_lse` | [b, s_q, h_q, head_dim_v], [b, h_q, s_q] | optional: the expected values |
//!
//! Metadata, all strings: `kind` (`dense_decode`, also where absent), `head_dim_v` (needed where neither `q_nope` nor
//! `ckv` tells it), `softmax_scale` (head_dim_k^-0.5), `causal` (`false`), `page_block_size` (checked where present),
//! `abs_tol` (in place of the absolute tolerance of `out`). `out` and `lse` of a file are another kernel's results, not
//! expected values.

use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView as FileTensor;
use safetensors::{Dtype, SafeTensors};

use super::call::{Call, Expected};
use super::check::Tolerance;
pub use super::save::{save, save_inputs};
use super::tensor::HostTensor;
use crate::error::MlaError;
use crate::problem::{Mask, Problem};
use crate::tensor::{DType, Device};

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub reason: FileReason,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileReason {
    /// The system refused.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It is not a safetensors file.
    #[error("not a safetensors file: {0}")]
    Format(#[from] safetensors::SafeTensorError),
    /// The call is of a kind that this build cannot run.
    #[error("kind is {value:?}; it must be \"dense_decode\"")]
    Kind {
        /// The kind.
        value: String,
    },
    /// A tensor that every call needs is not there.
    #[error("tensor {name} is missing; {limit}")]
    MissingTensor {
        /// The tensor.
        name: &'static str,
        /// Why it is needed.
        limit: &'static str,
    },
    /// The same thing is given twice.
    #[error("both {first} and {second} are there; there must be one of them")]
    Ambiguous {
        /// One of them.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// An element type that the tensor cannot have.
    #[error("tensor {name} has dtype {value:?}; it must be {limit}")]
    ElementType {
        /// The tensor.
        name: &'static str,
        /// Its type.
        value: Dtype,
        /// The types allowed.
        limit: &'static str,
    },
    /// Another number of dimensions than the format's.
    #[error("tensor {name} has {value} dimensions; it must have {limit}")]
    Rank {
        /// The tensor.
        name: &'static str,
        /// Its rank.
        value: usize,
        /// The rank of the format.
        limit: usize,
    },
    /// A shape that contradicts the other tensors.
    #[error("tensor {name} has shape {value:?}; the other tensors make it {limit:?}")]
    Shape {
        /// The tensor.
        name: &'static str,
        /// Its shape.
        value: Vec<usize>,
        /// The shape it must have.
        limit: Vec<usize>,
    },
    /// A metadata entry that is missing or not understood.
    #[error("metadata {key} is {value}; it must be {limit}")]
    Metadata {
        /// The entry.
        key: &'static str,
        /// Its value, or `absent`.
        value: String,
        /// The values allowed.
        limit: String,
    },
    /// The tensors do not make a valid call.
    #[error(transparent)]
    Call(#[from] MlaError),
}

type Result<T, E = FileReason> = std::result::Result<T, E>;

/// Reads a call.
///
/// # Errors
/// [`FileError`], with the path and what is wrong.
pub fn load(path: impl AsRef<Path>) -> Result<Call, FileError> {
    let path = path.as_ref();
    let name = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    let read = std::fs::read(path).map_err(FileReason::from);
    read.and_then(|bytes| parse(name, &bytes)).map_err(|reason| FileError { path: path.into(), reason })
}

/// The safetensors files of a directory in order of their names, or the one file that `path` names.
///
/// # Errors
/// [`FileError`], with the path and what the system said.
pub fn list(path: impl AsRef<Path>) -> Result<Vec<PathBuf>, FileError> {
    let path = path.as_ref();
    let fail = |reason: std::io::Error| FileError { path: path.into(), reason: reason.into() };
    if !std::fs::metadata(path).map_err(fail)?.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let file = entry.map_err(fail)?.path();
        if file.extension().is_some_and(|e| e == "safetensors") {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a call from the bytes of a file.
///
/// # Errors
/// [`FileReason`].
pub fn parse(name: String, bytes: &[u8]) -> Result<Call> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let entry = |key: &str| metadata.get(key).map(String::as_str);
    if let Some(kind) = entry("kind").filter(|k| *k != "dense_decode") {
        return Err(FileReason::Kind { value: kind.into() });
    }
    let file = File(SafeTensors::deserialize(bytes)?);
    let mut tensors = Vec::new();
    let query = file.parts(&mut tensors, "q", "q_nope", "q_pe")?;
    let cache = file.parts(&mut tensors, "k_cache", "ckv", "kpe")?;
    let table = file.integers("block_table", 2)?;
    let lengths = file.integers("cache_seqlens", 1)?;

    let number = |key, limit: &str| parse_entry::<usize>(entry(key), key, limit);
    let told = cache.head_dim_v.or(query.head_dim_v);
    let head_dim_v = match (number("head_dim_v", "a whole number")?, told) {
        (Some(given), Some(told)) if given != told => {
            let limit = format!("{told}, as q_nope and ckv have it");
            return Err(FileReason::Metadata { key: "head_dim_v", value: given.to_string(), limit });
        }
        (Some(n), _) | (None, Some(n)) => n,
        (None, None) => {
            let limit = "there, since q and k_cache do not tell it".into();
            return Err(FileReason::Metadata { key: "head_dim_v", value: "absent".into(), limit });
        }
    };
    if let Some(given) = number("page_block_size", "a whole number")?.filter(|n| *n != cache.shape[1]) {
        let limit = format!("{}, the second dimension of the cache", cache.shape[1]);
        return Err(FileReason::Metadata { key: "page_block_size", value: given.to_string(), limit });
    }
    let causal = match entry("causal").map(str::to_ascii_lowercase).as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let limit = "true or false".into();
            return Err(FileReason::Metadata { key: "causal", value: format!("{other:?}"), limit });
        }
    };
    let visible = file.0.tensor("visible_lengths").is_ok();
    if visible && causal {
        let limit = "false where visible_lengths is there".into();
        return Err(FileReason::Metadata { key: "causal", value: "true".into(), limit });
    }
    let mask = match (visible, causal) {
        (true, _) => Mask::VisibleLengths,
        (false, true) => Mask::Causal,
        (false, false) => Mask::None,
    };
    let mut builder = Problem::builder(query.shape[0])
        .s_q(query.shape[1])
        .h_q(query.shape[2])
        .h_kv(cache.shape[2])
        .head_dim_k(query.shape[3])
        .head_dim_v(head_dim_v)
        .num_pages(cache.shape[0])
        .page_size(cache.shape[1])
        .max_pages_per_seq(table.shape()[1])
        .dtype(query.dtype)
        .mask(mask);
    if let Some(scale) = parse_entry::<f32>(entry("softmax_scale"), "softmax_scale", "a number")? {
        builder = builder.softmax_scale(scale);
    }
    let problem = builder.build()?;
    tensors.push(("block_table", table));
    tensors.push(("cache_seqlens", lengths));
    if visible {
        tensors.push(("visible_lengths", file.integers("visible_lengths", 2)?));
    }
    let mut tolerance = Tolerance::default();
    if let Some(abs) = parse_entry::<f64>(entry("abs_tol"), "abs_tol", "a number of at least 0")? {
        if !(abs.is_finite() && abs >= 0.0) {
            let limit = "a number of at least 0".into();
            return Err(FileReason::Metadata { key: "abs_tol", value: abs.to_string(), limit });
        }
        tolerance.out_abs = abs;
    }
    let expected = file.expected(&problem)?;
    let call = Call { name, problem, tensors, output_strides: None, expected, tolerance };
    call.inputs()?.validate(&call.problem, Device::Host)?;
    Ok(call)
}

fn parse_entry<T: std::str::FromStr>(value: Option<&str>, key: &'static str, limit: &str) -> Result<Option<T>> {
    let wrong = |v: &str| FileReason::Metadata { key, value: format!("{v:?}"), limit: limit.into() };
    value.map(|v| v.trim().parse().map_err(|_| wrong(v))).transpose()
}

struct File<'a>(SafeTensors<'a>);

/// What the query's or the cache's tensors tell together.
struct Parts {
    /// With all head_dim_k columns.
    shape: [usize; 4],
    dtype: DType,
    head_dim_v: Option<usize>,
}

impl File<'_> {
    fn tensor(&self, name: &'static str) -> Option<FileTensor<'_>> {
        self.0.tensor(name).ok()
    }

    /// Takes a tensor of four dimensions whole, or as its two parts.
    fn parts(
        &self,
        tensors: &mut Vec<(&'static str, HostTensor)>,
        fused: &'static str,
        nope: &'static str,
        pe: &'static str,
    ) -> Result<Parts> {
        let (first, rope) = match (self.tensor(fused), self.tensor(nope), self.tensor(pe)) {
            (Some(whole), None, None) => ((fused, whole), None),
            (None, Some(left), right) => ((nope, left), right),
            (None, None, _) => {
                let limit = "it must be there, whole or as its two parts";
                return Err(FileReason::MissingTensor { name: fused, limit });
            }
            (Some(_), Some(_), _) => return Err(FileReason::Ambiguous { first: fused, second: nope }),
            (Some(_), None, Some(_)) => return Err(FileReason::Ambiguous { first: fused, second: pe }),
        };
        let (name, tensor) = first;
        let (mut shape, dtype) = four_dimensions(name, &tensor)?;
        let head_dim_v = (name == nope).then_some(shape[3]);
        tensors.push((name, copy(name, &tensor, dtype)?));
        if let Some(rope) = rope {
            let (pe_shape, pe_dtype) = four_dimensions(pe, &rope)?;
            if pe_shape[..3] != shape[..3] {
                let limit = vec![shape[0], shape[1], shape[2], pe_shape[3]];
                return Err(FileReason::Shape { name: pe, value: pe_shape.to_vec(), limit });
            }
            tensors.push((pe, copy(pe, &rope, pe_dtype)?));
            shape[3] = shape[3].saturating_add(pe_shape[3]);
        }
        Ok(Parts { shape, dtype, head_dim_v })
    }

    fn integers(&self, name: &'static str, rank: usize) -> Result<HostTensor> {
        let limit = "every call needs it";
        let tensor = self.tensor(name).ok_or(FileReason::MissingTensor { name, limit })?;
        if tensor.dtype() != Dtype::I32 {
            return Err(FileReason::ElementType { name, value: tensor.dtype(), limit: "I32" });
        }
        if tensor.shape().len() != rank {
            return Err(FileReason::Rank { name, value: tensor.shape().len(), limit: rank });
        }
        copy(name, &tensor, DType::I32)
    }

    fn expected(&self, p: &Problem) -> Result<Option<Expected>> {
        let (out, lse) = match (self.tensor("ref_out"), self.tensor("ref_lse")) {
            (None, None) => return Ok(None),
            (Some(out), Some(lse)) => (out, lse),
            (Some(_), None) => {
                return Err(FileReason::MissingTensor { name: "ref_lse", limit: "ref_out is there" });
            }
            (None, Some(_)) => {
                return Err(FileReason::MissingTensor { name: "ref_out", limit: "ref_lse is there" });
            }
        };
        Ok(Some(Expected {
            out: values("ref_out", &out, &[p.b(), p.s_q(), p.h_q(), p.head_dim_v()])?,
            lse: values("ref_lse", &lse, &[p.b(), p.h_q(), p.s_q()])?,
            ..Expected::default()
        }))
    }
}

fn four_dimensions(name: &'static str, tensor: &FileTensor<'_>) -> Result<([usize; 4], DType)> {
    let rank = tensor.shape().len();
    let shape = tensor.shape().try_into().map_err(|_| FileReason::Rank { name, value: rank, limit: 4 })?;
    Ok((shape, float_type(name, tensor)?))
}

fn float_type(name: &'static str, tensor: &FileTensor<'_>) -> Result<DType> {
    match tensor.dtype() {
        Dtype::BF16 => Ok(DType::Bf16),
        Dtype::F16 => Ok(DType::F16),
        Dtype::F32 => Ok(DType::F32),
        value => Err(FileReason::ElementType { name, value, limit: "BF16, F16 or F32" }),
    }
}

/// Copies a tensor out of the file, whose data may begin anywhere, into memory aligned for its elements.
fn copy(name: &'static str, tensor: &FileTensor<'_>, dtype: DType) -> Result<HostTensor> {
    Ok(HostTensor::from_bytes(name, dtype, tensor.shape(), tensor.data())?)
}

fn values(name: &'static str, tensor: &FileTensor<'_>, shape: &[usize]) -> Result<Vec<f64>> {
    if tensor.shape() != shape {
        return Err(FileReason::Shape { name, value: tensor.shape().to_vec(), limit: shape.to_vec() });
    }
    if tensor.dtype() == Dtype::F64 {
        let value = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap_or([0; 8]));
        return Ok(tensor.data().chunks_exact(8).map(value).collect());
    }
    Ok(copy(name, tensor, float_type(name, tensor)?)?.to_f64())
}
