//! What is to be computed: shapes, element types and flags of one decode step, and its arithmetic.

use std::fmt;

use crate::error::{MlaError, Result};
use crate::tensor::DType;

/// Tokens in a schedule block. Upstream's unit; independent of the page size.
pub const BLOCK_TOKENS: usize = 64;

/// How the KV cache stores a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvFormat {
    /// head_dim_k bfloat16 values.
    Bf16,
    /// head_dim_k binary16 values.
    F16,
    /// head_dim_k binary32 values.
    F32,
}

impl KvFormat {
    /// The plain format whose elements have the query's type; `None` where there is none (i32).
    pub const fn of(dtype: DType) -> Option<KvFormat> {
        match dtype {
            DType::Bf16 => Some(KvFormat::Bf16),
            DType::F16 => Some(KvFormat::F16),
            DType::F32 => Some(KvFormat::F32),
            DType::I32 => None,
        }
    }

    /// Bytes that one token of one KV head takes.
    pub const fn bytes_per_token(self, head_dim_k: usize) -> usize {
        match self {
            KvFormat::Bf16 | KvFormat::F16 => 2 * head_dim_k,
            KvFormat::F32 => 4 * head_dim_k,
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvFormat::Bf16 => "bf16",
            KvFormat::F16 => "f16",
            KvFormat::F32 => "f32",
        })
    }
}

/// Which keys a query row may see, beyond the bound of `cache_seqlens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mask {
    /// Every row sees all keys of its request.
    #[default]
    None,
    /// Aligned bottom-right: row j of s_q sees the first `cache_seqlens - s_q + j + 1` keys. With s_q 1 that is all.
    Causal,
    /// Row j of request i sees the first `visible_lengths[i][j]` keys, at most `cache_seqlens[i]`.
    VisibleLengths,
}

/// One decode step. Built by [`Problem::builder`], which validates it.
///
/// | tensor | shape |
/// |---|---|
/// | q | [b, s_q, h_q, head_dim_k] |
/// | k_cache | [num_pages, page_size, h_kv, head_dim_k]; V is its first head_dim_v columns |
/// | block_table | [b, max_pages_per_seq] |
/// | cache_seqlens | `[b]` |
/// | out | [b, s_q, h_q, head_dim_v] |
/// | lse | [b, h_q, s_q], natural logarithm |
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    b: usize,
    s_q: usize,
    h_q: usize,
    h_kv: usize,
    head_dim_k: usize,
    head_dim_v: usize,
    num_pages: usize,
    page_size: usize,
    max_pages_per_seq: usize,
    dtype: DType,
    kv_format: KvFormat,
    mask: Mask,
    softmax_scale: f32,
}

/// Collects the fields of a [`Problem`]. Fields not set have DeepSeek's values: s_q 1, h_q 128, h_kv 1, head_dim_k 576,
/// head_dim_v 512, page_size 64, bf16, no mask, softmax_scale head_dim_k^-0.5.
#[derive(Debug, Clone)]
pub struct ProblemBuilder {
    problem: Problem,
    kv_format: Option<KvFormat>,
    softmax_scale: Option<f32>,
}

macro_rules! setter {
    ($(#[$doc:meta])* $name:ident: $type:ty) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $type) -> Self {
            self.problem.$name = $name;
            self
        }
    };
}

impl ProblemBuilder {
    setter!(
        /// Requests in the batch.
        b: usize);
    setter!(
        /// Query tokens a request (1 in plain decoding, more with speculative decoding).
        s_q: usize);
    setter!(
        /// Query heads.
        h_q: usize);
    setter!(
        /// KV heads; a divisor of h_q.
        h_kv: usize);
    setter!(
        /// Columns of Q and K.
        head_dim_k: usize);
    setter!(
        /// Columns of V and of the output: the first ones of K. The rest, `head_dim_k - head_dim_v`, is the rope part.
        head_dim_v: usize);
    setter!(
        /// Pages in the cache.
        num_pages: usize);
    setter!(
        /// Tokens a page.
        page_size: usize);
    setter!(
        /// Columns of the block table.
        max_pages_per_seq: usize);
    setter!(
        /// Element type of q and out.
        dtype: DType);
    setter!(
        /// Which keys a row may see.
        mask: Mask);

    /// How the cache stores tokens; defaults to the elements of `dtype`.
    #[must_use]
    pub fn kv_format(mut self, kv_format: KvFormat) -> Self {
        self.kv_format = Some(kv_format);
        self
    }

