//! The f32 kernels: any element type, any instruction set.
//!
//! The block is widened to f32 column panel by column panel ([`super::stage`]; V is its first panels): while the
//! products of one panel of K run, the next one is staged. The products broadcast one f32 of K, or of P, against vectors
//! of 16 rows, or of 16 columns. Register tiles: `scores` MT tokens x NV vectors of rows, whose sums go through memory
//! between panels, `accumulate` MR rows x NV vectors of columns. Every result is summed in the order of its inner index
//! whatever the tile's shape, so bits do not depend on it.

#![allow(clippy::needless_range_loop, reason = "register tiles are arrays indexed by row and column")]

use crate::problem::BLOCK_TOKENS;

use super::simd::{Portable, Simd, exp2};
use super::stage::{FromBf16, FromF16, FromF32, Widen, first_panel, panel_behind, stage};
use super::tile::{Block, COLUMNS, Kernels, PANEL, QueryForm, TOKEN_GROUP, Tile, panels};

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
        let k = tile.k_panel(column).add(token * COLUMNS);
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
unsafe fn scores<S: Simd, E: Widen, const NV: usize, const MT: usize>(tile: &Tile, block: &Block, next: &Block) {
    let wide = NV * S::LANES / PANEL;
    // SAFETY: only whole register tiles inside the tile; tokens are padded to a multiple of 16.
    unsafe {
        stage::<S, E>(tile, block, next, first_panel(tile), 0..block.tokens.next_multiple_of(TOKEN_GROUP));
        for columns in panels(tile.head_dim_k) {
            let mut panel = 0;
            while panel + wide <= tile.panels {
                scores_strip::<S, E, NV, MT>(tile, (block, next), columns, panel, wide);
                panel += wide;
            }
            // Elsewhere NV vectors are one panel, and nothing is left.
            if S::LANES == PANEL {
                while panel + 2 <= tile.panels {
                    scores_strip::<S, E, 2, 8>(tile, (block, next), columns, panel, 2);
                    panel += 2;
                }
                if panel < tile.panels {
                    scores_strip::<S, E, 1, 16>(tile, (block, next), columns, panel, 1);
                }
            }
        }
    }
}

/// The register tiles of all tokens and `count` row panels, which are `NV` vectors. The last strip of a column panel
/// stages the next one between its tiles, so that products run while those loads and stores are on their way.
#[inline(always)]
unsafe fn scores_strip<S: Simd, E: Widen, const NV: usize, const MT: usize>(
    tile: &Tile,
    (block, next): (&Block, &Block),
    columns: (usize, usize),
    panel: usize,
    count: usize,
) {
    let behind = panel_behind(columns, tile.head_dim_k).filter(|_| panel + count == tile.panels);
    for token in (0..block.tokens).step_by(MT) {
        // SAFETY: the caller's contract is this function's.
        unsafe {
            scores_tile::<S, NV, MT>(tile, columns, panel, token);
            if let Some(behind) = behind {
                stage::<S, E>(tile, block, next, behind, token..token + MT);
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

/// Rows `row..row + MR` times `NV` vectors of columns from `column`.
#[inline(always)]
unsafe fn accumulate_tile<S: Simd, const MR: usize, const NV: usize>(
    tile: &Tile,
    row: usize,
    column: usize,
    tokens: usize,
    first: bool,
) {
    // SAFETY: rows row..row + MR are inside the tile and one row panel, NV vectors from `column` in one column panel.
    unsafe {
        let begin = column / COLUMNS * COLUMNS;
        let width = COLUMNS.min(tile.v_columns - begin);
        let o = tile.o_panel(begin).add(row * width + column - begin);
        let v = tile.k_panel(begin).add(column - begin);
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
        for t in 0..tokens {
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
        for r in 0..MR {
            for j in 0..NV {
                S::store(o.add(r * width + j * S::LANES), acc[r][j]);
            }
        }
    }
}

/// `NV` vectors are 64 columns, or 16; `MR` rows of a panel at once, the rest one by one.
#[inline(always)]
unsafe fn accumulate<S: Simd, const MR: usize, const NV: usize>(
    tile: &Tile,
    rows: (usize, usize),
    tokens: usize,
    first: bool,
) {
    let mut column = 0;
    // SAFETY: only whole register tiles inside the tile. Columns from head_dim_v to v_columns are what they happen to
    // be: nobody reads their results.
    unsafe {
        while column < tile.v_columns {
            let wide = NV * S::LANES <= tile.v_columns - column;
            let mut row = rows.0;
            while row < rows.1 {
                let many = row.is_multiple_of(MR) && rows.1 - row >= MR;
                match (wide, many) {
                    (true, true) => accumulate_tile::<S, MR, NV>(tile, row, column, tokens, first),
                    (true, false) => accumulate_tile::<S, 1, NV>(tile, row, column, tokens, first),
                    // Reached with AVX-512 only: elsewhere NV vectors are 16 columns.
                    (false, true) => accumulate_tile::<S, MR, 1>(tile, row, column, tokens, first),
                    (false, false) => accumulate_tile::<S, 1, 1>(tile, row, column, tokens, first),
                }
                row += if many { MR } else { 1 };
            }
            column += if wide { NV * S::LANES } else { S::LANES };
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
            unsafe fn scores<E: Widen>(tile: &Tile, block: &Block, next: &Block) {
                // SAFETY: features as above; the rest is the table's contract. So for all that follow.
                unsafe { super::scores::<$simd, E, $sv, $st>(tile, block, next) }
            }
            $(#[target_feature(enable = $feature)])?
            unsafe fn accumulate(tile: &Tile, rows: (usize, usize), tokens: usize, first: bool, _: &Block, _: &Block) {
                // SAFETY: see above.
                unsafe { super::accumulate::<$simd, $ar, $av>(tile, rows, tokens, first) }
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
                Kernels { query_form: QueryForm::F32, scores: scores::<E>, softmax, accumulate, read_row }
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
