//! The bf16 kernels of AVX-512: products by `vdpbf16ps`, which adds two bf16 products to each of 16 f32 sums.
//!
//! K is read where it lies: a pair of columns of a token is 32 consecutive bits, broadcast against vectors of 16 rows
//! of Q, packed as pairs. V needs pairs of tokens: `accumulate` interleaves the rows of two tokens for 64 columns at a
//! time, 8 KiB, and multiplies all rows of the tile by them while they are in the L1. Interleaving stays inside 128-bit
//! lanes (one shuffle a vector), which permutes the columns within each 32; `read_row` undoes that once a tile. Weights
//! are rounded to bf16 as FlashMLA rounds them; their sum is not.
//!
//! Register tiles: `scores` 4 x 4, 2 x 8 or 1 x 16 (vectors of rows x tokens), `accumulate` 4 x 4 (rows x vectors of
//! columns): 16 sums cover the latency of `vdpbf16ps`. Sums run over the inner index in order whatever the tile.

#![allow(clippy::needless_range_loop, reason = "register tiles are arrays indexed by row and column")]

use std::arch::x86_64::*;
use std::mem::transmute;

use crate::problem::BLOCK_TOKENS;

use super::tile::{Block, COLUMNS, Kernels, PANEL, QueryForm, Tile};
use super::wide::{self, Weights};
use super::x86::Avx512;

/// Columns that are interleaved at once.
const LANE_GROUP: usize = 32;

pub(super) static BF16: Kernels = Kernels { query_form: QueryForm::Pairs, scores, softmax, accumulate, read_row };

/// A bf16 pair at `p` in all lanes.
#[inline(always)]
unsafe fn broadcast(p: *const u8) -> __m512bh {
    // SAFETY: the caller's pointer holds 4 bytes, and this CPU has AVX-512F.
    unsafe { transmute(_mm512_set1_epi32(p.cast::<i32>().read_unaligned())) }
}

/// Interleaves `width` columns of V, from `column`, of the block's first `tokens` tokens: [pairs][width] pairs in
/// `tile.kv`.
#[inline(always)]
unsafe fn interleave(tile: &Tile, block: &Block, tokens: usize, column: usize, width: usize) {
    let values = block.columns[0].min(tile.head_dim_v);
    let to = tile.kv.cast::<i32>();
    // SAFETY: tokens, and the tile's zeros, hold head_dim_v elements; loads past that are masked off. v_columns is a
    // multiple of 32.
    unsafe {
        for pair in 0..tokens.div_ceil(2) {
            let even = block.tokens_at[0][2 * pair];
            let odd = if 2 * pair + 1 < tokens { block.tokens_at[0][2 * pair + 1] } else { tile.zeros.cast() };
            for c in (0..width).step_by(LANE_GROUP) {
                let left = values.saturating_sub(column + c);
                let at = 2 * (column + c);
                let (a, b) = if left >= LANE_GROUP {
                    (_mm512_loadu_si512(even.add(at).cast()), _mm512_loadu_si512(odd.add(at).cast()))
                } else {
                    let mask = (1u32 << left) - 1;
                    let (even, odd) = (even.wrapping_add(at).cast(), odd.wrapping_add(at).cast());
                    (_mm512_maskz_loadu_epi16(mask, even), _mm512_maskz_loadu_epi16(mask, odd))
                };
                let to = to.add(pair * width + c);
                _mm512_storeu_si512(to.cast(), _mm512_unpacklo_epi16(a, b));
                _mm512_storeu_si512(to.add(16).cast(), _mm512_unpackhi_epi16(a, b));
            }
        }
    }
}

