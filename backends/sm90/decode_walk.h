// Walking a part's schedule: warp 0 turns it into segment records, three segments ahead of
// the block that the QK warpgroup works on. Requests without keys never become a segment;
// their outputs are written here.
#pragma once

#include "decode_load.h"

namespace polymla {

// Packed row r of the tile -> (s_q index, head).
struct RowIndex {
    int s, h;
    bool valid;
    PM_DEV RowIndex(const DecodeParams& p, int row) {
        valid = row < p.s_q * p.heads_per_kv;
        s = row / p.heads_per_kv;
        h = int(blockIdx.y) * p.heads_per_kv + row - s * p.heads_per_kv;
    }
};

// Keys that packed row `row` of the request sees.
PM_DEV int row_limit(const DecodeParams& p, int req, int len, int row) {
    const int j = min(row / p.heads_per_kv, p.s_q - 1);
    int limit = len;
    if (p.visible_lens)
        limit = min(limit, p.visible_lens[i64(req) * p.visible_lens_stride_b + j]);
    else if (p.causal)
        limit = len - p.s_q + j + 1;
    return max(limit, 0);
}

// A piece without keys, by one warp: out 0 and lse +inf (-inf in the workspace), or NaN.
template <class Elem>
PM_DEV void store_empty(const DecodeParams& p, bool bad, int req, int slot) {
    const int lane = threadIdx.x % 32;
    const float nan = __int_as_float(0x7fc00000), inf = __int_as_float(0x7f800000);
    const float value = bad ? nan : 0.0f;
    const i64 tile = partial_tile(p, slot, blockIdx.y, blockIdx.x);
    const u16 word = u16(pack2<Elem>(value, value));
    if (slot >= 0)
#pragma unroll 1
        for (int i = lane; i < TILE_M * DV; i += 32) p.partial_out[tile * TILE_M * DV + i] = value;
#pragma unroll 1
    for (int k = 0; k < TILE_M; ++k) {
        const RowIndex r(p, blockIdx.x * TILE_M + k);
        if (!r.valid) break;
        if (slot >= 0) {
            if (lane == 0) p.partial_lse[tile * TILE_M + k] = bad ? nan : -inf;
            continue;
        }
        if (lane == 0)
            p.lse[i64(req) * p.lse_stride_b + i64(r.h) * p.lse_stride_h + i64(r.s) * p.lse_stride_s] = bad ? nan : inf;
        u16* dst = reinterpret_cast<u16*>(p.out) + i64(req) * p.out_stride_b + i64(r.s) * p.out_stride_s +
                   i64(r.h) * p.out_stride_h;
#pragma unroll 1
        for (int i = lane; i < DV; i += 32) dst[i * p.out_stride_d] = word;
    }
}

// Brings the Q rows of a segment into the L2, by one warp.
PM_DEV void prefetch_q(const DecodeParams& p, int req) {
    const int rows = min(TILE_M, p.s_q * p.heads_per_kv - int(blockIdx.x) * TILE_M);
#pragma unroll 1
    for (int k = threadIdx.x % 32; k < rows; k += 32) {
        const RowIndex r(p, blockIdx.x * TILE_M + k);
        const u16* q = reinterpret_cast<const u16*>(p.q_nope) + i64(req) * p.q_nope_stride_b +
                       i64(r.s) * p.q_nope_stride_s + i64(r.h) * p.q_nope_stride_h;
#pragma unroll
        for (int c = 0; c < 8; ++c) prefetch_l2(q + c * 64);
        if (p.q_pe)
            prefetch_l2(reinterpret_cast<const u16*>(p.q_pe) + i64(req) * p.q_pe_stride_b + i64(r.s) * p.q_pe_stride_s +
                        i64(r.h) * p.q_pe_stride_h);
    }
}

// The walk's state, in shared memory between steps: PartMeta (8 x i32), then req, next
// block, and the length of req, loaded a step early.
enum WalkField { WALK_META = 0, WALK_REQ = 32, WALK_BLOCK = 36, WALK_LEN = 40 };

PM_DEV void walk_start(const DecodeParams& p, u32 smem) {
    if (threadIdx.x != 0) return;
    const PartMeta m = p.parts[blockIdx.z];
    const u32 w = smem + Smem::walk;
    const int last = min(m.end_req, p.b - 1);
    const int req = m.begin_req >= 0 && m.begin_req <= last ? m.begin_req : p.b;
    st_shared(w + 0, m.begin_req);
    st_shared(w + 4, last);
    st_shared(w + 12, m.end_block);
    st_shared(w + 20, m.first_req_split);
    st_shared(w + 24, m.last_req_split);
    st_shared(w + WALK_REQ, req);
    st_shared(w + WALK_BLOCK, max(m.begin_block, 0));
    st_shared(w + WALK_LEN, req < p.b ? p.cache_seqlens[req] : 0);
}

// While warp 0 waits for lengths, the others bring what the first loads will need towards the
// SM: the part's first table entries and Q rows. `tid` counts from 0 over 352 threads.
PM_DEV void prefetch_first(const DecodeParams& p, u32 tid) {
    const PartMeta m = p.parts[blockIdx.z];
    if (m.begin_req < 0 || m.begin_req >= p.b) return;
    const int rows = min(TILE_M, p.s_q * p.heads_per_kv - int(blockIdx.x) * TILE_M);
    if (tid < 32) {
        const i64 at = i64(m.begin_block) * BLOCK / p.page_size + tid;
        if (at >= 0 && at < p.max_pages_per_seq)
            asm volatile("prefetch.global.L1 [%0];" ::"l"(p.block_table + i64(m.begin_req) * p.block_table_stride_b + at));
    } else if (tid - 32 < u32(rows) * 5) {
        const u32 i = tid - 32;
        const RowIndex r(p, blockIdx.x * TILE_M + int(i / 5));
        const u16* q = reinterpret_cast<const u16*>(p.q_nope) + i64(m.begin_req) * p.q_nope_stride_b +
                       i64(r.s) * p.q_nope_stride_s + i64(r.h) * p.q_nope_stride_h;
        if (i % 5 < 4) {
            prefetch_l2(q + i % 5 * 128);
            prefetch_l2(q + i % 5 * 128 + 64);
        } else if (p.q_pe) {
            prefetch_l2(reinterpret_cast<const u16*>(p.q_pe) + i64(m.begin_req) * p.q_pe_stride_b +
                        i64(r.s) * p.q_pe_stride_s + i64(r.h) * p.q_pe_stride_h);
        }
    }
}

// Writes record `seg`; by all lanes of warp 0.
template <class Elem>
PM_DEV void walk_step(const DecodeParams& p, u32 smem, u32 seg) {
    const u32 w = smem + Smem::walk, rec = segment_record(smem, seg);
    for (;;) {
        __syncwarp();
        const int req = ld_shared(w + WALK_REQ), begin_req = ld_shared(w), end_req = ld_shared(w + 4);
        if (req > end_req || req >= p.b) {
            __syncwarp();
            if (threadIdx.x == 0) st_shared(rec + SEG_REQ, -1);
            return;
        }
        int len = ld_shared(w + WALK_LEN);
        const int begin = ld_shared(w + WALK_BLOCK);
        const bool bad = len < 0 || i64(len) > i64(p.max_pages_per_seq) * p.page_size;
        if (bad) len = 0;
        const int blocks = int((u32(len) + BLOCK - 1) / BLOCK);
        int end = req == end_req ? min(ld_shared(w + 12), blocks) : blocks;
        int slot = -1, next_req = req + 1, next_block = 0;
        if (p.fixed_split_blocks > 0) {
            const int piece = begin / p.fixed_split_blocks;
            if (blocks > p.fixed_split_blocks) slot = p.num_splits[req] + piece;
            const int stop = begin + p.fixed_split_blocks - begin % p.fixed_split_blocks;
            if (end > stop) {
                end = next_block = stop;
                next_req = req;
            }
        } else {
            const bool split = (req == begin_req && ld_shared(w + 20)) || (req == end_req && ld_shared(w + 24));
            if (split) slot = 2 * int(blockIdx.z) + (req == begin_req ? 0 : 1);
        }
        __syncwarp();
        if (threadIdx.x == 0) {
            st_shared(w + WALK_REQ, next_req);
            st_shared(w + WALK_BLOCK, next_block);
            if (next_req != req) st_shared(w + WALK_LEN, next_req <= end_req ? p.cache_seqlens[next_req] : 0);
            if (end > begin) {
                st_shared(rec + SEG_REQ, req);
                st_shared(rec + SEG_BEGIN, begin);
                st_shared(rec + SEG_END, end);
                st_shared(rec + SEG_LEN, len);
                st_shared(rec + SEG_SLOT, slot);
                st_shared(rec + SEG_BAD, 0);
            }
            if (bad) report_bad(p, req);
        }
        if (end > begin) {
            if (seg > 0) prefetch_q(p, req);    // the first one's is under way
            return;
        }
        store_empty<Elem>(p, bad, req, slot);
    }
}

}  // namespace polymla
