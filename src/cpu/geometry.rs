//! Where the tensors of a call lie: addresses and byte strides, checked once, then used without further checks.

use half::{bf16, f16};

use crate::call::{Inputs, KvCache, Outputs, Query};
use crate::error::Result;
use crate::problem::{BLOCK_TOKENS, Mask, Problem};
use crate::tensor::{DType, TensorView};

use super::tile::{Block, PANEL, QueryForm, TOKEN_GROUP, Tile};

/// One part of q or of the cache: rows of `columns` elements behind three outer dimensions.
#[derive(Clone, Copy)]
struct Rows {
    base: *const u8,
    strides: [usize; 3],
    columns: usize,
}

impl Rows {
    const ABSENT: Rows = Rows { base: std::ptr::null(), strides: [0; 3], columns: 0 };

    fn new(param: &'static str, view: Option<&TensorView<'_>>) -> Result<Rows> {
        let Some(view) = view else { return Ok(Rows::ABSENT) };
        let size = view.dtype().size();
        let s = view.strides();
        let base = view.host_bytes(param)?.as_ptr();
        // An empty tensor is never read, and its strides may be anything.
        let strides = if view.is_empty() { [0; 3] } else { [s[0], s[1], s[2]].map(|s| s.wrapping_mul(size)) };
        Ok(Rows { base, strides, columns: view.shape()[3] })
    }

    /// # Safety
    /// The index must be inside the shape.
    unsafe fn at(&self, i: usize, j: usize, k: usize) -> *const u8 {
        // SAFETY: the view's constructor checked that every index of its shape is inside its memory. A stride of a
        // dimension of size 1 may be too large to multiply, but then its index is 0.
        unsafe { self.base.add(i * self.strides[0] + j * self.strides[1] + k * self.strides[2]) }
    }
}

/// The tensors of one call, validated.
pub(super) struct Call<'a> {
    pub problem: &'a Problem,
    q: [Rows; 2],
    kv: [Rows; 2],
    table: *const i32,
    table_stride: usize,
    lengths: *const i32,
    lengths_stride: usize,
    visible: *const i32,
    visible_strides: [usize; 2],
    out: *mut u8,
    out_strides: [usize; 4],
    lse: *mut f32,
    lse_strides: [usize; 3],
}

// SAFETY: workers read inputs, which nobody writes during the call, and write disjoint rows of the outputs.
unsafe impl Sync for Call<'_> {}

impl<'a> Call<'a> {
    /// Everything must have been validated against `problem`, tables included.
    pub fn new(problem: &'a Problem, inputs: &Inputs<'_>, outputs: &mut Outputs<'_>) -> Result<Self> {
        let q = match &inputs.query {
            Query::Fused(q) => [Rows::new("q", Some(q))?, Rows::ABSENT],
            Query::Split { q_nope, q_pe } => [Rows::new("q_nope", Some(q_nope))?, Rows::new("q_pe", q_pe.as_ref())?],
        };
        let kv = match &inputs.kv_cache {
            KvCache::Fused(k) => [Rows::new("k_cache", Some(k))?, Rows::ABSENT],
            KvCache::Split { ckv, kpe } => [Rows::new("ckv", Some(ckv))?, Rows::new("kpe", kpe.as_ref())?],
        };
        let (visible, visible_strides) = match &inputs.visible_lengths {
            Some(v) => (v.host_ptr::<i32>("visible_lengths")?, [v.strides()[0], v.strides()[1]]),
            None => (std::ptr::null(), [0; 2]),
        };
        let size = problem.dtype().size();
        let o = outputs.out.strides();
        let out_strides = [o[0], o[1], o[2], o[3]].map(|s| s.wrapping_mul(size));
        let l = outputs.lse.strides();
        let lse_strides = [l[0], l[1], l[2]];
        Ok(Call {
            problem,
            q,
            kv,
            table: inputs.block_table.host_ptr::<i32>("block_table")?,
            table_stride: inputs.block_table.strides()[0],
            lengths: inputs.cache_seqlens.host_ptr::<i32>("cache_seqlens")?,
            lengths_stride: inputs.cache_seqlens.strides()[0],
            visible,
            visible_strides,
            out: outputs.out.host_bytes_mut("out")?.as_mut_ptr(),
            out_strides,
            lse: outputs.lse.host_ptr_mut::<f32>("lse")?,
            lse_strides,
        })
    }

    /// cache_seqlens of a request.
    ///
    /// # Safety
    /// request < b.
    pub unsafe fn length(&self, request: usize) -> usize {
        // SAFETY: inside the shape; the value was checked not to be negative.
        unsafe { self.lengths.add(request * self.lengths_stride).read() as usize }
    }

    /// The keys that row `j` of s_q sees.
    ///
    /// # Safety
    /// request < b, j < s_q.
    pub unsafe fn visible_end(&self, request: usize, j: usize) -> usize {
        let visible = (self.problem.mask() == Mask::VisibleLengths).then(|| {
            // SAFETY: inside the shape; with this mask the tensor is there.
            unsafe { self.visible.add(request * self.visible_strides[0] + j * self.visible_strides[1]).read() }
        });
        // SAFETY: as the caller promises.
        self.problem.visible_end(unsafe { self.length(request) }, j, visible)
    }

