//! The f32 kernels: any element type, any instruction set.
//!
//! `stage` widens the block to f32 [64][k_stride] in the L2 (V is its first columns); the products broadcast one f32 of
//! K, or of P, against vectors of 16 rows, or of 16 columns. Register tiles: `scores` MT tokens x NV vectors of rows,
//! `accumulate` MR rows x NV vectors of columns; the sums stay in registers over the whole inner dimension. Every
//! result is summed in the order of its inner index whatever the tile's shape, so bits do not depend on it.

#![allow(clippy::needless_range_loop, reason = "register tiles are arrays indexed by row and column")]

use std::ops::Range;

use crate::problem::BLOCK_TOKENS;

use super::simd::{Portable, Simd, exp2};
use super::tile::{Ahead, Block, COLUMNS, Kernels, PANEL, QueryForm, TOKEN_GROUP, Tile, panels};

/// Tokens that `accumulate` multiplies without a break.
const STEP: usize = 8;

/// Element types that `stage` widens.
trait Widen {
    const BYTES: usize;
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
}
struct FromBf16;
struct FromF16;
struct FromF32;
impl Widen for FromBf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's contract is this function's.
        unsafe { S::load_bf16(p.cast()) }
    }
}
impl Widen for FromF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's contract is this function's.
        unsafe { S::load_f16(p.cast()) }
    }
}
impl Widen for FromF32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's contract is this function's.
        unsafe { S::load(p.cast()) }
    }
}

/// Widens a column panel of `tokens`, which may be zeros that pad the block.
#[inline(always)]
unsafe fn stage<S: Simd, E: Widen>(tile: &Tile, block: &Block, (column, width): (usize, usize), tokens: Range<usize>) {
    let mut begin = 0;
    for (tokens_at, columns) in block.tokens_at.iter().zip(block.columns) {
        // The columns that the panel and this part of a token share.
        let (from, to) = (column.max(begin), (column + width).min(begin + columns));
        if from < to {
            let n = to - from;
            for t in tokens.clone() {
                // SAFETY: `columns` elements can be read at every token; the panel holds `width` of every token.
                unsafe {
                    let source = tokens_at[t].add((from - begin) * E::BYTES);
                    let target = tile.kv.add(t * COLUMNS + from - column);
                    // The usual width is known to the compiler, so that it unrolls.
                    if n == COLUMNS { widen::<S, E>(target, source, COLUMNS) } else { widen::<S, E>(target, source, n) }
                }
            }
        }
        begin += columns;
    }
}

/// Widens `n` elements.
#[inline(always)]
unsafe fn widen<S: Simd, E: Widen>(to: *mut f32, from: *const u8, n: usize) {
    let whole = n / S::LANES * S::LANES;
    // SAFETY: the caller's pointers hold n elements; what is left of a vector goes through buffers of a vector's size.
    unsafe {
        for c in (0..whole).step_by(S::LANES) {
            S::store(to.add(c), E::load::<S>(from.add(c * E::BYTES)));
        }
        if whole < n {
            let (mut rest, mut wide) = ([0u32; 16], [0.0f32; 16]);
            std::ptr::copy_nonoverlapping(from.add(whole * E::BYTES), rest.as_mut_ptr().cast(), (n - whole) * E::BYTES);
            S::store(wide.as_mut_ptr(), E::load::<S>(rest.as_ptr().cast()));
            std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), n - whole);
        }
    }
}

