//! Multi-head Latent Attention (MLA) decoding over a paged KV cache: the job of DeepSeek's FlashMLA, on every
//! accelerator, behind one trait, checked by one set of golden vectors.
//!
//! Four values, in this order: [`Problem`] -> [`Schedule`] -> [`Workspace`] -> [`MlaBackend::run`].

#![warn(missing_docs)]
#![warn(unsafe_op_in_unsafe_fn)]

pub mod backend;
pub mod call;
#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(any(feature = "sm90", feature = "cuda"))]
pub mod cuda;
#[cfg(any(feature = "sm90", feature = "cuda", feature = "driver"))]
mod device;
// `driver` alone is what its vendors share, with nobody to use it.
#[cfg(feature = "driver")]
#[cfg_attr(
    not(any(feature = "hip", feature = "musa", feature = "maca", feature = "corex")),
    allow(dead_code, reason = "what vendors share")
)]
pub mod driver;
pub mod error;
mod host;
#[cfg(any(feature = "sm90", feature = "cuda", feature = "driver"))]
pub mod kernels;
#[cfg(feature = "onnx")]
pub mod onnx;
#[cfg(any(feature = "cuda", feature = "driver"))]
#[cfg_attr(
    not(any(feature = "cuda", feature = "hip", feature = "musa", feature = "maca", feature = "corex")),
    allow(dead_code, reason = "what vendors share")
)]
mod portable;
pub mod problem;
pub mod reference;
pub mod schedule;
pub mod tensor;
#[cfg(feature = "wgpu")]
pub mod wgpu;
pub mod workspace;

/// The crate whose `bf16` and `f16` the tensors hold.
pub use half;

pub use backend::{
    BackendBuffer, BackendInfo, Evidence, HostBackend, MlaBackend, RepeatedInputs, Timing, Unsupported,
    flash_mla_with_kvcache, open, registry, select,
};
pub use call::{Inputs, KvCache, Outputs, Query};
pub use error::{MlaError, Result};
pub use problem::{KvFormat, Mask, Problem};
pub use reference::{merge_partials, scaled_dot_product_attention};
pub use schedule::{Schedule, ScheduleOptions, SplitPolicy, get_mla_metadata};
pub use tensor::{DType, Device, Element, TensorView, TensorViewMut};
pub use workspace::{HostWorkspace, Workspace};

/// The README's examples, compiled and run as doctests.
#[cfg(all(doctest, feature = "cpu"))]
#[doc = include_str!("../README.md")]
struct Readme;