    /// Multiplies q.k before the softmax; defaults to head_dim_k^-0.5.
    #[must_use]
    pub fn softmax_scale(mut self, softmax_scale: f32) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// Validates and returns the problem.
    ///
    /// # Errors
    /// [`MlaError::ZeroSize`], [`MlaError::HeadDimV`], [`MlaError::HeadGroups`], [`MlaError::SoftmaxScale`],
    /// [`MlaError::DTypeMismatch`], [`MlaError::KvFormatMismatch`], [`MlaError::Overflow`]. b, num_pages and
    /// max_pages_per_seq may be 0.
    pub fn build(self) -> Result<Problem> {
        let mut p = self.problem;
        for (param, value) in [
            ("s_q", p.s_q),
            ("h_q", p.h_q),
            ("h_kv", p.h_kv),
            ("head_dim_k", p.head_dim_k),
            ("head_dim_v", p.head_dim_v),
            ("page_size", p.page_size),
        ] {
            if value == 0 {
                return Err(MlaError::ZeroSize { param });
            }
        }
        if p.head_dim_v > p.head_dim_k {
            return Err(MlaError::HeadDimV { head_dim_v: p.head_dim_v, head_dim_k: p.head_dim_k });
        }
        if !p.h_q.is_multiple_of(p.h_kv) {
            return Err(MlaError::HeadGroups { h_q: p.h_q, h_kv: p.h_kv });
        }
        let natural = KvFormat::of(p.dtype).ok_or(MlaError::DTypeMismatch {
            param: "dtype",
            value: p.dtype,
            limit: DType::Bf16,
        })?;
        p.kv_format = self.kv_format.unwrap_or(natural);
        if p.kv_format != natural {
            return Err(MlaError::KvFormatMismatch { value: p.kv_format, dtype: p.dtype, limit: natural });
        }
        p.softmax_scale = self.softmax_scale.unwrap_or_else(|| (p.head_dim_k as f32).sqrt().recip());
        if !p.softmax_scale.is_finite() || p.softmax_scale < 0.0 {
            return Err(MlaError::SoftmaxScale { value: p.softmax_scale });
        }
        // Everything that later code multiplies is bounded here, once, so that offsets cannot wrap in 64 bits.
        let size = p.dtype.size();
        for (param, limit, factors) in [
            ("q elements", BYTES / size, &[p.b, p.s_q, p.h_q, p.head_dim_k][..]),
            ("out elements", BYTES / 4, &[p.b, p.s_q, p.h_q, p.head_dim_v]),
            ("k_cache elements", BYTES / size, &[p.num_pages, p.page_size, p.h_kv, p.head_dim_k]),
            ("block_table elements", BYTES / 4, &[p.b, p.max_pages_per_seq]),
            ("tokens a request", BYTES, &[p.max_pages_per_seq, p.page_size]),
            ("b", i32::MAX as usize - 1, &[p.b]),
            ("num_pages", i32::MAX as usize, &[p.num_pages]),
        ] {
            checked_product(param, limit as u64, factors)?;
        }
        Ok(p)
    }
}

/// The largest object Rust can address.
const BYTES: usize = isize::MAX as usize;

fn checked_product(param: &'static str, limit: u64, factors: &[usize]) -> Result<u64> {
    // A zero counts as one: with an empty batch the product of the other factors must still not wrap, since later code
    // multiplies some of them without the zero.
    factors
        .iter()
        .try_fold(1u64, |product, f| product.checked_mul((*f).max(1) as u64))
        .filter(|product| *product <= limit)
        .ok_or_else(|| MlaError::Overflow {
            param,
            value: factors.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
            limit,
        })
}

impl Problem {
    /// Starts a problem of `b` requests. An empty batch (0) is valid and computes nothing.
    pub fn builder(b: usize) -> ProblemBuilder {
        ProblemBuilder {
            problem: Problem {
                b,
                s_q: 1,
                h_q: 128,
                h_kv: 1,
                head_dim_k: 576,
                head_dim_v: 512,
                num_pages: 0,
                page_size: 64,
                max_pages_per_seq: 0,
                dtype: DType::Bf16,
                kv_format: KvFormat::Bf16,
                mask: Mask::None,
                softmax_scale: 0.0,
            },
            kv_format: None,
            softmax_scale: None,
        }
    }

    /// Starts a problem of the same sizes, softmax_scale and flags; the format of the cache follows the type.
    pub fn to_builder(&self) -> ProblemBuilder {
        ProblemBuilder { problem: self.clone(), kv_format: None, softmax_scale: Some(self.softmax_scale) }
    }

