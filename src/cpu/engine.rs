//! The tile engine: what a call's work is, who does it, and in which order a tile meets its tokens.
//!
//! Work items are (split of the schedule) x (KV head) x (tile of at most 128 query rows). Workers of the pool take the
//! next item from a counter until none is left, each in a scratch of its own, so that it does not matter who computes
//! what: an item's arithmetic depends on the schedule and the problem alone. A request with one split writes its
//! results; the others write partial results, which a second pass merges in split order.
//!
//! Workspace: [item records][partial outputs][partial maxima and sums][scratch of worker 0][of worker 1]...

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::problem::{BLOCK_TOKENS, Problem};
use crate::schedule::Schedule;

use super::combine;
use super::geometry::Call;
use super::tile::{Block, Kernels, MAX_ROWS, PANEL, Sizes, Tile};

/// Binary exponent that weights are raised by. Where the values of the largest weight are 0 in a column, the result
/// there is made of the others, whose weights may be below f32's normal numbers and still make a result that is not.
const BIAS: f32 = 24.0;

/// A split, as it lies in the workspace.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Item {
    request: i32,
    begin_block: i32,
    end_block: i32,
    /// Row of the partial buffers, or -1.
    partial: i32,
}

/// How a call's work is cut, and where in the workspace things lie.
pub(super) struct Plan {
    pub splits: usize,
    pub partials: usize,
    /// Query rows of a request: s_q * h_q.
    pub rows: usize,
    tiles: usize,
    tile_rows: usize,
    sizes: Sizes,
    workers: usize,
    partial_out_at: usize,
    partial_state_at: usize,
    scratch_at: usize,
    scratch_bytes: usize,
    /// Bytes of the whole; `usize::MAX` where no memory could hold it.
    pub bytes: usize,
}

fn lines(elements: usize, size: usize) -> usize {
    elements.saturating_mul(size).div_ceil(64).saturating_mul(64)
}

impl Plan {
    pub fn new(problem: &Problem, schedule: &Schedule, threads: usize) -> Plan {
        let p = problem;
        let shared = p.s_q() * p.heads_per_kv();
        let tiles = shared.div_ceil(MAX_ROWS);
        // Tiles of equal size, in whole panels: 144 rows are 80 + 64, not 128 + 16.
        let tile_rows = shared.div_ceil(tiles).next_multiple_of(PANEL).min(shared);
        let tiles = shared.div_ceil(tile_rows);
        let sizes = Sizes::new(tile_rows, p.head_dim_k(), p.head_dim_v());
        let (splits, partials, rows) = (schedule.total_splits(), schedule.total_partials(), p.s_q() * p.h_q());
        // None for an empty batch, whose rows may be of any size.
        let workers = threads.max(1).min(splits.saturating_mul(tiles * p.h_kv()));
        let partial_rows = partials.saturating_mul(rows);
        let partial_out_at = lines(splits, size_of::<Item>());
        let partial_state_at = partial_out_at.saturating_add(lines(partial_rows, p.head_dim_v().saturating_mul(4)));
        let scratch_at = partial_state_at.saturating_add(lines(partial_rows, 8));
        let scratch_bytes = lines(sizes.bytes(), 1);
        let bytes = scratch_at.saturating_add(scratch_bytes.saturating_mul(workers));
        Plan {
            splits,
            partials,
            rows,
            tiles,
            tile_rows,
            sizes,
            workers,
            partial_out_at,
            partial_state_at,
            scratch_at,
            scratch_bytes,
            bytes,
        }
    }
}

/// The partial results in the workspace.
#[derive(Clone, Copy)]
pub(super) struct Partials {
    /// [partials][rows][head_dim_v], not divided by the sum.
    pub out: *mut f32,
    /// [partials][rows][maximum, sum].
    pub state: *mut f32,
}

struct Job<'a> {
    call: &'a Call<'a>,
    plan: &'a Plan,
    kernels: &'a Kernels,
    scale: f32,
    items: *const Item,
    partials: Partials,
    scratch: *mut u8,
    next: AtomicUsize,
}

// SAFETY: items are read only; workers write disjoint partial rows, and each its own scratch.
unsafe impl Sync for Job<'_> {}

