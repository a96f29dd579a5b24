//! One tile of query rows against one block of tokens: the scratch it works in, and the table of kernels that do it.
//!
//! A tile is at most [`MAX_ROWS`] query rows that share a KV head. It runs over its tokens in blocks of 64:
//!
//! | step | kernel | what it does |
//! |---|---|---|
//! | 1 | `scores` | S^T = K Q^T, tokens x rows, raw (not scaled) |
//! | 2 | `softmax` | running maximum and sum of each row; S becomes the weights P |
//! | 3 | `accumulate` | O = O * alpha + P V |
//! | end | `read_row` | one row of O as f32, times a factor |
//!
//! Scores are kept transposed: a vector holds one token for 16 rows. So K is broadcast from where it lies, in the page
//! or in the staged block, and never transposed; Q is packed once a tile; and the softmax needs no horizontal step.
//!
//! Two families of kernels share this: `f32` ones ([`super::wide`]) stage the block as f32 and work for every element
//! type and instruction set; the `pairs` ones ([`super::pairs`]) multiply bf16 pairs and read K in place.

use crate::problem::BLOCK_TOKENS;

/// Rows of a panel: Q and the scores are stored in panels of so many rows, side by side.
pub(super) const PANEL: usize = 16;

/// Most rows of a tile: 128 x 512 f32 of output (256 KiB), the packed Q (144 KiB bf16) and a block of K (72 KiB) stay in
/// an L2 of 1 MiB.
pub(super) const MAX_ROWS: usize = 128;

/// Columns of an output panel: O and V are stored so that a panel's rows are contiguous.
pub(super) const COLUMNS: usize = 64;

/// Tokens that pointers are padded to, with rows of zeros; a multiple of every kernel's token group.
pub(super) const TOKEN_GROUP: usize = 16;

/// Where the tokens of a block lie.
pub(super) struct Block {
    /// For each part of the token (`k_cache`, or `ckv` and `kpe`): its first element. Entries from `tokens` to the next
    /// multiple of [`TOKEN_GROUP`] point to zeros.
    pub tokens_at: [[*const u8; BLOCK_TOKENS]; 2],
    /// Columns of each part; the second is 0 for a fused cache.
    pub columns: [usize; 2],
    /// Cache lines that each part of a token is long.
    pub lines: [usize; 2],
    /// Tokens of the block, 1..=64; 0 where there is none.
    pub tokens: usize,
}

impl Block {
    /// No block.
    pub const NONE: Block =
        Block { tokens_at: [[std::ptr::null(); BLOCK_TOKENS]; 2], columns: [0; 2], lines: [0; 2], tokens: 0 };
}

/// The column panels of `columns` columns: first column and width.
pub(super) fn panels(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..columns).step_by(COLUMNS).map(move |c| (c, COLUMNS.min(columns - c)))
}

/// The scratch memory of a worker, and the shape of its tile. All pointers are aligned to 64 bytes.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Packed Q: [panels][head_dim_k][16] f32, or [panels][head_dim_k / 2][16] bf16 pairs.
    pub q: *mut f32,
    /// Scores, then weights: [panels][64][16] f32, or [panels][32][16] bf16 pairs.
    pub s: *mut f32,
    /// The staged block: K [column panels][64 tokens][64] f32, or one column panel of V as bf16 pairs [32][width].
    pub kv: *mut f32,
    /// Output: [column panels][panels * 16][width] f32; a column panel is 64 wide, the last one may be narrower.
    pub o: *mut f32,
    /// Running maximum of each row, of scores as they are stored: not scaled.
    pub max: *mut f32,
    /// Running sum of each row.
    pub sum: *mut f32,
    /// What O has to be multiplied by, for each row, after the latest block.
    pub alpha: *mut f32,
    /// Tokens of the block that each row sees, as f32.
    pub limit: *mut f32,
    /// head_dim_v f32, padded: one row of output.
    pub row: *mut f32,
    /// head_dim_k elements of zero.
    pub zeros: *mut f32,
    /// Rows of the tile.
    pub rows: usize,
    /// Panels of 16 rows.
    pub panels: usize,
    pub head_dim_k: usize,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "read by the pair kernels of x86-64 only"))]
    pub head_dim_v: usize,
    /// head_dim_v rounded up to 32.
    pub v_columns: usize,
    /// Weights, their sum and O are multiplied by 2^bias.
    pub bias: f32,
}

impl Tile {
    /// The column panels of the output: first column and width.
    pub fn column_panels(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        panels(self.v_columns)
    }

