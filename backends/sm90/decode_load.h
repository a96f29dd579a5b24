// Filling shared memory: three loader warps that do nothing else. Each walks the segments by itself: Q first,
// as if it were a block, then the segment's KV blocks.
//
//   warp 12  columns 0..256                      one turn of the ring of stages each
//   warp 13  columns 256..448, the rope columns
//   warp 14  columns 448..512, two tiles; they come late, when P V has given one back. Of Q also the rope columns, and in TMA form
//            all of a part's first Q, which so does not stand before the first KV.
//
// TMA form: boxes of 64 columns x min(page_size, 64) tokens. When two M tiles share a
// request their CTAs form a cluster; each loads one side of the stages for both (multicast), so that the
// L2 serves these bytes once. The late tiles, a ninth of the bytes, are not worth the wait for the peer.
//
// Gather form: any page size and row packing, 16 bytes a lane with cp.async.
//
// Table entries are checked here, before anything is read through them; an invalid one marks
// the segment (the QK warpgroup turns that into NaN) and names the request in the status word.
#pragma once

#include "tile.h"

namespace polymla {

// Packed row r of the tile -> (s_q index, head).
struct RowIndex {
    int s, h;
    bool valid;
    PM_DEV RowIndex(const DecodeParams& p, int row) {
        valid = row < p.s_q * p.heads_per_kv;
        s = query_of(p, row);
        h = int(opaque(blockIdx.y)) * p.heads_per_kv + row - s * p.heads_per_kv;
    }
};

PM_DEV void report_bad(const DecodeParams& p, int req) {
    if (p.status) atomicMin(p.status, req);
}

// A page number from the table, or 0 and a mark when there is no such page.
PM_DEV int checked_page(const DecodeParams& p, u32 rec, int req, int index) {
    int page = __ldg(p.block_table + i64(req) * p.block_table_stride_b + index);
#ifndef POLYMLA_UNCHECKED   // only to time what the check costs: -D it for benches/sm90
    if (u32(page) >= u32(p.num_pages)) {
        page = 0;
        st_shared(rec + SEG_BAD, 1);
        report_bad(p, req);
    }
#endif
    return page;
}

// Where a block lies, for TMA.
struct BoxAt {
    int page;       // this lane's, valid in lanes below `count`; every lane's when pages hold 64 tokens
    int token;      // first token within the page
    int count;      // pages of the block that hold keys
};

// Block `blk` of the segment; `look_up` is false for a loader that only counts bytes. By one whole warp.
PM_DEV BoxAt locate(const DecodeParams& p, u32 rec, int blk, bool look_up) {
    BoxAt at{0, 0, 1};
    int index = blk;
    bool lookup_here = look_up;
    if (p.page_size != BLOCK) {
        if (p.page_size < BLOCK) {      // 8, 16 or 32
            const int shift = 31 - __clz(p.page_size), lane = threadIdx.x % 32;
            const int valid = min(ld_shared(rec + SEG_LEN) - blk * BLOCK, BLOCK);
            at.count = (valid + p.page_size - 1) >> shift;
            index = (blk << (6 - shift)) + lane;
            lookup_here = look_up && lane < at.count;
        } else {
            const int per_page = p.page_size / BLOCK;
            index = blk / per_page;
            at.token = (blk - index * per_page) * BLOCK;
        }
    }
    if (lookup_here) at.page = checked_page(p, rec, ld_shared(rec + SEG_REQ), index);
    __syncwarp();
    return at;
}

// Boxes of Q rows in M tile `tile`.
PM_DEV int q_boxes(const DecodeParams& p, int tile) {
    const int rows = min(p.s_q * p.heads_per_kv - tile * TILE_M, TILE_M);
    return p.s_q == 1 ? 1 : (rows + p.q_box_rows - 1) >> (31 - __clz(p.q_box_rows));     // 8, 16, 32 or 64
}

// Before the walker has a length, the part says where the first block's table entries lie: on their way while it waits.
PM_DEV void prefetch_table(const DecodeParams& p, const PartMeta& part) {
    const int req = part.begin_req;
    const i64 at = i64(max(part.begin_block, 0)) * BLOCK / p.page_size + threadIdx.x % 32;
    if (req >= 0 && req < p.b && at < p.max_pages_per_seq)
        prefetch_l1(p.block_table + i64(req) * p.block_table_stride_b + at);
}

// Bytes of the boxes of `groups` times 64 columns of this CTA's M tile.
PM_DEV u32 q_bytes(const DecodeParams& p, u32 groups) {
    return u32(q_boxes(p, int(opaque(blockIdx.x))) * p.q_box_rows) * (groups * 128);
}

PM_DEV void announce(u32 bar, u32 bytes) {
    if (elect_one()) mbar_expect_tx(bar, bytes);
    __syncwarp();
}

// One side of the stages, Q and KV.
template <bool ROPE, u32 SIDE, bool PAIRED, bool FEW_ROWS>
struct SideLoader {
    static constexpr u32 GROUPS = SIDE ? 3 : 4;                     // of 64 latent columns
    static constexpr u32 TILES = GROUPS + (SIDE && ROPE ? 1 : 0);   // of a KV block