/// Adds the products of one column panel to a register tile of scores; the first panel's replace what is there.
#[inline(always)]
unsafe fn scores_tile<S: Simd, const NV: usize, const MT: usize>(
    tile: &Tile,
    (column, width): (usize, usize),
    panel: usize,
    token: usize,
) {
    // SAFETY: panels panel..panel + NV * LANES / 16 and tokens token..token + MT are inside the tile.
    unsafe {
        let mut q = [tile.q.cast_const(); NV];
        let mut s = [tile.s; NV];
        for v in 0..NV {
            let (p, lane) = (panel + v * S::LANES / PANEL, v * S::LANES % PANEL);
            q[v] = tile.q.add((p * tile.head_dim_k + column) * PANEL + lane);
            s[v] = tile.s.add((p * BLOCK_TOKENS + token) * PANEL + lane);
        }
        let k = tile.kv.add(token * COLUMNS);
        let mut acc = [[S::splat(0.0); NV]; MT];
        if column > 0 {
            for t in 0..MT {
                for v in 0..NV {
                    acc[t][v] = S::load(s[v].add(t * PANEL));
                }
            }
        }
        for c in 0..width {
            let mut qv = [S::splat(0.0); NV];
            for v in 0..NV {
                qv[v] = S::load(q[v].add(c * PANEL));
            }
            for t in 0..MT {
                let kv = S::splat(*k.add(t * COLUMNS + c));
                for v in 0..NV {
                    acc[t][v] = S::fma(kv, qv[v], acc[t][v]);
                }
            }
        }
        for t in 0..MT {
            for v in 0..NV {
                S::store(s[v].add(t * PANEL), acc[t][v]);
            }
        }
    }
}

/// All scores of a block, column panel by column panel. `NV` x `MT` is the register tile; what row panels it leaves
/// over go through thinner ones.
#[inline(always)]
unsafe fn scores<S: Simd, E: Widen, const NV: usize, const MT: usize>(tile: &Tile, block: &Block) {
    let wide = NV * S::LANES / PANEL;
    // SAFETY: only whole register tiles inside the tile; tokens are padded to a multiple of 16.
    unsafe {
        stage::<S, E>(tile, block, first_panel(tile), 0..block.tokens.next_multiple_of(TOKEN_GROUP));
        for columns in panels(tile.head_dim_k) {
            let mut panel = 0;
            while panel + wide <= tile.panels {
                scores_strip::<S, E, NV, MT>(tile, block, columns, panel, wide);
                panel += wide;
            }
            // Elsewhere NV vectors are one panel, and nothing is left.
            if S::LANES == PANEL {
                while panel + 2 <= tile.panels {
                    scores_strip::<S, E, 2, 8>(tile, block, columns, panel, 2);
                    panel += 2;
                }
                if panel < tile.panels {
                    scores_strip::<S, E, 1, 16>(tile, block, columns, panel, 1);
                }
            }
        }
    }
}

fn first_panel(tile: &Tile) -> (usize, usize) {
    (0, COLUMNS.min(tile.head_dim_k))
}

/// The column panel behind `column` and `width`, if there is one before column `end`.
fn panel_behind((column, width): (usize, usize), end: usize) -> Option<(usize, usize)> {
    let next = column + width;
    (next < end).then(|| (next, COLUMNS.min(end - next)))
}

/// The register tiles of all tokens and `count` row panels, which are `NV` vectors. The last strip of a column panel
/// stages the next one over the tokens it has done, so that products run while those loads and stores are on their way.
#[inline(always)]
unsafe fn scores_strip<S: Simd, E: Widen, const NV: usize, const MT: usize>(
    tile: &Tile,
    block: &Block,
    columns: (usize, usize),
    panel: usize,
    count: usize,
) {
    let next = panel_behind(columns, tile.head_dim_k).filter(|_| panel + count == tile.panels);
    for token in (0..block.tokens).step_by(MT) {
        // SAFETY: the caller's contract is this function's.
        unsafe {
            scores_tile::<S, NV, MT>(tile, columns, panel, token);
            if let Some(next) = next {
                stage::<S, E>(tile, block, next, token..token + MT);
            }
        }
    }
}

