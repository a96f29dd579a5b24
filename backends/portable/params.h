// The values that a host hands to the portable kernels, as plain old data.
//
// Mirrored by the host with #[repr(C)]: pointers, strides and offsets are 64 bits wide, counts 32, fields are ordered so
// that no padding appears, sizes are asserted at the bottom. Strides count elements. README.md says how each kernel is
// launched with them.
#pragma once

namespace polymla {

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

// A float and its bits.
union FloatBits {
    float f;
    u32 u;
};

// One row of tile_scheduler_metadata in upstream's layout (src/schedule.rs): requests begin_req..=end_req, from block
// begin_block of the first to block end_block (exclusive) of the last. A part without work has begin_req > end_req.
struct alignas(32) PartMeta {
    int begin_req, end_req;
    int begin_block, end_block;
    int begin_split;            // number of the split of begin_req that this part begins with
    int is_first_req_split;     // begin_req has other splits
    int is_last_req_split;      // end_req has other splits
    int padding;
};

enum DecodeFlags {
    FLAG_Q_VEC16 = 1,           // every row of q_nope and q_pe is 16-byte aligned
    FLAG_KV_VEC16 = 2,          // every row of ckv and kpe is
    FLAG_OUT_VEC = 4,           // every row of out is 8-byte aligned and its innermost stride is 1
};

struct DecodeParams {
    // A fused tensor is passed twice: q_pe = q + head_dim_v elements, same strides. Innermost strides are 1.
    const void* q_nope;         // [b, s_q, h_q, head_dim_v]
    const void* q_pe;           // [b, s_q, h_q, head_dim_k - head_dim_v]
    i64 q_nope_stride_b, q_nope_stride_s, q_nope_stride_h;
    i64 q_pe_stride_b, q_pe_stride_s, q_pe_stride_h;

    const void* ckv;            // [num_pages, page_size, h_kv, head_dim_v]
    const void* kpe;            // [num_pages, page_size, h_kv, head_dim_k - head_dim_v]
    i64 ckv_stride_page, ckv_stride_token, ckv_stride_head;
    i64 kpe_stride_page, kpe_stride_token, kpe_stride_head;

    const int* block_table;     // [b, max_pages_per_seq]
    i64 block_table_stride_b;
    const int* cache_seqlens;   // [b]
    const int* visible_lens;    // [b, s_q], or null
    i64 visible_lens_stride_b;

    void* out;                  // [b, s_q, h_q, head_dim_v], any strides
    i64 out_stride_b, out_stride_s, out_stride_h, out_stride_d;
    float* lse;                 // [b, h_q, s_q], natural logarithm
    i64 lse_stride_b, lse_stride_h, lse_stride_s;

    const PartMeta* parts;      // [num_parts]
    const int* num_splits;      // [b + 1], cumulative
    float* partial_out;         // [slots, h_kv * s_q * heads_per_kv, head_dim_v], 16-byte aligned
    float* partial_lse;         // [slots, h_kv * s_q * heads_per_kv], base 2
    int* status;                // or null: the smallest request found invalid (atomic minimum)

    int b, s_q, h_q, h_kv;
    int heads_per_kv;           // h_q / h_kv
    int head_dim_k, head_dim_v;
    int num_parts;
    int page_size;
    int page_shift;             // log2(page_size), or -1 where it is no power of two
    int num_pages;
    int max_pages_per_seq;
    int causal;                 // 0 or 1; ignored where visible_lens is given
    int fixed_split_blocks;     // 0, or the batch-invariant split size in blocks of 64 tokens
    int slots;                  // rows of the partial buffers; a split beyond them is reported, never written
    int combine_units;          // what a block of the combine kernel merges, in query rows x 128 columns
    int combine_ways;           // 1, 2, 4 or 8: groups that share the splits of one row
    int flags;                  // DecodeFlags
    float scale_log2;           // softmax_scale * log2(e), at least 1e-30
    float requests_a_part;      // b / num_parts: a guess of what a part begins with, which no result depends on
};

struct ScheduleParams {
    const int* cache_seqlens;   // [b]
    PartMeta* parts;            // [num_parts]
    int* num_splits;            // [b + 1]
    int* status;                // or null: the smallest request with an invalid length, or b where the plan overflows
    i64 max_tokens;             // max_pages_per_seq * page_size: a longer request is invalid and planned as empty
    int b;
    int num_parts;
    int overhead_blocks;        // balanced policy: what a request costs beyond its blocks; negative: the kernel chooses
    int fixed_split_blocks;     // 0, or the batch-invariant split size
    int merge_cost;             // where it chooses: what merging a split costs, in 1/1024 of a block
    int padding;
};

static_assert(sizeof(PartMeta) == 32, "PartMeta is 8 x i32");
static_assert(sizeof(DecodeParams) == 8 * 35 + 4 * 20, "DecodeParams layout");
static_assert(sizeof(ScheduleParams) == 64, "ScheduleParams layout");

// The value of *status while nothing is wrong; the host writes it before a step.
constexpr int STATUS_OK = 0x7fffffff;

}  // namespace polymla
