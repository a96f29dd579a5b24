//! What kernels are told: `shaders/params.wgsl` in Rust, field by field.

/// `Params`. Strides and offsets count elements.
#[derive(Debug, Clone, Copy, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Params {
    pub(super) first_request: u32,
    pub(super) requests: u32,
    pub(super) first_row_tile: u32,
    pub(super) row_tiles: u32,
    pub(super) first_page: u32,
    pub(super) window_pages: u32,
    pub(super) window: u32,
    pub(super) windows: u32,
    pub(super) b: u32,
    pub(super) s_q: u32,
    pub(super) heads_per_kv: u32,
    pub(super) head_dim_k: u32,
    pub(super) head_dim_v: u32,
    pub(super) page_size: u32,
    pub(super) num_pages: u32,
    pub(super) max_pages_per_seq: u32,
    pub(super) mask: u32,
    pub(super) scale_log2: f32,
    pub(super) num_parts: u32,
    pub(super) split_blocks: u32,
    pub(super) overhead_blocks: u32,
    pub(super) ends_at: u32,
    pub(super) sums_at: u32,
    pub(super) accumulators_at: u32,
    pub(super) q_nope: [u32; 4],
    pub(super) q_pe: [u32; 4],
    pub(super) ckv: [u32; 4],
    pub(super) kpe: [u32; 4],
    pub(super) out: [u32; 4],
    pub(super) lse: [u32; 4],
    pub(super) block_table: [u32; 2],
    pub(super) visible_lengths: [u32; 2],
    pub(super) cache_seqlens: u32,
    pub(super) out_column: u32,
    pub(super) subtiles: u32,
    pub(super) zero: u32,
}

/// Bytes from one `Params` to the next: what every adapter grants as alignment of uniform offsets.
pub(super) const PARAMS_STRIDE: u64 = 256;

/// `STATUS_OK`: the status word while nothing is wrong.
pub(super) const STATUS_OK: u32 = u32::MAX;
/// `NUM_SPLITS_AT`: words before `num_splits` in the plan.
pub(super) const NUM_SPLITS_AT: usize = 4;

const _: () = assert!(size_of::<Params>() == 224 && size_of::<Params>() as u64 <= PARAMS_STRIDE);
