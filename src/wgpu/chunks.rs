//! Cutting a call into chunks whose tensors fit the bindings of the device.
//!
//! One chunk is the whole call, nearly always. A batch whose queries, outputs or partial results are larger than a
//! binding goes in several groups of requests (and of row tiles, where one request's partial results are too large); a
//! cache that is larger in several windows of pages, each of which leaves a partial result of its own.

use crate::error::{MlaError, Result};

/// What decides the size of the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) requests: u64,
    pub(super) row_tiles: u64,
    /// Rows a tile.
    pub(super) rows: u64,
    pub(super) s_q: u64,
    pub(super) head_dim_v: u64,
    /// Partial results of a chunk: so many, and so many a request.
    pub(super) slots: u64,
    pub(super) slots_per_request: u64,
}

/// How much of a call one dispatch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) requests: u64,
    pub(super) row_tiles: u64,
}

/// Where things are in the workspace, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) ends: u64,
    pub(super) sums: u64,
    pub(super) accumulators: u64,
    pub(super) words: u64,
}

/// Words that a partial row has beside its accumulators: `SUMS` of params.wgsl.
const SUMS: u64 = 3;

/// Row tiles and requests that the dimensions of a dispatch admit.
const MAX_GROUPS: u64 = 65_535;

impl Shape {
    /// The workspace of a chunk: lengths, visible ends, maximum and sums of weights of every partial row, its
    /// accumulators. Saturates.
    pub(super) fn layout(&self, chunk: Chunk, windows: u64) -> Layout {
        let slots = self.slots.saturating_add(chunk.requests.saturating_mul(self.slots_per_request));
        let rows = slots.saturating_mul(windows).saturating_mul(chunk.row_tiles.saturating_mul(self.rows));
        let ends = chunk.requests;
        let sums = ends.saturating_add(chunk.requests.saturating_mul(self.s_q)).saturating_add(3) / 4 * 4;
        let accumulators = sums.saturating_add(rows.saturating_mul(SUMS)).saturating_add(3) / 4 * 4;
        let words = accumulators.saturating_add(rows.saturating_mul(self.head_dim_v));
        Layout { ends, sums, accumulators, words }
    }

    /// The largest chunk of at most `requests` requests whose workspace has at most `bytes` bytes.
    ///
    /// # Errors
    /// [`MlaError::WorkspaceTooSmall`] where not one request's row tile fits.
    pub(super) fn chunk(&self, requests: u64, windows: u64, bytes: u64) -> Result<Chunk> {
        let fits = |requests, row_tiles| self.layout(Chunk { requests, row_tiles }, windows).words <= bytes / 4;
        let most = |limit: u64, fits: &dyn Fn(u64) -> bool| {
            // The largest n of 1..=limit that fits; layouts grow with n.
            let (mut low, mut high) = (0, limit);
            while low < high {
                let middle = low + (high - low).div_ceil(2);
                (low, high) = if fits(middle) { (middle, high) } else { (low, middle - 1) };
            }
            low
        };
        let all_tiles = self.row_tiles.min(MAX_GROUPS / self.rows).max(1);
        let row_tiles = most(all_tiles, &|n| fits(1, n));
        if row_tiles == 0 {
            let needed = self.layout(Chunk { requests: 1, row_tiles: 1 }, windows).words.saturating_mul(4);
            let to_usize = |n| usize::try_from(n).unwrap_or(usize::MAX);
            return Err(MlaError::WorkspaceTooSmall { value: to_usize(bytes), limit: to_usize(needed) });
        }
        let requests = most(requests.clamp(1, MAX_GROUPS), &|n| fits(n, row_tiles));
        Ok(Chunk { requests, row_tiles })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape =
        Shape { requests: 128, row_tiles: 8, rows: 16, s_q: 1, head_dim_v: 512, slots: 66, slots_per_request: 1 };

    #[test]
    fn a_chunk_is_the_largest_that_fits() {
        let whole = Chunk { requests: 128, row_tiles: 8 };
        let bytes = SHAPE.layout(whole, 1).words * 4;
        assert_eq!(SHAPE.chunk(128, 1, bytes), Ok(whole));
        assert_eq!(SHAPE.chunk(128, 1, bytes - 4), Ok(Chunk { requests: 127, row_tiles: 8 }));
        let one = SHAPE.layout(Chunk { requests: 1, row_tiles: 3 }, 2).words * 4;
        assert_eq!(SHAPE.chunk(128, 2, one), Ok(Chunk { requests: 1, row_tiles: 3 }));
        let least = SHAPE.layout(Chunk { requests: 1, row_tiles: 1 }, 1).words * 4;
        let limit = least as usize;
        assert_eq!(SHAPE.chunk(128, 1, least - 4), Err(MlaError::WorkspaceTooSmall { value: limit - 4, limit }));
    }

    #[test]
    fn sizes_beyond_64_bits_saturate() {
        let huge = Shape { slots_per_request: u64::MAX / 2, ..SHAPE };
        assert!(huge.layout(Chunk { requests: 128, row_tiles: 8 }, 1).words >= u64::MAX / 2);
        assert!(huge.chunk(128, 1, 1 << 32).is_err());
    }
}