    /// Token 0 of the staged column panel that begins at `column`, a multiple of 64; the next token's elements are 64
    /// further.
    pub fn k_panel(&self, column: usize) -> *mut f32 {
        self.kv.wrapping_add(column * BLOCK_TOKENS)
    }

    /// Where the tile's own rows begin in column panel `column`.
    ///
    /// # Safety
    /// `column` must be the first column of a panel.
    pub unsafe fn o_panel(&self, column: usize) -> *mut f32 {
        // SAFETY: panels before this one hold 64 columns of every row.
        unsafe { self.o.add(column * self.panels * PANEL) }
    }

    /// The score, or weight, of token 0 for `row`; the next token's is 16 elements further.
    ///
    /// # Safety
    /// `row` must be one of the tile's; `tokens_stored` is 64 for scores and f32 weights, 32 for pairs.
    pub unsafe fn weights_of(&self, row: usize) -> *mut f32 {
        // SAFETY: row < panels * 16.
        unsafe { self.s.add(row / PANEL * PANEL * BLOCK_TOKENS + row % PANEL) }
    }
}

/// Bytes of each array of a worker's scratch, in the order of [`Sizes::lay`].
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    panels: usize,
    head_dim_k: usize,
    head_dim_v: usize,
    v_columns: usize,
}

impl Sizes {
    pub fn new(rows: usize, head_dim_k: usize, head_dim_v: usize) -> Self {
        Sizes {
            panels: rows.div_ceil(PANEL),
            head_dim_k,
            head_dim_v,
            v_columns: head_dim_v.div_ceil(32).saturating_mul(32),
        }
    }

    fn arrays(&self) -> [usize; 10] {
        let rows = self.panels * PANEL;
        [
            rows.saturating_mul(self.head_dim_k),
            rows * BLOCK_TOKENS,
            self.head_dim_k.div_ceil(COLUMNS).saturating_mul(COLUMNS * BLOCK_TOKENS),
            rows.saturating_mul(self.v_columns),
            rows,
            rows,
            rows,
            rows,
            self.v_columns,
            self.head_dim_k.saturating_add(PANEL),
        ]
        // Whole cache lines.
        .map(|elements| elements.div_ceil(16).saturating_mul(16))
    }

    /// Bytes of scratch a worker needs; saturates where no memory could hold them.
    pub fn bytes(&self) -> usize {
        self.arrays().into_iter().fold(0, usize::saturating_add).saturating_mul(4)
    }

    /// The scratch at `base`, for a tile of `rows` rows.
    ///
    /// # Safety
    /// `base` must be aligned to 64 bytes and hold [`bytes`](Self::bytes) bytes; `rows` must not be more than the
    /// sizes were made for.
    pub unsafe fn lay(&self, base: *mut u8, rows: usize) -> Tile {
        let mut at = base.cast::<f32>();
        let [q, s, kv, o, max, sum, alpha, limit, row, zeros] = self.arrays().map(|elements| {
            let array = at;
            // SAFETY: the arrays together take `bytes` bytes.
            at = unsafe { at.add(elements) };
            array
        });
        Tile {
            q,
            s,
            kv,
            o,
            max,
            sum,
            alpha,
            limit,
            row,
            zeros,
            rows,
            panels: rows.div_ceil(PANEL),
            head_dim_k: self.head_dim_k,
            head_dim_v: self.head_dim_v,
            v_columns: self.v_columns,
            bias: 0.0,
        }
    }
}

/// How Q is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueryForm {
    /// One f32 a column.
    F32,
    /// Two 16-bit elements a pair of columns, as they are.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the pair kernels are x86-64's"))]
    Pairs,
}

/// The kernels of one instruction set for one element type. Each needs that instruction set, pointers as [`Tile`] and
/// [`Block`] describe them, and the steps before it.
pub(super) struct Kernels {
    pub query_form: QueryForm,
    /// `next` is the block that comes after this one, for prefetching; it has 0 tokens after the last.
    pub scores: unsafe fn(&Tile, block: &Block, next: &Block),
    /// `scale` is softmax_scale * log2(e); weights are 2^((score - maximum) * scale + bias). With `masked`, row r sees `limit[r]` tokens.
    pub softmax: unsafe fn(&Tile, tokens: usize, scale: f32, masked: bool),
    /// Rows `rows.0..rows.1`, the first `tokens` tokens of `block`. With `first`, O and alpha count as 0. `next` is
    /// as above.
    pub accumulate: unsafe fn(&Tile, rows: (usize, usize), tokens: usize, first: bool, block: &Block, next: &Block),
    /// Writes row `row` of O, times `factor`, to [`Tile::row`].
    pub read_row: unsafe fn(&Tile, row: usize, factor: f32),
}
