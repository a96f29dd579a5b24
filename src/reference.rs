//! The plain reference: what the contract means, in f64, and the merging of partial results.

use crate::call::{Inputs, KvCache, Query};
use crate::error::{MlaError, Result};
use crate::problem::{Mask, Problem};
use crate::tensor::{DType, Device, TensorView};

/// Attention of one request, as plainly as it can be written: f64 throughout, no tiling.
///
/// | argument | shape |
/// |---|---|
/// | `q` | [s_q, h_q, d_k], bf16, f16 or f32 on the host, any strides |
/// | `k` | [s_k, h_kv, d_k] |
/// | `v` | [s_k, h_kv, d_v] |
/// | `visible` | s_q entries: row j sees the first `visible[j]` keys (see [`Problem::visible_end`]) |
///
/// Query head h reads KV head h / (h_q / h_kv). Returns `out` [s_q, h_q, d_v] and `lse` [h_q, s_q], the natural
/// logarithm of the softmax's denominator. A row that sees no key has out 0 and lse +infinity, as upstream returns it.
/// Keys that a row does not see do not count, so they may be NaN.
///
/// # Errors
/// [`MlaError::Rank`], [`MlaError::Shape`], [`MlaError::HeadGroups`], [`MlaError::SoftmaxScale`],
/// [`MlaError::WrongDevice`], [`MlaError::DTypeMismatch`], [`MlaError::VisibleLength`]; [`MlaError::Overflow`] for sizes
/// that this machine has no memory for.
pub fn scaled_dot_product_attention(
    q: &TensorView<'_>,
    k: &TensorView<'_>,
    v: &TensorView<'_>,
    softmax_scale: f32,
    visible: &[usize],
) -> Result<(Vec<f64>, Vec<f64>)> {
    for (param, t) in [("q", q), ("k", k), ("v", v)] {
        if t.shape().len() != 3 {
            return Err(MlaError::Rank { param, value: t.shape().len(), limit: 3 });
        }
        if t.device() != Device::Host {
            return Err(MlaError::WrongDevice { param, value: t.device(), limit: Device::Host });
        }
        if t.dtype() == DType::I32 {
            return Err(MlaError::DTypeMismatch { param, value: DType::I32, limit: DType::F32 });
        }
    }
    let [s_q, h_q, d_k] = [q.shape()[0], q.shape()[1], q.shape()[2]];
    let [s_k, h_kv, d_v] = [k.shape()[0], k.shape()[1], v.shape()[2]];
    for (param, dim, value, limit) in [
        ("k", 2, k.shape()[2], d_k),
        ("v", 0, v.shape()[0], s_k),
        ("v", 1, v.shape()[1], h_kv),
        ("visible", 0, visible.len(), s_q),
    ] {
        if value != limit {
            return Err(MlaError::Shape { param, dim, value, limit });
        }
    }
    if h_kv == 0 || !h_q.is_multiple_of(h_kv) {
        return Err(MlaError::HeadGroups { h_q, h_kv });
    }
    if !softmax_scale.is_finite() || softmax_scale < 0.0 {
        return Err(MlaError::SoftmaxScale { value: softmax_scale });
    }
    for (row, end) in visible.iter().enumerate() {
        if *end > s_k {
            let value = i32::try_from(*end).unwrap_or(i32::MAX);
            let limit = i32::try_from(s_k).unwrap_or(i32::MAX);
            return Err(MlaError::VisibleLength { request: 0, row, value, limit });
        }
    }
    let mut out = filled("out elements", &[s_q, h_q, d_v], 0.0)?;
    let mut lse = filled("lse elements", &[h_q, s_q], f64::INFINITY)?;
    let (q, k, v) = (elements("q elements", q)?, elements("k elements", k)?, elements("v elements", v)?);
    let group = h_q / h_kv;
    for j in 0..s_q {
        for h in 0..h_q {
            if visible[j] == 0 {
                continue;
            }
            let q_row = &q[(j * h_q + h) * d_k..][..d_k];
            let score = |t: usize| -> f64 {
                let k_row = &k[(t * h_kv + h / group) * d_k..][..d_k];
                q_row.iter().zip(k_row).map(|(a, b)| a * b).sum::<f64>() * f64::from(softmax_scale)
            };
            let scores: Vec<f64> = (0..visible[j]).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let row = &mut out[(j * h_q + h) * d_v..][..d_v];
            for (t, s) in scores.iter().enumerate() {
                let p = (s - max).exp() / sum;
                let v_row = &v[(t * h_kv + h / group) * d_v..][..d_v];
                row.iter_mut().zip(v_row).for_each(|(o, x)| *o += p * x);
            }
            lse[h * s_q + j] = max + sum.ln();
        }
    }
    Ok((out, lse))
}