    /// Requests in the batch.
    pub fn b(&self) -> usize {
        self.b
    }
    /// Query tokens a request.
    pub fn s_q(&self) -> usize {
        self.s_q
    }
    /// Query heads.
    pub fn h_q(&self) -> usize {
        self.h_q
    }
    /// KV heads.
    pub fn h_kv(&self) -> usize {
        self.h_kv
    }
    /// Query heads that share a KV head.
    pub fn heads_per_kv(&self) -> usize {
        self.h_q / self.h_kv
    }
    /// Columns of Q and K.
    pub fn head_dim_k(&self) -> usize {
        self.head_dim_k
    }
    /// Columns of V and of the output.
    pub fn head_dim_v(&self) -> usize {
        self.head_dim_v
    }
    /// Columns of K that are not columns of V: the rotary part.
    pub fn rope(&self) -> usize {
        self.head_dim_k - self.head_dim_v
    }
    /// Pages in the cache.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }
    /// Tokens a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }
    /// Columns of the block table.
    pub fn max_pages_per_seq(&self) -> usize {
        self.max_pages_per_seq
    }
    /// Tokens that a row of the block table can hold.
    pub fn max_tokens_per_seq(&self) -> u64 {
        (self.max_pages_per_seq as u64).saturating_mul(self.page_size as u64)
    }
    /// Element type of q and out.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// How the cache stores tokens.
    pub fn kv_format(&self) -> KvFormat {
        self.kv_format
    }
    /// Which keys a row may see.
    pub fn mask(&self) -> Mask {
        self.mask
    }
    /// What q.k is multiplied by before the softmax.
    pub fn softmax_scale(&self) -> f32 {
        self.softmax_scale
    }
    /// `softmax_scale * log2(e)`: exp2 is what hardware has. Finite: an infinite one would turn scores of 0 into NaN.
    #[allow(dead_code, reason = "for backends")]
    pub(crate) fn scale_log2(&self) -> f32 {
        (f64::from(self.softmax_scale) * std::f64::consts::LOG2_E).min(f64::from(f32::MAX)) as f32
    }
    /// Query rows of the whole batch: b * s_q * h_q.
    pub fn rows(&self) -> usize {
        self.b * self.s_q * self.h_q
    }

    /// The last key (exclusive) that row `j` of s_q of a request of `seqlen` tokens sees. `visible` is that row's
    /// entry of visible_lengths, used with [`Mask::VisibleLengths`] only.
    pub fn visible_end(&self, seqlen: usize, j: usize, visible: Option<i32>) -> usize {
        match self.mask {
            Mask::None => seqlen,
            Mask::Causal => seqlen.saturating_add(j).saturating_add(1).saturating_sub(self.s_q).min(seqlen),
            Mask::VisibleLengths => visible.map_or(seqlen, |v| usize::try_from(v).unwrap_or(0).min(seqlen)),
        }
    }

    /// Floating-point operations of this step, counted as upstream's benchmark counts them: two a multiply-add over
    /// the whole length of each request, masked or not.
    pub fn flop(&self, cache_seqlens: &[i32]) -> u128 {
        let tokens = tokens(cache_seqlens);
        2 * tokens * (self.s_q as u128) * (self.h_q as u128) * (self.head_dim_k + self.head_dim_v) as u128
    }

    /// Fewest bytes this step moves: every used token once, q once, out once.
    pub fn bytes(&self, cache_seqlens: &[i32]) -> u128 {
        let kv = tokens(cache_seqlens) * (self.h_kv * self.kv_format.bytes_per_token(self.head_dim_k)) as u128;
        let rows = self.rows() as u128;
        kv + rows * ((self.head_dim_k + self.head_dim_v) * self.dtype.size()) as u128
    }
}

fn tokens(cache_seqlens: &[i32]) -> u128 {
    cache_seqlens.iter().map(|len| u128::from(len.max(&0).unsigned_abs())).sum()
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "b {} s_q {} h_q {} h_kv {} d {}/{} page {} {}{}",
            self.b,
            self.s_q,
            self.h_q,
            self.h_kv,
            self.head_dim_k,
            self.head_dim_v,
            self.page_size,
            self.kv_format,
            match self.mask {
                Mask::None => "",
                Mask::Causal => " causal",
                Mask::VisibleLengths => " visible",
            }
        )
    }
}
