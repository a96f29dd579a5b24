// The values that the host hands to the sm90 kernels, as plain old data.
//
// Included by device code (nvcc and NVRTC) and mirrored by the host with
// #[repr(C)]: every pointer, stride and offset is 64 bits wide, every count is
// 32 bits wide, fields are ordered so that no implicit padding appears, and the
// sizes are asserted at the bottom. Strides count elements, not bytes.
#pragma once

namespace polymla {

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

// A tensor map as cuTensorMapEncodeTiled writes it; opaque here because <cuda.h>
// is not available to NVRTC.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// One row of tile_scheduler_metadata, upstream's layout. A part is what one CTA
// per M tile works through: requests begin_req..=end_req, from
// block begin_block of the first to block end_block (exclusive) of the last.
// Blocks are 64 tokens. A part without work has begin_req >= b.
struct alignas(32) PartMeta {
    int begin_req;
    int end_req;
    int begin_block;
    int end_block;
    int begin_split;        // index of this part's piece among the splits of begin_req
    int first_req_split;    // begin_req is shared with other parts
    int last_req_split;     // end_req is shared with other parts
    int pad;
};

// A split request, for the combine kernel: `pieces` partial results, in slot `slot`, then 2 * (slot / 2 + 1) and every
// second one. Entry 0 of the list has their number as `req`.
struct alignas(8) Owner {
    int req;
    u16 slot, pieces;
};

struct DecodeParams {
    // Queries. Fused callers pass q and q + 512 with the same strides. 16-byte
    // aligned rows; the innermost stride is 1.
    const void* q_nope;         // [b, s_q, h_q, 512]
    const void* q_pe;           // [b, s_q, h_q, 64], unused when head_dim_k is 512
    i64 q_nope_stride_b, q_nope_stride_s, q_nope_stride_h;
    i64 q_pe_stride_b, q_pe_stride_s, q_pe_stride_h;

    // KV cache, read through these only by the gather kernels (other page sizes);
    // the TMA kernels get the same facts in their tensor maps.
    const void* ckv;            // [pages, page_size, h_kv, 512]
    const void* kpe;            // [pages, page_size, h_kv, 64]
    i64 ckv_stride_page, ckv_stride_token, ckv_stride_head;
    i64 kpe_stride_page, kpe_stride_token, kpe_stride_head;

    const int* block_table;     // [b, max_pages_per_seq], innermost stride 1
    i64 block_table_stride_b;
    const int* cache_seqlens;   // [b]
    const int* visible_lens;    // [b, s_q] keys each query row sees, or null
    i64 visible_lens_stride_b;

    void* out;                  // [b, s_q, h_q, 512], any strides
    i64 out_stride_b, out_stride_s, out_stride_h, out_stride_d;
    float* lse;                 // [b, h_q, s_q], natural logarithm
    i64 lse_stride_b, lse_stride_h, lse_stride_s;

    const PartMeta* parts;      // [num_parts]
    const int* num_splits;      // [b + 1], cumulative
    const Owner* owners;        // [1 + up to b], made with the schedule
    void* partial_out;          // [slots, h_kv, m_tiles, 64 * 512], three bytes a value in fragment order (tile.h)
    float* partial_rows;        // [slots, h_kv, m_tiles, 64, 2] (tile.h)
    int* status;                // one int, or null: smallest request index found invalid (atomicMin)

    int b, s_q, h_q, h_kv;
    int heads_per_kv;           // h_q / h_kv
    int m_tiles;                // ceil(s_q * heads_per_kv / 64)
    int num_parts;
    int page_size;
    int num_pages;
    int max_pages_per_seq;
    int causal;                 // 0 or 1, ignored when visible_lens is given
    int fixed_split_blocks;     // 0, or the batch-invariant split size in 64-token blocks
    int flags;                  // FLAG_*
    float scale_log2;           // softmax_scale * log2(e); must be finite and > 0
    u32 heads_magic;            // 2^32 / heads_per_kv + 1, or 0 for one head: row / heads_per_kv by one multiplication
    int q_box_rows;             // rows of a box of the query maps: min(heads_per_kv, 64), or its largest factor of 8, 16, 32, 64
};

enum DecodeFlags {
    // out is 16-byte aligned, its innermost stride is 1 and the others are multiples of 8 elements
    FLAG_OUT_VEC16 = 1,
};

struct ScheduleParams {
    const int* cache_seqlens;   // [b]
    PartMeta* parts;            // [num_parts]
    int* num_splits;            // [b + 1]
    i64* scratch;               // [b + 1]; holds the Owner list afterwards
    int b;
    int num_parts;
    int max_len;                // max_pages_per_seq * page_size, saturated; a longer request counts as empty
    int fixed_split_blocks;     // 0, or batch-invariant split size in blocks
    // Cost model, in eighths of the time of one 64-token block.
    int cost_segment;           // any piece of a request: prologue and epilogue
    int cost_split;             // additional cost of a piece that is not a whole request
    int cost_combine;           // once, when any request is split at all
    int min_split_blocks;       // no piece of a split request is shorter (>= 1)
};

static_assert(sizeof(PartMeta) == 32, "PartMeta is 8 x i32");
static_assert(sizeof(Owner) == 8, "an Owner takes an entry of scratch");
static_assert(sizeof(ScheduleParams) == 64, "ScheduleParams layout");
static_assert(sizeof(DecodeParams) == 8 * 36 + 4 * 16, "DecodeParams layout");
static_assert(sizeof(TensorMap) == 128, "TensorMap layout");

}  // namespace polymla