/// How weights are stored over the scores they come from.
pub(super) trait Weights<S: Simd> {
    /// Stores the weights of tokens 2 * `pair` and 2 * `pair` + 1. `panel` is the panel's first score, plus the lane.
    ///
    /// # Safety
    /// As [`Simd`]; scores of later pairs must stay as they are.
    unsafe fn put(panel: *mut f32, pair: usize, even: S::V, odd: S::V);
}
struct F32Weights;
impl<S: Simd> Weights<S> for F32Weights {
    #[inline(always)]
    unsafe fn put(panel: *mut f32, pair: usize, even: S::V, odd: S::V) {
        // SAFETY: the pair is inside the block.
        unsafe {
            S::store(panel.add(2 * pair * PANEL), even);
            S::store(panel.add((2 * pair + 1) * PANEL), odd);
        }
    }
}

/// One block of the streaming softmax. Token pairs are handled together; an odd last one needs `masked`.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd, W: Weights<S>>(tile: &Tile, tokens: usize, scale: f32, masked: bool) {
    // SAFETY: rows are padded to whole panels, the block's scores to an even number of tokens.
    unsafe {
        for row in (0..tile.panels * PANEL).step_by(S::LANES) {
            let panel = tile.weights_of(row);
            if masked {
                softmax_rows::<S, W, true>(tile, panel, row, tokens, scale);
            } else {
                softmax_rows::<S, W, false>(tile, panel, row, tokens, scale);
            }
        }
    }
}

/// `x` for the rows that see token `t`, else `y`.
#[inline(always)]
unsafe fn seen<S: Simd, const MASKED: bool>(t: usize, limit: S::V, x: S::V, y: S::V) -> S::V {
    // SAFETY: the caller's contract is this function's.
    if MASKED { unsafe { S::select_lt(S::splat(t as f32), limit, x, y) } } else { x }
}

#[inline(always)]
unsafe fn softmax_rows<S: Simd, W: Weights<S>, const MASKED: bool>(
    tile: &Tile,
    panel: *mut f32,
    row: usize,
    tokens: usize,
    scale: f32,
) {
    // SAFETY: the caller's contract is this function's.
    unsafe {
        let pairs = tokens.div_ceil(2);
        let (zero, lowest) = (S::splat(0.0), S::splat(f32::NEG_INFINITY));
        let limit = S::load(tile.limit.add(row));
        let (mut even, mut odd) = (lowest, lowest);
        for t in (0..2 * pairs).step_by(2) {
            let (a, b) = (S::load(panel.add(t * PANEL)), S::load(panel.add((t + 1) * PANEL)));
            even = S::max(even, seen::<S, MASKED>(t, limit, a, lowest));
            odd = S::max(odd, seen::<S, MASKED>(t + 1, limit, b, lowest));
        }
        let scale = S::splat(scale);
        let old_max = S::load(tile.max.add(row));
        let max = S::max(old_max, S::max(even, odd));
        S::store(tile.max.add(row), max);
        // Subtracting -infinity would give NaN: such a row has seen no key at all yet, and all its weights are 0.
        let max = S::select_lt(lowest, max, max, zero);
        // The maximum is subtracted before the scale multiplies: rounding max * scale first would leave the largest
        // weight 2^error instead of 1, and the error of a product of 1e13 is half a million. Only -infinity must not
        // meet a scale of 0.
        let change = S::mul(S::sub(old_max, max), scale);
        let alpha = exp2::<S>(S::select_lt(old_max, S::splat(f32::MIN), lowest, change), zero);
        S::store(tile.alpha.add(row), alpha);

        let bias = S::splat(tile.bias);
        let (mut even, mut odd) = (zero, zero);
        for pair in 0..pairs {
            let t = 2 * pair;
            let (a, b) = (S::load(panel.add(t * PANEL)), S::load(panel.add((t + 1) * PANEL)));
            let a = seen::<S, MASKED>(t, limit, exp2::<S>(S::mul(S::sub(a, max), scale), bias), zero);
            let b = seen::<S, MASKED>(t + 1, limit, exp2::<S>(S::mul(S::sub(b, max), scale), bias), zero);
            even = S::add(even, a);
            odd = S::add(odd, b);
            W::put(panel, pair, a, b);
        }
        let sum = S::load(tile.sum.add(row));
        S::store(tile.sum.add(row), S::fma(sum, alpha, S::add(even, odd)));
    }
}