/// Memory for the product of `sizes` values. Strides of 0 make tensors of any size of little memory, so that a size may
/// be one that no memory holds.
fn filled<T: Clone>(param: &'static str, sizes: &[usize], value: T) -> Result<Vec<T>> {
    let mut values = Vec::new();
    let count = match sizes.contains(&0) {
        true => Some(0),
        false => sizes.iter().try_fold(1usize, |product, n| product.checked_mul(*n)),
    };
    match count.filter(|count| values.try_reserve_exact(*count).is_ok()) {
        Some(count) => values.resize(count, value),
        None => {
            let value = sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            return Err(MlaError::Overflow { param, value, limit: isize::MAX as u64 / size_of::<T>() as u64 });
        }
    }
    Ok(values)
}

/// Every element of a tensor of three dimensions, row-major.
fn elements(param: &'static str, t: &TensorView<'_>) -> Result<Vec<f64>> {
    let mut values = filled(param, t.shape(), f64::NAN)?;
    let [rows, columns] = [t.shape()[1], t.shape()[2]];
    for (at, row) in values.chunks_exact_mut(columns.max(1)).enumerate() {
        for (column, value) in row.iter_mut().enumerate() {
            *value = t.get_f64(&[at / rows, at % rows, column]).unwrap_or(f64::NAN);
        }
    }
    Ok(values)
}

/// The reference over a paged cache: gathers each request's pages and calls [`scaled_dot_product_attention`].
///
/// Returns `out` [b, s_q, h_q, head_dim_v] and `lse` [b, h_q, s_q], both without gaps.
///
/// # Errors
/// Everything that [`MlaBackend::run`](crate::MlaBackend::run) reports about its inputs.
pub fn decode(problem: &Problem, inputs: &Inputs<'_>) -> Result<(Vec<f64>, Vec<f64>)> {
    let p = problem;
    inputs.validate(p, Device::Host)?;
    inputs.check_host_tables(p)?;
    let (d_k, d_v) = (p.head_dim_k(), p.head_dim_v());
    let q_at = |i: usize, j: usize, h: usize, d: usize| match &inputs.query {
        Query::Fused(q) => q.get_f64(&[i, j, h, d]),
        Query::Split { q_nope, .. } if d < d_v => q_nope.get_f64(&[i, j, h, d]),
        Query::Split { q_pe, .. } => q_pe.as_ref().and_then(|t| t.get_f64(&[i, j, h, d - d_v])),
    };
    let k_at = |page: usize, slot: usize, g: usize, d: usize| match &inputs.kv_cache {
        KvCache::Fused(k) => k.get_f64(&[page, slot, g, d]),
        KvCache::Split { ckv, .. } if d < d_v => ckv.get_f64(&[page, slot, g, d]),
        KvCache::Split { kpe, .. } => kpe.as_ref().and_then(|t| t.get_f64(&[page, slot, g, d - d_v])),
    };
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for (i, len) in inputs.host_seqlens()?.into_iter().enumerate() {
        let s_k = len as usize;
        let mut q = Vec::with_capacity(p.s_q() * p.h_q() * d_k);
        for j in 0..p.s_q() {
            for h in 0..p.h_q() {
                q.extend((0..d_k).map(|d| q_at(i, j, h, d).unwrap_or(f64::NAN) as f32));
            }
        }
        let mut k = Vec::with_capacity(s_k * p.h_kv() * d_k);
        for t in 0..s_k {
            let page = inputs.block_table.get::<i32>(&[i, t / p.page_size()]).unwrap_or(-1) as usize;
            for g in 0..p.h_kv() {
                k.extend((0..d_k).map(|d| k_at(page, t % p.page_size(), g, d).unwrap_or(f64::NAN) as f32));
            }
        }
        let visible: Vec<usize> = (0..p.s_q())
            .map(|j| {
                let given = inputs.visible_lengths.as_ref().and_then(|v| v.get::<i32>(&[i, j]));
                p.visible_end(s_k, j, given.filter(|_| p.mask() == Mask::VisibleLengths))
            })
            .collect();
        // bf16, f16 and f32 all fit f32 exactly, so nothing is lost on the way.
        let q = TensorView::from_slice("q", &q, &[p.s_q(), p.h_q(), d_k])?;
        let keys = TensorView::from_slice("k", &k, &[s_k, p.h_kv(), d_k])?;
        let values = TensorView::from_slice_strided("v", &k, &[s_k, p.h_kv(), d_v], &[p.h_kv() * d_k, d_k, 1])?;
        let (o, l) = scaled_dot_product_attention(&q, &keys, &values, p.softmax_scale(), &visible)?;
        out.extend(o);
        lse.extend(l);
    }
    Ok((out, lse))
}

