//! The tensors of one call, and their validation against the problem.

use crate::error::{MlaError, Result};
use crate::problem::{Mask, Problem};
use crate::tensor::{DType, Device, TensorView, TensorViewMut};

/// The query, in one tensor or with its rotary part apart.
#[derive(Debug, Clone, Copy)]
pub enum Query<'a> {
    /// `q` [b, s_q, h_q, head_dim_k].
    Fused(TensorView<'a>),
    /// The two parts as separate tensors.
    Split {
        /// `q_nope` [b, s_q, h_q, head_dim_v].
        q_nope: TensorView<'a>,
        /// `q_pe` [b, s_q, h_q, rope]; absent where rope is 0.
        q_pe: Option<TensorView<'a>>,
    },
}

/// The KV cache, in one tensor or with its rotary part apart.
#[derive(Debug, Clone, Copy)]
pub enum KvCache<'a> {
    /// `k_cache` [num_pages, page_size, h_kv, head_dim_k].
    Fused(TensorView<'a>),
    /// The two parts as separate tensors.
    Split {
        /// `ckv` [num_pages, page_size, h_kv, head_dim_v].
        ckv: TensorView<'a>,
        /// `kpe` [num_pages, page_size, h_kv, rope]; absent where rope is 0.
        kpe: Option<TensorView<'a>>,
    },
}

/// What a call reads.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The query.
    pub query: Query<'a>,
    /// The KV cache.
    pub kv_cache: KvCache<'a>,
    /// [b, max_pages_per_seq] i32: the pages of each request, in order. Entries past its length may hold anything.
    pub block_table: TensorView<'a>,
    /// `[b]` i32: tokens of each request; may be 0.
    pub cache_seqlens: TensorView<'a>,
    /// [b, s_q] i32, with [`Mask::VisibleLengths`] only.
    pub visible_lengths: Option<TensorView<'a>>,
}

/// What a call writes.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// [b, s_q, h_q, head_dim_v], any strides that keep elements apart.
    pub out: TensorViewMut<'a>,
    /// [b, h_q, s_q] f32, natural logarithm; +infinity for a row that sees no key.
    pub lse: TensorViewMut<'a>,
}

fn check(param: &'static str, view: &TensorView<'_>, shape: &[usize], dtype: DType, device: Device) -> Result<()> {
    if view.shape().len() != shape.len() {
        return Err(MlaError::Rank { param, value: view.shape().len(), limit: shape.len() });
    }
    for (dim, (value, limit)) in view.shape().iter().zip(shape).enumerate() {
        if value != limit {
            return Err(MlaError::Shape { param, dim, value: *value, limit: *limit });
        }
    }
    if view.dtype() != dtype {
        return Err(MlaError::DTypeMismatch { param, value: view.dtype(), limit: dtype });
    }
    if view.device() != device {
        return Err(MlaError::WrongDevice { param, value: view.device(), limit: device });
    }
    Ok(())
}

fn check_rows(param: &'static str, view: &TensorView<'_>, shape: &[usize], dtype: DType, device: Device) -> Result<()> {
    check(param, view, shape, dtype, device)?;
    // Rows are read as vectors; a gap between the elements of a row would turn every load into a gather.
    let last = shape.len() - 1;
    if shape[last] > 1 && view.strides()[last] != 1 {
        return Err(MlaError::InnerStride { param, value: view.strides()[last] });
    }
    Ok(())
}

const ROPE_ABSENT: &str = "rope (head_dim_k - head_dim_v) is 0, so it must be absent or have 0 columns";
const ROPE_NEEDED: &str = "rope (head_dim_k - head_dim_v) is above 0, so the split layout needs it";

