//! The crate's one error type. Every message names the parameter, its value and the limit.

use crate::backend::Unsupported;
use crate::tensor::DType;

/// What can go wrong, one variant for each kind of mistake.
///
/// A call that returns an error has written nothing to its outputs, unless the variant says otherwise.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum MlaError {
    /// A size that must be at least one is zero.
    #[error("{param} is 0; it must be at least 1")]
    ZeroSize {
        /// The parameter.
        param: &'static str,
    },
    /// `head_dim_v` exceeds `head_dim_k`: V is the first `head_dim_v` columns of K.
    #[error("head_dim_v is {head_dim_v}; it must be at most head_dim_k, which is {head_dim_k}")]
    HeadDimV {
        /// Columns of V asked for.
        head_dim_v: usize,
        /// Columns of K.
        head_dim_k: usize,
    },
    /// Query heads cannot be shared evenly among KV heads.
    #[error("h_q is {h_q}; it must be a multiple of h_kv, which is {h_kv}")]
    HeadGroups {
        /// Query heads.
        h_q: usize,
        /// KV heads.
        h_kv: usize,
    },
    /// The softmax scale is NaN, infinite or negative.
    #[error("softmax_scale is {value}; it must be finite and at least 0")]
    SoftmaxScale {
        /// The scale given.
        value: f32,
    },
    /// A product of sizes does not fit.
    #[error("{param} overflows: its value is {value}, the limit is {limit}")]
    Overflow {
        /// What was computed.
        param: &'static str,
        /// The factors, written out.
        value: String,
        /// The largest value allowed.
        limit: u64,
    },
    /// A tensor has another number of dimensions than the contract.
    #[error("{param} has {value} dimensions; it must have {limit}")]
    Rank {
        /// The tensor.
        param: &'static str,
        /// Its rank.
        value: usize,
        /// The rank of the contract.
        limit: usize,
    },
    /// A dimension differs from what the problem says.
    #[error("{param} has {value} at dimension {dim}; the problem says {limit}")]
    Shape {
        /// The tensor.
        param: &'static str,
        /// The dimension, from 0.
        dim: usize,
        /// Its size.
        value: usize,
        /// The size of the problem.
        limit: usize,
    },
    /// A tensor has another element type than the problem.
    #[error("{param} has dtype {value}; it must be {limit}")]
    DTypeMismatch {
        /// The tensor.
        param: &'static str,
        /// Its type.
        value: DType,
        /// The type of the problem.
        limit: DType,
    },
    /// The KV cache's format cannot be used with the query's type.
    #[error("kv_format is {value}; with dtype {dtype} it must be {limit}")]
    KvFormatMismatch {
        /// The format given.
        value: crate::problem::KvFormat,
        /// The problem's element type.
        dtype: DType,
        /// The format that goes with that type.
        limit: crate::problem::KvFormat,
    },
    /// Strides reach past the end of the tensor's memory.
    #[error("{param} reaches byte {value} with its shape and strides; its memory holds {limit} bytes")]
    StrideOverrun {
        /// The tensor.
        param: &'static str,
        /// Bytes needed.
        value: u64,
        /// Bytes there.
        limit: u64,
    },
    /// Two elements of an output share an address.
    #[error("{param} has stride {value} at dimension {dim}, so that elements alias; it must be at least {limit}")]
    StrideAlias {
        /// The tensor.
        param: &'static str,
        /// The dimension whose stride is too small.
        dim: usize,
        /// The stride, in elements.
        value: usize,
        /// The smallest stride that keeps elements apart.
        limit: usize,
    },
    /// An output's memory overlaps another tensor's.
    #[error("{param} overlaps {other}: byte {value} of it belongs to both; the limit is 0 shared bytes")]
    Overlap {
        /// The output.
        param: &'static str,
        /// The other tensor.
        other: &'static str,
        /// First shared byte, counted from the start of the output.
        value: u64,
    },
    /// The innermost stride of an input is not one.
    #[error("{param} has stride {value} in its last dimension; it must be 1")]
    InnerStride {
        /// The tensor.
        param: &'static str,
        /// The stride, in elements.
        value: usize,
    },
    /// Memory is not aligned for its element type.
    #[error("{param} is at address {value:#x}; it must be a multiple of {limit}")]
    Alignment {
        /// The tensor or buffer.
        param: &'static str,
        /// Its address.
        value: u64,
        /// The alignment needed, in bytes.
        limit: usize,
    },
    /// A tensor lives somewhere the backend cannot reach.
    #[error("{param} lives on {value}; this backend needs {limit}")]
    WrongDevice {
        /// The tensor.
        param: &'static str,
        /// Where it lives.
        value: crate::tensor::Device,
        /// Where it should.
        limit: crate::tensor::Device,
    },
    /// The problem needs a tensor that was not given.
    #[error("{param} is absent; {limit}")]
    MissingTensor {
        /// The tensor.
        param: &'static str,
        /// Why it is needed.
        limit: &'static str,
    },
    /// A tensor was given that the problem has no use for.
    #[error("{param} was given; {limit}")]
    UnexpectedTensor {
        /// The tensor.
        param: &'static str,
        /// Why it must be absent.
        limit: &'static str,
    },
    /// A block-table entry that a request uses names no page.
    #[error("block_table[{request}][{position}] is {value}; request {request} uses it, so it must be in 0..{limit}")]
    BlockTableEntry {
        /// The request.
        request: usize,
        /// The page position within the request.
        position: usize,
        /// The entry.
        value: i32,
        /// The number of pages in the cache.
        limit: usize,
    },
    /// A sequence length is negative.
    #[error("cache_seqlens[{request}] is {value}; it must be at least 0")]
    NegativeLength {
        /// The request.
        request: usize,
        /// The length.
        value: i32,
    },
    /// A sequence is longer than its row of the block table can hold.
    #[error("cache_seqlens[{request}] is {value}; its block-table row holds at most {limit} tokens")]
    LengthBeyondTable {
        /// The request.
        request: usize,
        /// The length.
        value: i32,
        /// max_pages_per_seq * page_size.
        limit: u64,
    },
    /// A visible length is negative or longer than its sequence.
    #[error("visible_lengths[{request}][{row}] is {value}; it must be in 0..={limit}")]
    VisibleLength {
        /// The request.
        request: usize,
        /// The query row of s_q.
        row: usize,
        /// The length given.
        value: i32,
        /// The request's cache_seqlens.
        limit: i32,
    },
    /// A schedule or workspace parameter is outside its range.
    #[error("{param} is {value}; it must be in {limit}")]
    Parameter {
        /// The parameter.
        param: &'static str,
        /// Its value.
        value: i64,
        /// The range, written out.
        limit: &'static str,
    },
    /// The workspace is smaller than the schedule needs.
    #[error("workspace has {value} bytes; this problem and schedule need {limit}")]
    WorkspaceTooSmall {
        /// Bytes given.
        value: usize,
        /// Bytes needed.
        limit: usize,
    },
    /// The schedule was made for another problem or other lengths.
    #[error("schedule has {param} {value}; this call has {limit}")]
    ScheduleMismatch {
        /// What differs.
        param: &'static str,
        /// Its value in the schedule.
        value: i64,
        /// Its value in this call.
        limit: i64,
    },
    /// A device-side check found bad input for a request; that request's outputs are NaN.
    #[error("request {request} failed the device-side check: {reason}; its out and lse are NaN")]
    DeviceCheck {
        /// The request.
        request: usize,
        /// What the status word says.
        reason: &'static str,
    },
    /// The backend cannot serve this problem.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// No such backend, or it cannot run here.
    #[error("backend {backend} is absent: {reason}")]
    Absent {
        /// The backend's name.
        backend: String,
        /// Why.
        reason: String,
    },
    /// An environment variable holds a value that is not understood.
    #[error("{param} is {value:?}; it must be one of {limit}")]
    Environment {
        /// The variable.
        param: &'static str,
        /// Its value.
        value: String,
        /// The values allowed.
        limit: String,
    },
    /// The platform below a backend (driver, compiler, adapter) reported a failure. Where that was in the middle of a run,
    /// its outputs may hold anything.
    #[error("{backend}: {call} failed: {message}")]
    Platform {
        /// The backend's name.
        backend: &'static str,
        /// The call that failed.
        call: &'static str,
        /// What the platform said.
        message: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = MlaError> = std::result::Result<T, E>;