/// Merges attention over disjoint sets of keys into attention over their union.
///
/// | argument | shape |
/// |---|---|
/// | `outs` | [parts, rows, d_v] f32, each normalised over its own keys |
/// | `lses` | [parts, rows] f32, natural logarithm |
///
/// A part whose lse is infinite, of either sign, has seen no key for that row and counts for nothing, whatever its
/// `outs` holds: `run` marks such rows with +infinity, streaming kernels with -infinity. A row that no part saw a key
/// for returns out 0 and lse +infinity. NaN stays NaN. Returns (`out` [rows, d_v], `lse` `[rows]`).
///
/// The formula is that of FlashAttention's split-KV combine: lse = log(sum_i exp(lse_i)),
/// out = sum_i exp(lse_i - lse) * out_i; computed in f64, parts in order.
///
/// # Errors
/// [`MlaError::Shape`] where the lengths do not agree; [`MlaError::Overflow`].
pub fn merge_partials(
    outs: &[f32],
    lses: &[f32],
    parts: usize,
    rows: usize,
    d_v: usize,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let overflow = || MlaError::Overflow {
        param: "outs elements",
        value: format!("{parts} x {rows} x {d_v}"),
        limit: isize::MAX as u64,
    };
    let partial_rows = parts.checked_mul(rows).ok_or_else(overflow)?;
    let elements = partial_rows.checked_mul(d_v).ok_or_else(overflow)?;
    if lses.len() != partial_rows {
        return Err(MlaError::Shape { param: "lses", dim: 0, value: lses.len(), limit: partial_rows });
    }
    if outs.len() != elements {
        return Err(MlaError::Shape { param: "outs", dim: 0, value: outs.len(), limit: elements });
    }
    // Without parts, nothing that was given bounds the rows.
    let mut out = filled("out", &[rows, d_v], 0.0f32).map_err(|_| overflow())?;
    let mut lse = filled("lse", &[rows], f32::INFINITY).map_err(|_| overflow())?;
    let mut sum_row = filled("d_v", &[d_v], 0.0f64).map_err(|_| overflow())?;
    for r in 0..rows {
        let seen = || (0..parts).map(|i| (i, f64::from(lses[i * rows + r]))).filter(|(_, l)| !l.is_infinite());
        if seen().next().is_none() {
            continue;
        }
        // f64::max ignores NaN, which then still reaches the sum.
        let max = seen().map(|(_, l)| l).fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = seen().map(|(_, l)| (l - max).exp()).sum();
        sum_row.fill(0.0);
        for (i, l) in seen() {
            let weight = (l - max).exp() / total;
            for (s, o) in sum_row.iter_mut().zip(&outs[(i * rows + r) * d_v..][..d_v]) {
                *s += weight * f64::from(*o);
            }
        }
        for (o, s) in out[r * d_v..][..d_v].iter_mut().zip(&sum_row) {
            *o = *s as f32;
        }
        lse[r] = (max + total.ln()) as f32;
    }
    Ok((out, lse))
}