#[inline(always)]
unsafe fn scores_tile<const NP: usize, const MT: usize>(tile: &Tile, block: &Block, panel: usize, token: usize) {
    // SAFETY: panels panel..panel + NP and tokens token..token + MT are inside the tile; columns are even.
    unsafe {
        let panel_size = tile.head_dim_k / 2 * PANEL;
        let mut q = tile.q.add(panel * panel_size).cast_const();
        let mut acc = [[_mm512_setzero_ps(); NP]; MT];
        for (tokens_at, columns) in block.tokens_at.iter().zip(block.columns) {
            let mut k = [std::ptr::null(); MT];
            k.copy_from_slice(&tokens_at[token..token + MT]);
            for c in 0..columns / 2 {
                let mut qv: [__m512bh; NP] = transmute_copy([_mm512_setzero_ps(); NP]);
                for p in 0..NP {
                    qv[p] = transmute::<__m512, __m512bh>(_mm512_loadu_ps(q.add(p * panel_size + c * PANEL)));
                }
                for t in 0..MT {
                    let kv = broadcast(k[t].add(4 * c));
                    for p in 0..NP {
                        acc[t][p] = _mm512_dpbf16_ps(acc[t][p], qv[p], kv);
                    }
                }
            }
            q = q.add(columns / 2 * PANEL);
        }
        for t in 0..MT {
            for p in 0..NP {
                _mm512_storeu_ps(tile.s.add(((panel + p) * BLOCK_TOKENS + token + t) * PANEL), acc[t][p]);
            }
        }
    }
}