/// What `accumulate` does between products.
struct Meanwhile<'a> {
    block: &'a Block,
    /// The column panel that is staged over the one in use, once its last register tile is at work.
    next: Option<(usize, usize)>,
    /// Lines of the block that comes next, and how many of them to ask for every [`STEP`] tokens.
    ahead: Ahead<'a>,
    lines: usize,
}

/// Rows `row..row + MR` times `NV` vectors of columns, the staged panel's from `column` - `begin`.
#[inline(always)]
unsafe fn accumulate_tile<S: Simd, E: Widen, const MR: usize, const NV: usize>(
    tile: &Tile,
    row: usize,
    (begin, column): (usize, usize),
    tokens: usize,
    first: bool,
    meanwhile: &mut Meanwhile<'_>,
) {
    // SAFETY: rows row..row + MR are inside the tile and one row panel, NV vectors from `column` in this column panel.
    unsafe {
        let width = COLUMNS.min(tile.v_columns - begin);
        let o = tile.o_panel(begin).add(row * width + column - begin);
        let v = tile.kv.add(column - begin);
        let p = tile.weights_of(row);
        let mut acc = [[S::splat(0.0); NV]; MR];
        if !first {
            for r in 0..MR {
                let alpha = S::splat(*tile.alpha.add(row + r));
                for j in 0..NV {
                    acc[r][j] = S::mul(alpha, S::load(o.add(r * width + j * S::LANES)));
                }
            }
        }
        for step in (0..tokens).step_by(STEP) {
            let tokens = step..tokens.min(step + STEP);
            meanwhile.ahead.by_ref().take(meanwhile.lines).for_each(|line| S::prefetch(line));
            for t in tokens.clone() {
                let mut vv = [S::splat(0.0); NV];
                for j in 0..NV {
                    vv[j] = S::load(v.add(t * COLUMNS + j * S::LANES));
                }
                for r in 0..MR {
                    let weight = S::splat(*p.add(t * PANEL + r));
                    for j in 0..NV {
                        acc[r][j] = S::fma(weight, vv[j], acc[r][j]);
                    }
                }
            }
            if let Some(next) = meanwhile.next {
                stage::<S, E>(tile, meanwhile.block, next, tokens);
            }
        }
        for r in 0..MR {
            for j in 0..NV {
                S::store(o.add(r * width + j * S::LANES), acc[r][j]);
            }
        }
    }
}

/// `NV` vectors are 64 columns, or 16; `MR` rows of a panel at once, the rest one by one.
#[inline(always)]
unsafe fn accumulate<S: Simd, E: Widen, const MR: usize, const NV: usize>(
    tile: &Tile,
    rows: (usize, usize),
    tokens: usize,
    first: bool,
    block: &Block,
    next: &Block,
) {
    let ahead = Ahead::new(next);
    let steps = tile.v_columns.div_ceil(NV * S::LANES) * (rows.1 - rows.0).div_ceil(MR) * tokens.div_ceil(STEP);
    let lines = ahead.all().div_ceil(steps.max(1));
    let mut meanwhile = Meanwhile { block, next: None, ahead, lines };
    // SAFETY: only whole register tiles inside the tile. Columns from head_dim_v to v_columns are what they happen to
    // be: nobody reads their results.
    unsafe {
        stage::<S, E>(tile, block, first_panel(tile), 0..tokens);
        for (begin, width) in tile.column_panels() {
            let behind = panel_behind((begin, width), tile.v_columns.min(tile.head_dim_k));
            let mut column = begin;
            while column < begin + width {
                let vectors = if NV * S::LANES <= begin + width - column { NV } else { 1 };
                let mut row = rows.0;
                while row < rows.1 {
                    let many = row.is_multiple_of(MR) && rows.1 - row >= MR;
                    let end = row + if many { MR } else { 1 };
                    let last = end == rows.1 && column + vectors * S::LANES == begin + width;
                    meanwhile.next = behind.filter(|_| last);
                    let (at, then) = ((begin, column), &mut meanwhile);
                    match (vectors == NV, many) {
                        (true, true) => accumulate_tile::<S, E, MR, NV>(tile, row, at, tokens, first, then),
                        (true, false) => accumulate_tile::<S, E, 1, NV>(tile, row, at, tokens, first, then),
                        // Reached with AVX-512 only: elsewhere NV vectors are 16 columns.
                        (false, true) => accumulate_tile::<S, E, MR, 1>(tile, row, at, tokens, first, then),
                        (false, false) => accumulate_tile::<S, E, 1, 1>(tile, row, at, tokens, first, then),
                    }
                    row = end;
                }
                column += vectors * S::LANES;
            }
        }
    }
}

