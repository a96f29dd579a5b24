//! Scores that bite, and how far a right answer may be from the f64 reference.

use std::fmt;

use fastrand::Rng;
use half::{bf16, f16};

use super::call::{Call, Expected};
use super::check::Tolerance;
use crate::error::Result;
use crate::problem::Problem;
use crate::tensor::DType;

/// How the scores of a request lie along its sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape {
    /// Nothing but noise.
    Level,
    /// The maximum rises by `reach` from the first key to the last.
    Rising,
    /// The maximum falls by `reach`.
    Falling,
    /// One key stands out by `reach`.
    OneKey,
    /// All scores are near -`reach`: exp of them is 0 in f32.
    VeryNegative,
    /// All scores are near `reach`: exp of them is infinite in f32.
    VeryPositive,
}

/// How scores are distributed.
///
/// Noise of standard deviation `std` comes from all columns; what goes beyond it is put into one column, where every
/// query row has +-`GAIN`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scores {
    shape: Shape,
    std: f32,
    reach: f32,
    column: usize,
}

const GAIN: f32 = 8.0;

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "scores {:?} std {:.2} reach {:.0}", self.shape, self.std, self.reach)
    }
}

/// Nearly normal, standard deviation 1, from one draw: cheap, for millions of elements.
fn normal(rng: &mut Rng) -> f32 {
    let bits = rng.u64(..);
    let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xFFFF).sum();
    (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt()
}

/// What remains of `x` in the element type; bounded, so that no product of f16 is infinite.
fn round(dtype: DType, x: f32) -> f32 {
    let x = x.clamp(-30_000.0, 30_000.0);
    match dtype {
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl Scores {
    pub(super) fn random(rng: &mut Rng, p: &Problem) -> Self {
        let shapes = [Shape::Rising, Shape::Falling, Shape::OneKey, Shape::VeryNegative, Shape::VeryPositive];
        // Half of all problems are plain noise, half of those peaked.
        let (shape, std) = match rng.u8(0..4) {
            0 => (Shape::Level, 0.02 + rng.f32()),
            1 => (Shape::Level, 1.0 + 29.0 * rng.f32()),
            _ => (shapes[rng.usize(..shapes.len())], 0.1 + 3.0 * rng.f32()),
        };
        let reach = match shape {
            Shape::Level => 0.0,
            Shape::VeryNegative | Shape::VeryPositive => 100.0 + 200.0 * rng.f32(),
            _ => 10.0 + 70.0 * rng.f32(),
        };
        // A column of the rope where there is one, so that V stays plain.
        let column = if p.rope() > 0 { rng.usize(p.head_dim_v()..p.head_dim_k()) } else { rng.usize(..p.head_dim_k()) };
        Scores { shape, std, reach, column }
    }

    /// Query rows, [b, s_q, h_q, head_dim_k].
    pub(super) fn query(&self, rng: &mut Rng, p: &Problem) -> Vec<f32> {
        let d_k = p.head_dim_k();
        let gain = match p.softmax_scale() {
            0.0 => 1.0,
            scale => self.std / (scale * (d_k as f32).sqrt()),
        };
        let mut q = vec![0.0; p.rows() * d_k];
        for row in q.chunks_exact_mut(d_k) {
            row.iter_mut().for_each(|x| *x = round(p.dtype(), normal(rng) * gain));
            if self.shape != Shape::Level {
                // Some rows see the opposite: what rises for the others falls for them.
                row[self.column] = if rng.u8(0..8) == 0 { -GAIN } else { GAIN };
            }
        }
        q
    }

    /// The key that stands out, for a request of `n` tokens.
    pub(super) fn one_key(&self, rng: &mut Rng, n: usize) -> usize {
        rng.usize(0..n.max(1))
    }

    /// The row of token `t` of `n`.
    pub(super) fn key(&self, rng: &mut Rng, p: &Problem, row: &mut [f32], t: usize, n: usize, one_key: usize) {
        row.iter_mut().for_each(|x| *x = round(p.dtype(), normal(rng)));
        let along = t as f32 / n as f32;
        let target = match self.shape {
            Shape::Level => return,
            Shape::Rising => self.reach * along,
            Shape::Falling => self.reach * (1.0 - along),
            Shape::OneKey => self.reach * f32::from(u8::from(t == one_key)),
            Shape::VeryNegative => -self.reach,
            Shape::VeryPositive => self.reach,
        };
        if p.softmax_scale() > 0.0 {
            row[self.column] = round(p.dtype(), target / (p.softmax_scale() * GAIN));
        }
    }
}

/// Half the distance of neighbouring numbers of the type, relative to them.
fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-24),
    }
}

