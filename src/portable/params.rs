//! What the portable kernels take: `backends/portable/params.h` in Rust, field by field.

/// `polymla::DecodeParams`. Strides count elements; addresses are of the device.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(crate) struct DecodeParams {
    pub(crate) q_nope: u64,
    pub(crate) q_pe: u64,
    pub(crate) q_nope_strides: [i64; 3],
    pub(crate) q_pe_strides: [i64; 3],
    pub(crate) ckv: u64,
    pub(crate) kpe: u64,
    pub(crate) ckv_strides: [i64; 3],
    pub(crate) kpe_strides: [i64; 3],
    pub(crate) block_table: u64,
    pub(crate) block_table_stride_b: i64,
    pub(crate) cache_seqlens: u64,
    pub(crate) visible_lens: u64,
    pub(crate) visible_lens_stride_b: i64,
    pub(crate) out: u64,
    pub(crate) out_strides: [i64; 4],
    pub(crate) lse: u64,
    pub(crate) lse_strides: [i64; 3],
    pub(crate) parts: u64,
    pub(crate) num_splits: u64,
    pub(crate) partial_out: u64,
    pub(crate) partial_lse: u64,
    pub(crate) status: u64,
    pub(crate) b: i32,
    pub(crate) s_q: i32,
    pub(crate) h_q: i32,
    pub(crate) h_kv: i32,
    pub(crate) heads_per_kv: i32,
    pub(crate) head_dim_k: i32,
    pub(crate) head_dim_v: i32,
    pub(crate) num_parts: i32,
    pub(crate) page_size: i32,
    pub(crate) page_shift: i32,
    pub(crate) num_pages: i32,
    pub(crate) max_pages_per_seq: i32,
    pub(crate) causal: i32,
    pub(crate) fixed_split_blocks: i32,
    pub(crate) slots: i32,
    pub(crate) combine_units: i32,
    pub(crate) combine_ways: i32,
    pub(crate) flags: i32,
    pub(crate) scale_log2: f32,
    pub(crate) requests_a_part: f32,
}

/// `FLAG_Q_VEC16`: every row of q_nope and q_pe is 16-byte aligned.
pub(crate) const FLAG_Q_VEC16: i32 = 1;
/// `FLAG_KV_VEC16`: every row of ckv and kpe is.
pub(crate) const FLAG_KV_VEC16: i32 = 2;
/// `FLAG_OUT_VEC`: every row of out is 8-byte aligned and its innermost stride is 1.
pub(crate) const FLAG_OUT_VEC: i32 = 4;

impl DecodeParams {
    /// Whether rows are as the kernel with roles needs them.
    pub(crate) fn aligned(&self) -> bool {
        let all = FLAG_Q_VEC16 | FLAG_KV_VEC16 | FLAG_OUT_VEC;
        self.flags & all == all
    }
}

/// `polymla::ScheduleParams`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(crate) struct ScheduleParams {
    pub(crate) cache_seqlens: u64,
    pub(crate) parts: u64,
    pub(crate) num_splits: u64,
    pub(crate) status: u64,
    pub(crate) max_tokens: i64,
    pub(crate) b: i32,
    pub(crate) num_parts: i32,
    pub(crate) overhead_blocks: i32,
    pub(crate) fixed_split_blocks: i32,
    pub(crate) merge_cost: i32,
    pub(crate) padding: i32,
}

const _: () = {
    assert!(size_of::<DecodeParams>() == 8 * 35 + 4 * 20);
    assert!(size_of::<ScheduleParams>() == 64);
    assert!(size_of::<crate::schedule::PartMetadata>() == 32);
};