fn check_rope(
    param: &'static str,
    view: Option<TensorView<'_>>,
    shape: &[usize],
    dtype: DType,
    device: Device,
) -> Result<()> {
    match view {
        None if shape.last() == Some(&0) => Ok(()),
        None => Err(MlaError::MissingTensor { param, limit: ROPE_NEEDED }),
        Some(view) if shape.last() == Some(&0) && view.shape().last() != Some(&0) => {
            Err(MlaError::UnexpectedTensor { param, limit: ROPE_ABSENT })
        }
        Some(view) => check_rows(param, &view, shape, dtype, device),
    }
}

impl<'a> Inputs<'a> {
    /// The tensors given, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, TensorView<'a>)> {
        let (q, q_pe) = match self.query {
            Query::Fused(q) => (("q", q), None),
            Query::Split { q_nope, q_pe } => (("q_nope", q_nope), q_pe),
        };
        let (k, kpe) = match self.kv_cache {
            KvCache::Fused(k) => (("k_cache", k), None),
            KvCache::Split { ckv, kpe } => (("ckv", ckv), kpe),
        };
        [
            Some(q),
            q_pe.map(|t| ("q_pe", t)),
            Some(k),
            kpe.map(|t| ("kpe", t)),
            Some(("block_table", self.block_table)),
            Some(("cache_seqlens", self.cache_seqlens)),
            self.visible_lengths.map(|t| ("visible_lengths", t)),
        ]
        .into_iter()
        .flatten()
    }

    /// Checks shapes, types, strides and devices against the problem. Does not read the tensors.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::Shape`], [`MlaError::DTypeMismatch`], [`MlaError::WrongDevice`],
    /// [`MlaError::InnerStride`], [`MlaError::MissingTensor`], [`MlaError::UnexpectedTensor`].
    pub fn validate(&self, problem: &Problem, device: Device) -> Result<()> {
        let p = problem;
        let rows = |columns| [p.b(), p.s_q(), p.h_q(), columns];
        let tokens = |columns| [p.num_pages(), p.page_size(), p.h_kv(), columns];
        let (dtype, d_k, d_v, rope) = (p.dtype(), p.head_dim_k(), p.head_dim_v(), p.rope());
        match &self.query {
            Query::Fused(q) => check_rows("q", q, &rows(d_k), dtype, device)?,
            Query::Split { q_nope, q_pe } => {
                check_rows("q_nope", q_nope, &rows(d_v), dtype, device)?;
                check_rope("q_pe", *q_pe, &rows(rope), dtype, device)?;
            }
        }
        match &self.kv_cache {
            KvCache::Fused(k) => check_rows("k_cache", k, &tokens(d_k), dtype, device)?,
            KvCache::Split { ckv, kpe } => {
                check_rows("ckv", ckv, &tokens(d_v), dtype, device)?;
                check_rope("kpe", *kpe, &tokens(rope), dtype, device)?;
            }
        }
        check_rows("block_table", &self.block_table, &[p.b(), p.max_pages_per_seq()], DType::I32, device)?;
        check_rows("cache_seqlens", &self.cache_seqlens, &[p.b()], DType::I32, device)?;
        match (p.mask(), &self.visible_lengths) {
            (Mask::VisibleLengths, Some(v)) => {
                check_rows("visible_lengths", v, &[p.b(), p.s_q()], DType::I32, device)?;
            }
            (Mask::VisibleLengths, None) => {
                return Err(MlaError::MissingTensor {
                    param: "visible_lengths",
                    limit: "the problem's mask is VisibleLengths",
                });
            }
            (_, Some(_)) => {
                return Err(MlaError::UnexpectedTensor {
                    param: "visible_lengths",
                    limit: "the problem's mask must be VisibleLengths for it",
                });
            }
            (_, None) => {}
        }
        Ok(())
    }

    /// Reads lengths, visible lengths and the used block-table entries of host tensors and checks them.
    ///
    /// # Errors
    /// [`MlaError::NegativeLength`], [`MlaError::LengthBeyondTable`], [`MlaError::VisibleLength`],
    /// [`MlaError::BlockTableEntry`]; the first bad request is named.
    pub fn check_host_tables(&self, problem: &Problem) -> Result<()> {
        let lengths = self.check_host_lengths(problem)?;
        let table = self.block_table.host_ptr::<i32>("block_table")?;
        for (request, value) in lengths.into_iter().enumerate() {
            let len = value as usize;
            if let Some(visible) = &self.visible_lengths {
                for row in 0..problem.s_q() {
                    let v = visible.get::<i32>(&[request, row]).unwrap_or(0);
                    if v < 0 || v > value {
                        return Err(MlaError::VisibleLength { request, row, value: v, limit: value });
                    }
                }
            }
            let row = request * self.block_table.strides()[0];
            for position in 0..len.div_ceil(problem.page_size()) {
                // SAFETY: position < max_pages_per_seq by the length check, and the view's shape was checked.
                let entry = unsafe { table.add(row + position).read() };
                if usize::try_from(entry).map_or(true, |page| page >= problem.num_pages()) {
                    let limit = problem.num_pages();
                    return Err(MlaError::BlockTableEntry { request, position, value: entry, limit });
                }
            }
        }
        Ok(())
    }

    /// The lengths of host tensors, each at least 0 and no more than its row of the block table can hold. A schedule
    /// made without this check could ask for a workspace of any size.
    ///
    /// # Errors
    /// [`MlaError::NegativeLength`], [`MlaError::LengthBeyondTable`]; those of [`host_seqlens`](Self::host_seqlens).
    pub fn check_host_lengths(&self, problem: &Problem) -> Result<Vec<i32>> {
        let lengths = self.host_seqlens()?;
        let limit = problem.max_tokens_per_seq();
        for (request, value) in lengths.iter().copied().enumerate() {
            let len = u64::try_from(value).map_err(|_| MlaError::NegativeLength { request, value })?;
            if len > limit {
                return Err(MlaError::LengthBeyondTable { request, value, limit });
            }
        }
        Ok(lengths)
    }

    /// The lengths of host tensors.
    ///
    /// # Errors
    /// [`MlaError::WrongDevice`], [`MlaError::DTypeMismatch`].
    pub fn host_seqlens(&self) -> Result<Vec<i32>> {
        self.cache_seqlens.host_ptr::<i32>("cache_seqlens")?;
        let n = self.cache_seqlens.shape()[0];
        Ok((0..n).filter_map(|i| self.cache_seqlens.get::<i32>(&[i])).collect())
    }
}