/// Sets the call's expected values, from the reference, and how far a result may be from each.
///
/// With u the unit roundoff of the element type, p the weights and v a column of V, an element of `out` may be off by
/// - 1.5 u |out|: storing it takes u/2 to u;
/// - 4 u sqrt(sum (p v)^2): a kernel may round its weights to the element type, each by at most u, independently, which
///   makes a standard deviation below 0.58 u sqrt(sum (p v)^2): this is 7 of them;
/// - (2 e + 2^-18) sum p |v|, where e bounds the error of a score: 2^-18 scale sum |q k| of the worst key, what
///   accumulating 576 products in f32 makes when it truncates (u of f32 is 2^-24, and errors of one sign add up);
/// - a (1 + sum |v|): a = 2^-25 for f16, whose weights and results below 2^-14 have an absolute roundoff; 2^-126 for the others,
///   because numbers below f32's normal ones may be flushed to zero.
///
/// An element of `lse` may be off by e + 2^-20, or by 2^-18 of itself.
///
/// The cosine difference is sum (x - y)^2 / sum (x^2 + y^2). Rounding to nearest makes squares of (u^2 / 3) / m^2 for
/// mantissas m from 1 to 2: 0.18 u^2 where they are spread as usual, 0.33 u^2 at the most, once for storing `out` and
/// once for the weights; truncating makes four times as much. 0.4 u^2 of each is admitted, more where few rows make the
/// mean, and the systematic terms above.
pub(super) fn expected(call: &mut Call, q: &[f32], k: &[f32]) -> Result<()> {
    let p = &call.problem;
    let inputs = call.inputs()?;
    let (out, lse) = crate::reference::decode(p, &inputs)?;
    let (d_k, d_v, h_kv, page_size) = (p.head_dim_k(), p.head_dim_v(), p.h_kv(), p.page_size());
    let scale = f64::from(p.softmax_scale());
    let u = unit_roundoff(p.dtype());
    let floor = if p.dtype() == DType::F16 { 2f64.powi(-25) } else { f64::from(f32::MIN_POSITIVE) };
    let mut out_abs = vec![floor; out.len()];
    let mut lse_abs = vec![0.0; lse.len()];
    let mut mean_squares = 0.0f64;
    let (mut squares, mut magnitude, mut plain) = (vec![0.0; d_v], vec![0.0; d_v], vec![0.0; d_v]);
    for (i, n) in inputs.host_seqlens()?.into_iter().enumerate() {
        for j in 0..p.s_q() {
            let visible = inputs.visible_lengths.as_ref().and_then(|v| v.get::<i32>(&[i, j]));
            let end = p.visible_end(n as usize, j, visible);
            for h in 0..p.h_q() {
                let row = (i * p.s_q() + j) * p.h_q() + h;
                let q_row = &q[row * d_k..][..d_k];
                let lse_at = (i * p.h_q() + h) * p.s_q() + j;
                let mut score_error = 0.0f64;
                [&mut squares, &mut magnitude, &mut plain].into_iter().for_each(|v| v.fill(0.0));
                for t in 0..end {
                    let page = inputs.block_table.get::<i32>(&[i, t / page_size]).unwrap_or(0) as usize;
                    let slot = (page * page_size + t % page_size) * h_kv + h / p.heads_per_kv();
                    let key = &k[slot * d_k..][..d_k];
                    let (mut dot, mut worst) = (0.0f64, 0.0f64);
                    for (a, b) in q_row.iter().zip(key) {
                        let product = f64::from(*a) * f64::from(*b);
                        dot += product;
                        worst += product.abs();
                    }
                    score_error = score_error.max(worst * scale * 2f64.powi(-18));
                    let weight = (dot * scale - lse[lse_at]).exp();
                    for (c, v) in key[..d_v].iter().enumerate() {
                        let part = weight * f64::from(*v).abs();
                        squares[c] += part * part;
                        magnitude[c] += part;
                        plain[c] += f64::from(*v).abs();
                    }
                }
                lse_abs[lse_at] = score_error + 2f64.powi(-20);
                for c in 0..d_v {
                    let stored = out[row * d_v + c].abs();
                    let systematic = (2.0 * score_error + 2f64.powi(-18)) * magnitude[c] + floor * plain[c];
                    out_abs[row * d_v + c] += 1.5 * u * stored + 4.0 * u * squares[c].sqrt() + systematic;
                    mean_squares += 0.4 * u * u * (stored * stored + squares[c]) + systematic * systematic;
                }
            }
        }
    }
    let norm: f64 = out.iter().map(|x| x * x).sum();
    let few_rows = 1.0 + 5.0 / (p.rows().max(1) as f64).sqrt();
    let cosine = if norm > 0.0 { few_rows * mean_squares / (2.0 * norm) } else { 0.0 };
    let lse_rel = 2f64.powi(-18);
    call.tolerance = Tolerance { out_abs: 0.0, out_rel: 0.0, cosine, lse_abs: 0.0, lse_rel };
    call.expected = Some(Expected { out, lse, out_abs, lse_abs });
    Ok(())
}
