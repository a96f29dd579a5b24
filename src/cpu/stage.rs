//! Staging for the f32 kernels: a block in f32, column panel by column panel, [64 tokens][64 columns] each; and the
//! requests for the block that comes next.

use std::ops::Range;

use super::simd::Simd;
use super::tile::{Block, COLUMNS, Tile};

/// Element types that `stage` widens.
pub(super) trait Widen {
    const BYTES: usize;
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
}
pub(super) struct FromBf16;
pub(super) struct FromF16;
pub(super) struct FromF32;
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

/// Widens a column panel of `tokens`, which may be zeros that pad the block, and asks for some lines of `next`, the block
/// that comes after it: nothing costs less here, and all at once would keep the loads of products waiting.
#[inline(always)]
pub(super) unsafe fn stage<S: Simd, E: Widen>(
    tile: &Tile,
    block: &Block,
    next: &Block,
    (column, width): (usize, usize),
    tokens: Range<usize>,
) {
    let panel = tile.k_panel(column);
    let (i, panels) = (column / COLUMNS, tile.head_dim_k.div_ceil(COLUMNS));
    let mut begin = 0;
    for part in 0..2 {
        let (tokens_at, columns) = (&block.tokens_at[part], block.columns[part]);
        // The columns that the panel and this part of a token share.
        let (from, to) = (column.max(begin), (column + width).min(begin + columns));
        if from < to {
            let n = to - from;
            for t in tokens.clone() {
                // SAFETY: `columns` elements can be read at every token; the panel holds `width` of every token.
                unsafe {
                    let source = tokens_at[t].add((from - begin) * E::BYTES);
                    let target = panel.add(t * COLUMNS + from - column);
                    // The usual width is known to the compiler, so that it unrolls.
                    if n == COLUMNS { widen::<S, E>(target, source, COLUMNS) } else { widen::<S, E>(target, source, n) }
                }
            }
        }
        begin += columns;
        // Next's pointers beyond its last token are old or null: a prefetch may be given any address.
        let lines = next.lines[part];
        if next.tokens > 0 {
            for line in i * lines / panels..(i + 1) * lines / panels {
                for t in tokens.clone() {
                    // SAFETY: see above.
                    unsafe { S::prefetch(next.tokens_at[part][t].wrapping_add(64 * line)) };
                }
            }
        }
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

/// The first column panel of a token.
pub(super) fn first_panel(tile: &Tile) -> (usize, usize) {
    (0, COLUMNS.min(tile.head_dim_k))
}

/// The column panel behind `column` and `width`, if there is one before column `end`.
pub(super) fn panel_behind((column, width): (usize, usize), end: usize) -> Option<(usize, usize)> {
    let next = column + width;
    (next < end).then(|| (next, COLUMNS.min(end - next)))
}