/// An array of bf16 vectors from one of f32 vectors; plain `transmute` does not take generic sizes.
#[inline(always)]
fn transmute_copy<const N: usize>(from: [__m512; N]) -> [__m512bh; N] {
    // SAFETY: both are N times 64 bytes without invalid values.
    unsafe { std::mem::transmute_copy(&from) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn scores(tile: &Tile, block: &Block, _: &Block) {
    // SAFETY: only whole register tiles inside the tile; tokens are padded to a multiple of 16.
    unsafe {
        let mut panel = 0;
        while panel + 4 <= tile.panels {
            for token in (0..block.tokens).step_by(4) {
                scores_tile::<4, 4>(tile, block, panel, token);
            }
            panel += 4;
        }
        while panel + 2 <= tile.panels {
            for token in (0..block.tokens).step_by(8) {
                scores_tile::<2, 8>(tile, block, panel, token);
            }
            panel += 2;
        }
        if panel < tile.panels {
            for token in (0..block.tokens).step_by(16) {
                scores_tile::<1, 16>(tile, block, panel, token);
            }
        }
    }
}

struct PairWeights;

/// Even and odd lanes of what `_mm512_cvtne2ps_pbh` gives, side by side.
static INTERLEAVE: [u16; 32] = {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 16 {
        index[2 * i] = i as u16;
        index[2 * i + 1] = 16 + i as u16;
        i += 1;
    }
    index
};

impl Weights<Avx512> for PairWeights {
    #[inline(always)]
    unsafe fn put(panel: *mut f32, pair: usize, even: __m512, odd: __m512) {
        // SAFETY: the pair is inside the block, and its place is not behind the scores read so far.
        unsafe {
            let packed = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
            let index = _mm512_loadu_si512(INTERLEAVE.as_ptr().cast());
            let pairs = _mm512_permutexvar_epi16(index, packed);
            _mm512_storeu_si512(panel.add(pair * PANEL).cast(), pairs);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn softmax(tile: &Tile, tokens: usize, scale: f32, masked: bool) {
    // SAFETY: the table's contract.
    unsafe { wide::softmax::<Avx512, PairWeights>(tile, tokens, scale, masked) }
}

/// The cache lines of the block that comes next, token by token. `accumulate` asks for some of them every few tokens:
/// all at once they would keep the loads of its products waiting.
struct Ahead<'a> {
    next: &'a Block,
    part: usize,
    token: usize,
    line: usize,
}

impl<'a> Ahead<'a> {
    fn new(next: &'a Block) -> Self {
        Ahead { next, part: 0, token: 0, line: 0 }
    }

    /// How many lines there are before the first is taken.
    fn all(&self) -> usize {
        self.next.tokens * (self.next.lines[0] + self.next.lines[1])
    }
}

impl Iterator for Ahead<'_> {
    type Item = *const u8;

    #[inline(always)]
    fn next(&mut self) -> Option<*const u8> {
        if self.token >= self.next.tokens {
            let second = self.part == 0 && self.next.tokens > 0 && self.next.lines[1] > 0;
            (self.part, self.token) = if second { (1, 0) } else { return None };
        }
        let line = self.next.tokens_at[self.part][self.token].wrapping_add(64 * self.line);
        self.line += 1;
        if self.line == self.next.lines[self.part] {
            (self.token, self.line) = (self.token + 1, 0);
        }
        Some(line)
    }
}

/// Rows `row..row + MR` times a column panel of interleaved V.
#[inline(always)]
unsafe fn accumulate_tile<const MR: usize, const NV: usize>(
    tile: &Tile,
    row: usize,
    (column, width): (usize, usize),
    pairs: usize,
    first: bool,
    (ahead, lines): (&mut Ahead<'_>, usize),
) {
    // SAFETY: rows row..row + MR and NV vectors are inside the column panel.
    unsafe {
        let o = tile.o_panel(column).add(row * width);
        let v = tile.kv.cast_const();
        let mut p = [std::ptr::null::<u8>(); MR];
        let mut acc = [[_mm512_setzero_ps(); NV]; MR];
        for r in 0..MR {
            p[r] = tile.weights_of(row + r).cast_const().cast();
            if !first {
                let alpha = _mm512_set1_ps(*tile.alpha.add(row + r));
                for j in 0..NV {
                    acc[r][j] = _mm512_mul_ps(alpha, _mm512_loadu_ps(o.add(r * width + 16 * j)));
                }
            }
        }
        for pair in 0..pairs {
            ahead.by_ref().take(lines).for_each(|line| _mm_prefetch::<_MM_HINT_T1>(line.cast()));
            let mut vv = transmute_copy([_mm512_setzero_ps(); NV]);
            for j in 0..NV {
                vv[j] = transmute::<__m512, __m512bh>(_mm512_loadu_ps(v.add(pair * width + 16 * j)));
            }
            for r in 0..MR {
                let weights = broadcast(p[r].add(4 * PANEL * pair));
                for j in 0..NV {
                    acc[r][j] = _mm512_dpbf16_ps(acc[r][j], weights, vv[j]);
                }
            }
        }
        for r in 0..MR {
            for j in 0..NV {
                _mm512_storeu_ps(o.add(r * width + 16 * j), acc[r][j]);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn accumulate(tile: &Tile, rows: (usize, usize), tokens: usize, first: bool, block: &Block, next: &Block) {
    let pairs = tokens.div_ceil(2);
    let mut ahead = Ahead::new(next);
    let steps = tile.v_columns.div_ceil(COLUMNS) * (rows.1 - rows.0).div_ceil(4) * pairs;
    let lines = ahead.all().div_ceil(steps.max(1));
    // SAFETY: only whole register tiles inside the tile.
    unsafe {
        for (column, width) in tile.column_panels() {
            interleave(tile, block, tokens, column, width);
            let (panel, mut row) = ((column, width), rows.0);
            while row < rows.1 {
                let ahead = (&mut ahead, lines);
                match (width == COLUMNS, rows.1 - row >= 4) {
                    (true, true) => accumulate_tile::<4, 4>(tile, row, panel, pairs, first, ahead),
                    (true, false) => accumulate_tile::<1, 4>(tile, row, panel, pairs, first, ahead),
                    (false, true) => accumulate_tile::<4, 2>(tile, row, panel, pairs, first, ahead),
                    (false, false) => accumulate_tile::<1, 2>(tile, row, panel, pairs, first, ahead),
                }
                row += if rows.1 - row >= 4 { 4 } else { 1 };
            }
        }
    }
}

/// Columns of the lower and the upper unpacked vector, in the order of the cache.
static ORDER: [[i32; 16]; 2] = [
    [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23],
    [8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31],
];

#[target_feature(enable = "avx512f")]
unsafe fn read_row(tile: &Tile, row: usize, factor: f32) {
    // SAFETY: row is inside the tile; panel widths are multiples of 32.
    unsafe {
        let factor = _mm512_set1_ps(factor);
        for (column, width) in tile.column_panels() {
            let o = tile.o_panel(column).add(row * width);
            for c in (0..width).step_by(LANE_GROUP) {
                let low = _mm512_mul_ps(factor, _mm512_loadu_ps(o.add(c)));
                let high = _mm512_mul_ps(factor, _mm512_loadu_ps(o.add(c + 16)));
                for (half, order) in ORDER.iter().enumerate() {
                    let order = _mm512_loadu_si512(order.as_ptr().cast());
                    let ordered = _mm512_permutex2var_ps(low, order, high);
                    _mm512_storeu_ps(tile.row.add(column + c + 16 * half), ordered);
                }
            }
        }
    }
}