    // One box of rows of the 5-D map, all of this side's latent columns, into the CTAs of `mask`.
    static PM_DEV void load(u32 dst, const TensorMap* map, u32 bar, int row, int c3, int c4, u16 mask) {
#pragma unroll
        for (u32 g = 0; g < GROUPS; ++g) {
            if (PAIRED)
                tma_multicast_5d(dst + g * SUB, map, bar, row, SIDE * 4 + g, c3, c4, mask);
            else
                tma_load_5d(dst + g * SUB, map, bar, row, SIDE * 4 + g, c3, c4);
        }
    }

    // M tile `tile` of Q into the cluster's CTA `rank`.
    static PM_DEV void load_q(const DecodeParams& p, const TensorMap* map, u32 dst, u32 bar, int req, int tile, u32 rank) {
        int row = tile * TILE_M;
#pragma unroll 1
        for (int n = q_boxes(p, tile); n > 0; --n) {
            const RowIndex r(p, row);
            if (elect_one()) load(dst, map, bar, r.h, r.s, req, u16(1u << rank));
            __syncwarp();
            row += p.q_box_rows;
            dst += u32(p.q_box_rows) * 128;
        }
    }

    static PM_DEV void run(const DecodeParams& p, const TensorMap* map, const TensorMap* map_kpe, const TensorMap* map_q,
                           u32 smem) {
        const bool mine = !PAIRED || cluster_rank() == SIDE;
        // A side that the peer loads is only announced to its barrier, when the last use has landed.
        const u32 full = smem + Smem::full + SIDE * STAGES * 8;
        const u32 free = mine ? smem + Smem::empty + SIDE * STAGES * 8 : full;
        Ring kv;
        bool first = true;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            if (!has_blocks(rec)) {
                leave_segment(rec);
                continue;
            }
            // Of a part's first segment the late loader brings Q, so that its KV is asked for at once.
            if (!FEW_ROWS && !first) {
                mbar_wait(free + kv.stage() * 8, kv.parity() ^ 1);
                announce(full + kv.stage() * 8, q_bytes(p, GROUPS));
#pragma unroll 1
                for (u32 cta = 0; mine && cta <= u32(PAIRED); ++cta)
                    load_q(p, map_q, smem + Smem::kv + kv.stage() * STAGE_BYTES + SIDE * RIGHT, full + kv.stage() * 8,
                           ld_shared(rec + SEG_REQ), blockIdx.x ^ cta, cluster_rank() ^ cta);
            }
            first = false;
            if (!FEW_ROWS) kv.advance();
#pragma unroll 1
            for (int blk = ld_shared(rec + SEG_BEGIN); blk < ld_shared(rec + SEG_END); ++blk) {
                const BoxAt at = locate(p, rec, blk, mine);
                mbar_wait(free + kv.stage() * 8, kv.parity() ^ 1);
                const u32 bar = full + kv.stage() * 8;
                u32 dst = smem + Smem::kv + kv.stage() * STAGE_BYTES + SIDE * RIGHT;
                const int rows = min(p.page_size, BLOCK);
                announce(bar, u32(at.count * rows) * (TILES * 128));
#pragma unroll 1
                for (int i = 0; mine && i < at.count; ++i) {
                    const int page = __shfl_sync(0xffffffffu, at.page, i);
                    if (elect_one()) {
                        load(dst, map, bar, at.token, blockIdx.y, page, 3);
                        if (SIDE && ROPE) {
                            const u32 rope = dst + (ROPE_TILE - RIGHT);
                            if (PAIRED)
                                tma_multicast_4d(rope, map_kpe, bar, at.token, blockIdx.y, page, 3);
                            else
                                tma_load_4d(rope, map_kpe, bar, at.token, blockIdx.y, page);
                        }
                    }
                    __syncwarp();
                    dst += u32(rows) * 128;
                }
                kv.advance();
            }
            leave_segment(rec);
        }
    }
};