    /// Finds `tokens` tokens of a request from `begin`, and pads them with zeros.
    ///
    /// # Safety
    /// begin + tokens must not exceed the request's length, nor `tokens` a block; `zeros` must hold a token of zeros.
    pub unsafe fn find(
        &self,
        block: &mut Block,
        request: usize,
        kv_head: usize,
        begin: usize,
        tokens: usize,
        zeros: *const u8,
    ) {
        let page_size = self.problem.page_size();
        block.tokens = tokens;
        block.columns = self.kv.map(|part| part.columns);
        block.lines = block.columns.map(|columns| (columns * self.problem.dtype().size()).div_ceil(64));
        let (mut position, mut slot) = (begin / page_size, begin % page_size);
        let mut t = 0;
        while t < tokens {
            // SAFETY: a used position of the table, whose entry was checked against num_pages.
            let page = unsafe { self.table.add(request * self.table_stride + position).read() } as usize;
            let here = (page_size - slot).min(tokens - t);
            for (part, tokens_at) in self.kv.iter().zip(&mut block.tokens_at) {
                if part.columns > 0 {
                    for i in 0..here {
                        // SAFETY: page, slot and head are inside the cache.
                        tokens_at[t + i] = unsafe { part.at(page, slot + i, kv_head) };
                    }
                }
            }
            t += here;
            (position, slot) = (position + 1, 0);
        }
        for tokens_at in &mut block.tokens_at {
            tokens_at[tokens..tokens.next_multiple_of(TOKEN_GROUP).min(BLOCK_TOKENS)].fill(zeros);
        }
    }

    /// Packs the query rows of a tile: row r of it is row `first_row` + r of those that share `kv_head`, which are
    /// ordered by s_q, then head. Rows that pad the last panel are zero.
    ///
    /// # Safety
    /// The rows must exist, and `tile` must be laid out for them.
    pub unsafe fn pack_query(&self, tile: &Tile, form: QueryForm, request: usize, kv_head: usize, first_row: usize) {
        let group = self.problem.heads_per_kv();
        for row in 0..tile.panels * PANEL {
            let parts = (row < tile.rows).then(|| {
                let (j, head) = ((first_row + row) / group, (first_row + row) % group);
                // An absent part is never read.
                self.q.map(|part| match part.columns {
                    0 => (part.base, 0),
                    // SAFETY: request, j and head are inside the shape.
                    n => (unsafe { part.at(request, j, kv_head * group + head) }, n),
                })
            });
            // SAFETY: the tile holds head_dim_k columns of every row of its panels.
            unsafe {
                let to = tile.q.add(row / PANEL * PANEL * columns_of(form, tile.head_dim_k) + row % PANEL);
                match (parts, form, self.problem.dtype()) {
                    (None, _, _) => (0..columns_of(form, tile.head_dim_k)).for_each(|c| to.add(c * PANEL).write(0.0)),
                    (Some(parts), QueryForm::Pairs, _) => scatter(to, parts.map(|(p, n)| (p, n / 2)), f32::from_bits),
                    (Some(parts), QueryForm::F32, DType::Bf16) => {
                        scatter(to, parts, |x| bf16::from_bits(x).to_f32());
                    }
                    (Some(parts), QueryForm::F32, DType::F16) => scatter(to, parts, |x| f16::from_bits(x).to_f32()),
                    (Some(parts), QueryForm::F32, _) => scatter(to, parts, f32::from_bits),
                }
            }
        }
    }

    /// Writes one row of results: `values` holds head_dim_v of them.
    ///
    /// # Safety
    /// The index must be inside the shapes, and no other worker may write the same row.
    pub unsafe fn write_row(&self, request: usize, j: usize, head: usize, values: &[f32], lse: f32) {
        let o = self.out_strides;
        let l = self.lse_strides;
        // SAFETY: the views' constructors checked that every index of their shapes is inside their memory.
        unsafe {
            let out = self.out.add(request * o[0] + j * o[1] + head * o[2]);
            match self.problem.dtype() {
                DType::Bf16 => store(out, o[3], values, to_bf16),
                DType::F16 => store(out, o[3], values, |x| f16::from_f32(x).to_bits()),
                _ => store(out, o[3], values, |x| x),
            }
            self.lse.add(request * l[0] + head * l[1] + j * l[2]).write(lse);
        }
    }
}

fn columns_of(form: QueryForm, head_dim_k: usize) -> usize {
    match form {
        QueryForm::F32 => head_dim_k,
        QueryForm::Pairs => head_dim_k / 2,
    }
}

/// Reads elements of type `T` from both parts, one after the other, and writes them 16 apart.
#[inline(always)]
unsafe fn scatter<T>(to: *mut f32, parts: [(*const u8, usize); 2], widen: impl Fn(T) -> f32) {
    let mut to = to;
    for (from, n) in parts {
        for c in 0..n {
            // SAFETY: the part holds n elements, the panel as many rows.
            unsafe { to.add(c * PANEL).write(widen(from.cast::<T>().add(c).read_unaligned())) };
        }
        // SAFETY: as above; at the end this is one past the panel at most.
        to = to.wrapping_add(n * PANEL);
    }
}

#[inline(always)]
unsafe fn store<T>(out: *mut u8, stride: usize, values: &[f32], narrow: impl Fn(f32) -> T) {
    // SAFETY: element c of the row lies c strides further.
    unsafe {
        if stride == size_of::<T>() {
            // A loop of its own, so that it becomes vectors.
            for (c, x) in values.iter().enumerate() {
                out.cast::<T>().add(c).write_unaligned(narrow(*x));
            }
        } else {
            for (c, x) in values.iter().enumerate() {
                out.add(c * stride).cast::<T>().write_unaligned(narrow(*x));
            }
        }
    }
}

/// Round to nearest even, NaN kept quiet; without branches, so that a loop of it becomes vectors.
#[inline(always)]
fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let chosen = if x.is_nan() { bits | 0x0040_0000 } else { rounded };
    (chosen >> 16) as u16
}
