//! What the decode and combine kernels are told about a call, and what they can be told.

use super::params::{DecodeParams, FLAG_KV_VEC16, FLAG_OUT_VEC, FLAG_Q_VEC16};
use crate::backend::Unsupported;
use crate::call::{Inputs, KvCache, Outputs, Query};
use crate::device::{MIN_SCALE_LOG2, usable_pages_per_seq};
use crate::problem::{KvFormat, Mask, Problem};
use crate::tensor::TensorView;

/// Whether the portable kernels can serve `problem`.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub(crate) fn supports(backend: &'static str, problem: &Problem) -> Result<(), Unsupported> {
    let refuse = |param, value: String, limit: &str| Err(Unsupported { backend, param, value, limit: limit.into() });
    if !matches!(problem.kv_format(), KvFormat::Bf16 | KvFormat::F16) {
        return refuse("kv_format", problem.kv_format().to_string(), "bf16 and f16");
    }
    // The counts must fit the kernels' 32-bit fields.
    for (param, value, limit, words) in [
        ("b", problem.b(), 65_536, "0..=65536"),
        ("h_kv", problem.h_kv(), 65_535, "1..=65535"),
        ("s_q x h_q", problem.s_q().saturating_mul(problem.h_q()), 1 << 24, "1..=16777216"),
        ("page_size", problem.page_size(), 1 << 24, "1..=16777216"),
        ("head_dim_k", problem.head_dim_k(), 1 << 20, "1..=1048576"),
    ] {
        if value > limit {
            return refuse(param, value.to_string(), words);
        }
    }
    Ok(())
}

/// Address and strides of the outer dimensions, and whether every row starts at a multiple of 16 bytes.
type Rows = (u64, [i64; 3], bool);

/// A tensor without elements is never read.
const NONE: Rows = (0, [0; 3], true);

fn starts_at(view: &TensorView<'_>, bytes: u64) -> bool {
    let size = view.dtype().size() as u64;
    let outer = view.shape().iter().zip(view.strides()).take(3);
    view.address().unwrap_or(0).is_multiple_of(bytes)
        // A stride that is never stepped by may be anything.
        && outer.into_iter().all(|(n, stride)| *n <= 1 || (*stride as u64).wrapping_mul(size).is_multiple_of(bytes))
}

fn strides<const N: usize>(view: &TensorView<'_>) -> [i64; N] {
    std::array::from_fn(|dim| view.strides()[dim] as i64)
}

fn rows(view: &TensorView<'_>) -> Rows {
    if view.is_empty() { NONE } else { (view.address().unwrap_or(0), strides(view), starts_at(view, 16)) }
}

/// Both parts of a fused tensor: the second begins head_dim_v columns into each row.
fn fused(problem: &Problem, view: &TensorView<'_>) -> [Rows; 2] {
    let (address, strides, aligned) = rows(view);
    let offset = (problem.head_dim_v() * problem.dtype().size()) as u64;
    let second = if address == 0 { 0 } else { address + offset };
    let aligned_second = aligned && (problem.rope() == 0 || offset.is_multiple_of(16));
    [(address, strides, aligned), (second, strides, aligned_second)]
}

fn split(first: &TensorView<'_>, second: Option<&TensorView<'_>>) -> [Rows; 2] {
    [rows(first), second.map_or(NONE, rows)]
}

/// What the kernels are told, but for the plan and the workspace. The tensors must have been validated.
pub(crate) fn params(problem: &Problem, inputs: &Inputs<'_>, outputs: &Outputs<'_>) -> DecodeParams {
    let [q_nope, q_pe] = match &inputs.query {
        Query::Fused(q) => fused(problem, q),
        Query::Split { q_nope, q_pe } => split(q_nope, q_pe.as_ref()),
    };
    let [ckv, kpe] = match &inputs.kv_cache {
        KvCache::Fused(k) => fused(problem, k),
        KvCache::Split { ckv, kpe } => split(ckv, kpe.as_ref()),
    };
    let (out, lse) = (outputs.out.as_view(), outputs.lse.as_view());
    let address = |view: &TensorView<'_>| view.address().unwrap_or(0);
    let visible = inputs.visible_lengths.as_ref();
    let flag = |set: bool, flag: i32| if set { flag } else { 0 };
    let page_size = problem.page_size();
    DecodeParams {
        q_nope: q_nope.0,
        q_pe: q_pe.0,
        q_nope_strides: q_nope.1,
        q_pe_strides: q_pe.1,
        ckv: ckv.0,
        kpe: kpe.0,
        ckv_strides: ckv.1,
        kpe_strides: kpe.1,
        block_table: address(&inputs.block_table),
        block_table_stride_b: inputs.block_table.strides()[0] as i64,
        cache_seqlens: address(&inputs.cache_seqlens),
        visible_lens: visible.map_or(0, address),
        visible_lens_stride_b: visible.map_or(0, |v| v.strides()[0] as i64),
        out: address(&out),
        out_strides: strides(&out),
        lse: address(&lse),
        // The contract's order is b, h_q, s_q, as here.
        lse_strides: strides(&lse),
        b: problem.b() as i32,
        s_q: problem.s_q() as i32,
        h_q: problem.h_q() as i32,
        h_kv: problem.h_kv() as i32,
        heads_per_kv: problem.heads_per_kv() as i32,
        head_dim_k: problem.head_dim_k() as i32,
        head_dim_v: problem.head_dim_v() as i32,
        page_size: page_size as i32,
        page_shift: if page_size.is_power_of_two() { page_size.ilog2() as i32 } else { -1 },
        num_pages: problem.num_pages() as i32,
        max_pages_per_seq: usable_pages_per_seq(problem),
        causal: i32::from(problem.mask() == Mask::Causal),
        flags: flag(q_nope.2 && q_pe.2, FLAG_Q_VEC16)
            | flag(ckv.2 && kpe.2, FLAG_KV_VEC16)
            | flag(starts_at(&out, 8) && (out.strides()[3] == 1 || problem.head_dim_v() == 1), FLAG_OUT_VEC),
        scale_log2: problem.scale_log2().max(MIN_SCALE_LOG2),
        ..DecodeParams::default()
    }
}