/// Runs a validated call. `spread(n, f)` must call f(0) to f(n - 1), in any order, on any threads, and wait for all.
///
/// # Safety
/// `workspace` must be aligned to 64 bytes and hold `plan.bytes` bytes; `plan` and `schedule` must be of this call, the
/// schedule checked against its lengths; this CPU must have the kernels' instruction set.
pub(super) unsafe fn run(
    call: &Call<'_>,
    schedule: &Schedule,
    plan: &Plan,
    kernels: &Kernels,
    workspace: *mut u8,
    spread: impl Fn(usize, &(dyn Fn(usize) + Sync)),
) {
    let items = workspace.cast::<Item>();
    for (i, split) in schedule.splits().enumerate().take(plan.splits) {
        let item = Item {
            request: split.request as i32,
            begin_block: split.begin_block as i32,
            end_block: split.end_block as i32,
            partial: split.partial.map_or(-1, |p| p as i32),
        };
        // SAFETY: i < plan.splits, for which the workspace has room.
        unsafe { items.add(i).write(item) };
    }
    // SAFETY: offsets inside the workspace, by `Plan::new`.
    let (out, state, scratch) = unsafe {
        let at = |offset| workspace.add(offset);
        (at(plan.partial_out_at).cast(), at(plan.partial_state_at).cast(), at(plan.scratch_at))
    };
    let partials = Partials { out, state };
    let scale = call.problem.scale_log2();
    let job = Job { call, plan, kernels, scale, items, partials, scratch, next: AtomicUsize::new(0) };
    spread(plan.workers, &|worker| {
        // SAFETY: the caller's promises; every worker number is used once.
        unsafe { job.work(worker) }
    });
    if plan.partials > 0 {
        let next = AtomicUsize::new(0);
        spread(plan.workers, &|worker| {
            // SAFETY: all partial results are written, and the tiles' scratch is free again.
            unsafe { job.merge(worker, schedule, &next) }
        });
    }
}

/// The work of one item and tile.
struct Tiled {
    item: Item,
    request: usize,
    kv_head: usize,
    first_row: usize,
}