impl Outputs<'_> {
    /// Checks shapes, types, strides and devices against the problem, and that nothing overlaps.
    ///
    /// # Errors
    /// As [`Inputs::validate`], and [`MlaError::StrideAlias`], [`MlaError::Overlap`].
    pub fn validate(&self, problem: &Problem, inputs: &Inputs<'_>, device: Device) -> Result<()> {
        let p = problem;
        let (out, lse) = (self.out.as_view(), self.lse.as_view());
        check("out", &out, &[p.b(), p.s_q(), p.h_q(), p.head_dim_v()], p.dtype(), device)?;
        check("lse", &lse, &[p.b(), p.h_q(), p.s_q()], DType::F32, device)?;
        self.out.check_no_alias("out")?;
        self.lse.check_no_alias("lse")?;
        for (param, written) in [("out", out), ("lse", lse)] {
            let others = inputs.tensors().chain((param == "out").then_some(("lse", lse)));
            for (other, view) in others {
                check_apart(param, &written, other, &view)?;
            }
        }
        Ok(())
    }
}

fn check_apart(
    param: &'static str,
    written: &TensorView<'_>,
    other: &'static str,
    view: &TensorView<'_>,
) -> Result<()> {
    let (Some(a), Some(b)) = (written.address_range(), view.address_range()) else {
        return Ok(());
    };
    let start = a.start.max(b.start);
    if start < a.end.min(b.end) {
        return Err(MlaError::Overlap { param, other, value: start - a.start });
    }
    Ok(())
}