template <bool ROPE, bool FEW_ROWS>
struct LateLoader {
    static PM_DEV void run(const DecodeParams& p, const TensorMap* map, const TensorMap* map_q, const TensorMap* map_q_pe,
                           u32 smem) {
        u32 item = 0;
        bool first = true;
        const u32 full = smem + Smem::full_q;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            mbar_wait(smem + Smem::done_q, (seg & 1) ^ 1);
            const bool none = !has_blocks(rec);
            const u32 stage = smem + Smem::kv, stage_full = smem + Smem::full;      // where a part's first Q goes
            const bool whole = !FEW_ROWS && first && !none;
            if (whole) {
                first = false;
                announce(stage_full, q_bytes(p, 4));
                announce(stage_full + STAGES * 8, q_bytes(p, 3));
            }
            announce(full, none ? 0 : FEW_ROWS ? u32(p.s_q * p.heads_per_kv) * 128 * (ROPE ? 9 : 8) : q_bytes(p, ROPE ? 2 : 1));
            int row = blockIdx.x * TILE_M;
            u32 at_row = 0;
#pragma unroll 1
            for (int n = none ? 0 : q_boxes(p, blockIdx.x); n > 0; --n) {
                const RowIndex r(p, row);
                const int req = ld_shared(rec + SEG_REQ);
                if (FEW_ROWS) {
                    if (elect_one()) {
#pragma unroll 1
                        for (u32 g = 0; g < 8; ++g) tma_load_5d(smem + Smem::q_rope + g * FEW_Q + at_row, map_q, full, r.h, g, r.s, req);
                        if (ROPE) tma_load_4d(smem + Smem::q_rope + 8 * FEW_Q + at_row, map_q_pe, full, r.h, r.s, req);
                    }
                } else if (elect_one()) {
#pragma unroll 1
                    for (u32 g = whole ? 0 : 7; g < 8; ++g)
                        tma_load_5d((g < 7 ? stage + g * SUB : smem + Smem::q_tail) + at_row, map_q,
                                    g < 4 ? stage_full : g < 7 ? stage_full + STAGES * 8 : full, r.h, g, r.s, req);
                    if (ROPE) tma_load_4d(smem + Smem::q_rope + at_row, map_q_pe, full, r.h, r.s, req);
                }
                __syncwarp();
                row += p.q_box_rows;
                at_row += u32(p.q_box_rows) * 128;
            }
#pragma unroll 1
            for (int blk = ld_shared(rec + SEG_BEGIN); blk < ld_shared(rec + SEG_END); ++blk) {
                const BoxAt at = locate(p, rec, blk, true);
                const u32 rows = u32(min(p.page_size, BLOCK));
                const u32 buf = item & 1, bar = smem + Smem::full_tail + buf * 8;
                mbar_wait(smem + Smem::empty_tail + buf * 8, ((item >> 1) & 1) ^ 1);
                announce(bar, u32(at.count) * rows * 128);
                u32 to = smem + Smem::tail + buf * SUB;
#pragma unroll 1
                for (int i = 0; i < at.count; ++i) {
                    const int page = __shfl_sync(0xffffffffu, at.page, i);
                    if (elect_one()) tma_load_5d(to, map, bar, at.token, 7, blockIdx.y, page);
                    __syncwarp();
                    to += rows * 128;
                }
                ++item;
            }
            leave_segment(rec);
        }
    }
};

// The same three jobs with cp.async.
template <bool ROPE>
struct GatherLoader {
    // `groups` times 64 columns of rows 0..63; lane l has the sources of rows l and l + 32, null for none.
    static PM_DEV void copy(u32 dst, const u16* row0, const u16* row1, u32 groups) {
        const u32 lane = threadIdx.x % 32;
        const u32 step = groups == 1 ? 4 : 1, unit = groups == 1 ? lane % 8 : lane;     // rows a turn
#pragma unroll 1
        for (u32 i = 0; i < TILE_M; i += step) {
            const u32 row = i + (groups == 1 ? lane / 8 : 0);
            const u64 a = __shfl_sync(0xffffffffu, reinterpret_cast<u64>(row0), row % 32);
            const u64 b = __shfl_sync(0xffffffffu, reinterpret_cast<u64>(row1), row % 32);
            const u16* src = reinterpret_cast<const u16*>(row < 32 ? a : b);
            if (src && unit < groups * 8) cp_async16(dst + unit / 8 * SUB + swizzle(row, unit % 8), src + unit * 8);
        }
    }

