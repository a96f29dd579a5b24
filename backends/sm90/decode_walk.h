// Walking a part's schedule: one thread turns it into segment records, up to SEGMENTS ahead of the slowest warp.
#pragma once

#include "decode_load.h"

namespace polymla {

// Keys that packed row `row` of the request sees.
PM_DEV int row_limit(const DecodeParams& p, int req, int len, int row) {
    const int j = min(query_of(p, row), p.s_q - 1);
    int limit = len;
    if (p.visible_lens)
        limit = min(limit, p.visible_lens[i64(req) * p.visible_lens_stride_b + j]);
    else if (p.causal)
        limit = len - p.s_q + j + 1;
    return max(limit, 0);
}

// Writes record `seg` once its slot is free.
PM_DEV void publish(u32 smem, u32 seg, int req, int begin, int end, int len, int slot, int bad) {
    const u32 rec = segment_record(smem, seg);
    mbar_wait(rec + SEG_EMPTY, seg / SEGMENTS & 1 ^ 1);
    st_shared(rec + SEG_REQ, req);
    st_shared(rec + SEG_BEGIN, begin);
    st_shared(rec + SEG_END, end);
    st_shared(rec + SEG_LEN, len);
    st_shared(rec + SEG_SLOT, slot);
    st_shared(rec + SEG_BAD, bad);
    mbar_arrive(rec + SEG_FULL);
}

// By one thread. It has few registers: its PartMeta lies in shared memory. `ahead` is the first request's length if that is one of
// the first 32.
PM_DEV void walk(const DecodeParams& p, u32 smem, const PartMeta& m, int ahead) {
    const u32 part = smem + Smem::part;
    {
        st_shared(part + 0, m.begin_req);
        st_shared(part + 4, m.end_req);
        st_shared(part + 12, m.end_block);
        st_shared(part + 16, m.first_req_split);
        st_shared(part + 20, m.last_req_split);
        st_shared(part + 8, m.begin_block);
    }
    int req = ld_shared(part) >= 0 ? ld_shared(part) : p.b, begin = max(ld_shared(part + 8), 0);
    const int last = min(ld_shared(part + 4), p.b - 1);
    u32 seg = 0;
    int len = ahead;
    if (req <= last && req >= 32) len = p.cache_seqlens[req];
#pragma unroll 1
    while (req <= last) {
        const bool bad = len < 0 || i64(len) > i64(p.max_pages_per_seq) * p.page_size;
        if (bad) {
            len = 0;
            report_bad(p, req);
        }
        int end = int((u32(len) + BLOCK - 1) / BLOCK), slot = -1, next_begin = 0;
        if (p.fixed_split_blocks > 0) {
            const int piece = begin / p.fixed_split_blocks, stop = (piece + 1) * p.fixed_split_blocks;
            if (end > p.fixed_split_blocks) slot = p.num_splits[req] + piece;
            if (req == ld_shared(part + 4)) end = min(end, ld_shared(part + 12));
            if (end > stop) end = next_begin = stop;
        } else {
            if ((req == ld_shared(part) && ld_shared(part + 16)) || (req == ld_shared(part + 4) && ld_shared(part + 20)))
                slot = 2 * int(blockIdx.z) + (req == ld_shared(part) ? 0 : 1);
            if (req == ld_shared(part + 4)) end = min(end, ld_shared(part + 12));
        }
        publish(smem, seg++, req, begin, max(end, begin), len, slot, bad);
        begin = next_begin;
        if (begin == 0 && ++req <= last) len = p.cache_seqlens[req];
    }
    publish(smem, seg, -1, 0, 0, 0, -1, 0);
}

}  // namespace polymla