#[inline(always)]
unsafe fn read_row<S: Simd>(tile: &Tile, row: usize, factor: f32) {
    // SAFETY: row is inside the tile; panel widths are multiples of 16.
    unsafe {
        for (column, width) in tile.column_panels() {
            let o = tile.o_panel(column).add(row * width);
            for c in (0..width).step_by(S::LANES) {
                S::store(tile.row.add(column + c), S::mul(S::load(o.add(c)), S::splat(factor)));
            }
        }
    }
}

/// The kernels of one instruction set: `simd` with `feature`, register tiles `scores` and `accumulate`.
macro_rules! wide_kernels {
    ($module:ident, $simd:ty, [$($feature:literal)?], scores $sv:literal x $st:literal, accumulate $ar:literal x $av:literal) => {
        pub(super) mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])?
            unsafe fn scores<E: Widen>(tile: &Tile, block: &Block) {
                // SAFETY: features as above; the rest is the table's contract. So for all that follow.
                unsafe { super::scores::<$simd, E, $sv, $st>(tile, block) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn accumulate<E: Widen>(
                tile: &Tile,
                rows: (usize, usize),
                tokens: usize,
                first: bool,
                block: &Block,
                next: &Block,
            ) {
                // SAFETY: see above.
                unsafe { super::accumulate::<$simd, E, $ar, $av>(tile, rows, tokens, first, block, next) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn softmax(tile: &Tile, tokens: usize, scale: f32, masked: bool) {
                // SAFETY: see above.
                unsafe { super::softmax::<$simd, F32Weights>(tile, tokens, scale, masked) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn read_row(tile: &Tile, row: usize, factor: f32) {
                // SAFETY: see above.
                unsafe { super::read_row::<$simd>(tile, row, factor) }
            }

            const fn of<E: Widen>() -> Kernels {
                Kernels { query_form: QueryForm::F32, scores: scores::<E>, softmax, accumulate: accumulate::<E>, read_row }
            }
            pub static BF16: Kernels = of::<FromBf16>();
            pub static F16: Kernels = of::<FromF16>();
            pub static F32: Kernels = of::<FromF32>();
        }
    };
}

wide_kernels!(portable, Portable, [], scores 2 x 2, accumulate 2 x 2);
#[cfg(target_arch = "x86_64")]
wide_kernels!(avx2, crate::cpu::x86::Avx2, ["avx2,fma,f16c"], scores 2 x 4, accumulate 4 x 2);
#[cfg(target_arch = "x86_64")]
wide_kernels!(avx512f, crate::cpu::x86::Avx512, ["avx512f"], scores 4 x 4, accumulate 4 x 4);
#[cfg(target_arch = "aarch64")]
wide_kernels!(neon, crate::cpu::neon::Neon, ["neon"], scores 4 x 4, accumulate 4 x 4);
