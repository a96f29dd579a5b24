//! What the kernels take: `backends/sm90/params.h` in Rust, field by field.

use cudarc::driver::sys::CUtensorMap;

/// A tensor map, passed to kernels by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap(pub(super) CUtensorMap);

/// `polymla::DecodeParams`. Strides count elements; addresses are of the device.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(super) struct DecodeParams {
    pub(super) q_nope: u64,
    pub(super) q_pe: u64,
    pub(super) q_nope_strides: [i64; 3],
    pub(super) q_pe_strides: [i64; 3],
    pub(super) ckv: u64,
    pub(super) kpe: u64,
    pub(super) ckv_strides: [i64; 3],
    pub(super) kpe_strides: [i64; 3],
    pub(super) block_table: u64,
    pub(super) block_table_stride_b: i64,
    pub(super) cache_seqlens: u64,
    pub(super) visible_lens: u64,
    pub(super) visible_lens_stride_b: i64,
    pub(super) out: u64,
    pub(super) out_strides: [i64; 3],
    pub(super) lse: u64,
    pub(super) lse_strides: [i64; 3],
    pub(super) parts: u64,
    pub(super) num_splits: u64,
    pub(super) partial_out: u64,
    pub(super) partial_lse: u64,
    pub(super) status: u64,
    pub(super) b: i32,
    pub(super) s_q: i32,
    pub(super) h_q: i32,
    pub(super) h_kv: i32,
    pub(super) heads_per_kv: i32,
    pub(super) m_tiles: i32,
    pub(super) num_parts: i32,
    pub(super) page_size: i32,
    pub(super) num_pages: i32,
    pub(super) max_pages_per_seq: i32,
    pub(super) causal: i32,
    pub(super) fixed_split_blocks: i32,
    pub(super) flags: i32,
    pub(super) scale_log2: f32,
}

/// `FLAG_OUT_VEC16`: out is 16-byte aligned and its strides are multiples of 8 elements.
pub(super) const FLAG_OUT_VEC16: i32 = 1;

/// `polymla::ScheduleParams`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(super) struct ScheduleParams {
    pub(super) cache_seqlens: u64,
    pub(super) parts: u64,
    pub(super) num_splits: u64,
    pub(super) scratch: u64,
    pub(super) b: i32,
    pub(super) num_parts: i32,
    pub(super) max_len: i32,
    pub(super) fixed_split_blocks: i32,
    pub(super) cost_segment: i32,
    pub(super) cost_split: i32,
    pub(super) cost_combine: i32,
    pub(super) min_split_blocks: i32,
}

const _: () = {
    assert!(size_of::<DecodeParams>() == 8 * 34 + 4 * 14);
    assert!(size_of::<ScheduleParams>() == 64);
    assert!(size_of::<TensorMap>() == 128 && align_of::<TensorMap>() == 64);
    assert!(size_of::<crate::schedule::PartMetadata>() == 32);
};