    // Source of a Q row of this M tile; columns from `column`, 512 being the first rope column.
    static PM_DEV const u16* q_row(const DecodeParams& p, int req, int row, int column) {
        const RowIndex r(p, blockIdx.x * TILE_M + row);
        if (!r.valid) return nullptr;
        if (column == DV)
            return reinterpret_cast<const u16*>(p.q_pe) + i64(req) * p.q_pe_stride_b + i64(r.s) * p.q_pe_stride_s +
                   i64(r.h) * p.q_pe_stride_h;
        return reinterpret_cast<const u16*>(p.q_nope) + i64(req) * p.q_nope_stride_b + i64(r.s) * p.q_nope_stride_s +
               i64(r.h) * p.q_nope_stride_h + column;
    }

    static PM_DEV const u16* kv_row(const DecodeParams& p, u32 rec, int token, int column) {
        if (token >= ld_shared(rec + SEG_LEN)) return nullptr;
        const int index = token / p.page_size;
        const i64 offset = token - index * p.page_size;
        const i64 page = checked_page(p, rec, ld_shared(rec + SEG_REQ), index);
        if (column == DV)
            return reinterpret_cast<const u16*>(p.kpe) + page * p.kpe_stride_page + offset * p.kpe_stride_token +
                   i64(blockIdx.y) * p.kpe_stride_head;
        return reinterpret_cast<const u16*>(p.ckv) + page * p.ckv_stride_page + offset * p.ckv_stride_token +
               i64(blockIdx.y) * p.ckv_stride_head + column;
    }

    // Q (blk < 0) or a block.
    static PM_DEV void copy_tile(const DecodeParams& p, u32 dst, u32 rec, int blk, int column, u32 groups) {
        const int lane = threadIdx.x % 32;
        const u16 *row0, *row1;
        if (blk < 0) {
            const int req = ld_shared(rec + SEG_REQ);
            row0 = q_row(p, req, lane, column);
            row1 = q_row(p, req, lane + 32, column);
        } else {
            row0 = kv_row(p, rec, blk * BLOCK + lane, column);
            row1 = kv_row(p, rec, blk * BLOCK + lane + 32, column);
        }
        __syncwarp();
        copy(dst, row0, row1, groups);
    }

    static PM_DEV void run_side(const DecodeParams& p, u32 smem, u32 side) {
        Ring kv;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            const int begin = ld_shared(rec + SEG_BEGIN);
            if (!has_blocks(rec)) {
                leave_segment(rec);
                continue;
            }
#pragma unroll 1
            for (int blk = begin - 1; blk < ld_shared(rec + SEG_END); ++blk) {     // Q is block begin - 1
                const u32 at = (side * STAGES + kv.stage()) * 8, stage = smem + Smem::kv + kv.stage() * STAGE_BYTES;
                mbar_wait(smem + Smem::empty + at, kv.parity() ^ 1);
                copy_tile(p, stage + side * RIGHT, rec, blk < begin ? -1 : blk, int(side) * 256, 4 - side);
                if (ROPE && side && blk >= begin) copy_tile(p, stage + ROPE_TILE, rec, blk, DV, 1);
                cp_async_arrive(smem + Smem::full + at);
                kv.advance();
            }
            leave_segment(rec);
        }
    }

    static PM_DEV void run_late(const DecodeParams& p, u32 smem) {
        u32 item = 0;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            mbar_wait(smem + Smem::done_q, (seg & 1) ^ 1);
            if (has_blocks(rec)) {
                if (ROPE) copy_tile(p, smem + Smem::q_rope, rec, -1, DV, 1);
                copy_tile(p, smem + Smem::q_tail, rec, -1, DV - 64, 1);
            }
            cp_async_arrive(smem + Smem::full_q);
#pragma unroll 1
            for (int blk = ld_shared(rec + SEG_BEGIN); blk < ld_shared(rec + SEG_END); ++blk) {
                const u32 buf = item & 1;
                mbar_wait(smem + Smem::empty_tail + buf * 8, ((item >> 1) & 1) ^ 1);
                copy_tile(p, smem + Smem::tail + buf * SUB, rec, blk, DV - 64, 1);
                cp_async_arrive(smem + Smem::full_tail + buf * 8);
                ++item;
            }
            leave_segment(rec);
        }
    }
};

}  // namespace polymla