impl Job<'_> {
    unsafe fn work(&self, worker: usize) {
        let plan = self.plan;
        let heads = self.call.problem.h_kv();
        let shared = plan.rows / heads;
        // SAFETY: worker < plan.workers, for each of which the workspace holds a scratch.
        let scratch = unsafe { self.scratch.add(worker * plan.scratch_bytes) };
        let mut blocks = [Block::NONE, Block::NONE];
        let mut packed = None;
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            let (split, part) = (n / (heads * plan.tiles), n % (heads * plan.tiles));
            if split >= plan.splits {
                return;
            }
            // SAFETY: split < plan.splits, all written before the workers started.
            let item = unsafe { self.items.add(split).read() };
            let (kv_head, first_row) = (part / plan.tiles, part % plan.tiles * plan.tile_rows);
            let rows = plan.tile_rows.min(shared - first_row);
            let tiled = Tiled { item, request: item.request as usize, kv_head, first_row };
            // SAFETY: the scratch is this worker's alone and was sized for tile_rows rows; the request and its rows
            // exist.
            unsafe {
                let mut tile = plan.sizes.lay(scratch, rows);
                tile.bias = BIAS;
                self.decode(&tile, &mut blocks, &tiled, &mut packed);
                if !self.is_finite(&tile) {
                    tile.bias = 0.0;
                    self.decode(&tile, &mut blocks, &tiled, &mut packed);
                }
                self.finish(&tile, &tiled);
            }
        }
    }

    unsafe fn merge(&self, worker: usize, schedule: &Schedule, next: &AtomicUsize) {
        // SAFETY: worker < plan.workers, for each of which the workspace holds a scratch, with room for a row.
        unsafe {
            let values = self.scratch.add(worker * self.plan.scratch_bytes).cast();
            combine::work(self.call, schedule, self.plan, self.partials, values, next);
        }
    }

    /// The keys that row `row` of the tile sees.
    unsafe fn end_of(&self, tiled: &Tiled, row: usize) -> usize {
        let j = (tiled.first_row + row) / self.call.problem.heads_per_kv();
        // SAFETY: the row exists.
        unsafe { self.call.visible_end(tiled.request, j) }
    }

    /// Whether the output of all rows that saw a key is. Values of V above 2^100 make it infinite by the bias alone.
    unsafe fn is_finite(&self, tile: &Tile) -> bool {
        // SAFETY: rows of the tile exist; those that saw a key have an output.
        (0..tile.rows).filter(|row| unsafe { *tile.sum.add(*row) } != 0.0).all(|row| unsafe {
            (self.kernels.read_row)(tile, row, 1.0);
            let values = std::slice::from_raw_parts(tile.row, tile.head_dim_v);
            // Without branches, so that it is done by vectors.
            values.iter().fold(true, |all, x| all & x.is_finite())
        })
    }

    /// Runs a tile over the tokens of its split. `packed` says which rows of which request the tile's Q holds.
    unsafe fn decode(&self, tile: &Tile, blocks: &mut [Block; 2], tiled: &Tiled, packed: &mut Option<[usize; 3]>) {
        let (call, kernels) = (self.call, self.kernels);
        let rows = tile.panels * PANEL;
        // SAFETY: all arrays of the tile are as large as `Sizes` says; all tokens are below the request's length, and
        // kernels run in their order.
        unsafe {
            for row in 0..rows {
                tile.max.add(row).write(f32::NEG_INFINITY);
                tile.sum.add(row).write(0.0);
            }
            let begin = tiled.item.begin_block as usize * BLOCK_TOKENS;
            let split_end = (tiled.item.end_block as usize).saturating_mul(BLOCK_TOKENS);
            // Blocks that no row of the tile sees are left out. Rows of a tile are few, and masks differ by s_q only.
            let group = call.problem.heads_per_kv();
            let ends = || (0..tile.rows).step_by(group).chain([tile.rows - 1]).map(|row| self.end_of(tiled, row));
            let end = ends().max().unwrap_or(0).min(split_end);
            let all_see = ends().min().unwrap_or(0);
            if begin >= end {
                return;
            }
            let rows = [tiled.request, tiled.kv_head, tiled.first_row];
            if packed.replace(rows) != Some(rows) {
                call.pack_query(tile, kernels.query_form, tiled.request, tiled.kv_head, tiled.first_row);
                tile.zeros.write_bytes(0, tile.head_dim_k);
            }
            let [block, next] = blocks;
            let find = |block: &mut Block, start: usize| match end.saturating_sub(start) {
                0 => block.tokens = 0,
                left => {
                    let tokens = left.min(BLOCK_TOKENS);
                    call.find(block, tiled.request, tiled.kv_head, start, tokens, tile.zeros.cast());
                }
            };
            find(block, begin);
            for start in (begin..end).step_by(BLOCK_TOKENS) {
                find(next, start + BLOCK_TOKENS);
                let tokens = block.tokens;
                (kernels.scores)(tile, block, next);
                let cut = start + tokens > all_see;
                let masked = cut || tokens % 2 == 1;
                if masked {
                    self.limits(tile, tiled, start, tokens);
                }
                (kernels.softmax)(tile, tokens, self.scale, masked);
                if cut {
                    self.accumulate_cut(tile, tokens, start == begin, block, next);
                } else {
                    (kernels.accumulate)(tile, (0, tile.rows), tokens, start == begin, block, next);
                }
                std::mem::swap(block, next);
            }
        }
    }

    /// Writes how many of the block's tokens each row sees. Rows that pad the last panel copy the last one.
    unsafe fn limits(&self, tile: &Tile, tiled: &Tiled, start: usize, tokens: usize) {
        for row in 0..tile.panels * PANEL {
            // SAFETY: the row clamped to the tile's exists.
            unsafe {
                let end = self.end_of(tiled, row.min(tile.rows - 1));
                tile.limit.add(row).write(end.saturating_sub(start).min(tokens) as f32);
            }
        }
    }

    /// `accumulate` where rows see different tokens. A weight of 0 does not undo a NaN, so values that a row does not
    /// see must not be multiplied at all: rows are handled by how many tokens they see, most first, and the staged V is
    /// cut down as that number falls.
    unsafe fn accumulate_cut(&self, tile: &Tile, tokens: usize, first: bool, block: &Block, after: &Block) {
        // SAFETY: limits were written for every row.
        unsafe {
            let limit = |row: usize| *tile.limit.add(row) as usize;
            let mut next = Some(tokens);
            while let Some(tokens) = next {
                let mut row = 0;
                next = None;
                while row < tile.rows {
                    let begin = row;
                    let here = limit(row);
                    while row < tile.rows && limit(row) == here {
                        row += 1;
                    }
                    if here == tokens {
                        (self.kernels.accumulate)(tile, (begin, row), tokens, first, block, after);
                    } else if here < tokens {
                        next = next.max(Some(here));
                    }
                }
            }
        }
    }

    /// Writes a tile's rows: results where the request has one split, partial results elsewhere.
    unsafe fn finish(&self, tile: &Tile, tiled: &Tiled) {
        let p = self.call.problem;
        let (group, d_v) = (p.heads_per_kv(), p.head_dim_v());
        for row in 0..tile.rows {
            let (j, head) = ((tiled.first_row + row) / group, (tiled.first_row + row) % group);
            let head = tiled.kv_head * group + head;
            // SAFETY: rows of the tile exist; this worker alone has this item.
            unsafe {
                let (max, biased) = (*tile.max.add(row), *tile.sum.add(row));
                let sum = biased * (-tile.bias).exp2();
                let seen = max != f32::NEG_INFINITY || sum != 0.0;
                let values = std::slice::from_raw_parts_mut(tile.row, d_v);
                if tiled.item.partial < 0 {
                    if seen {
                        (self.kernels.read_row)(tile, row, 1.0 / biased);
                    } else {
                        values.fill(0.0);
                    }
                    self.call.write_row(tiled.request, j, head, values, combine::lse(max, sum, p.softmax_scale()));
                } else {
                    let at = tiled.item.partial as usize * self.plan.rows + j * p.h_q() + head;
                    self.partials.state.add(2 * at).write(max);
                    self.partials.state.add(2 * at + 1).write(sum);
                    // The merge does not read the output of a row that has seen nothing.
                    if seen {
                        (self.kernels.read_row)(tile, row, (-tile.bias).exp2());
                        self.partials.out.add(at * d_v).copy_from_nonoverlapping(tile.row, d_v);
                    }
                }
            }
        }
    }
}
