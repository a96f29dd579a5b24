// Filling the KV stages. There is no producer warp: registers are spoken for. The warpgroup
// that frees a piece of a stage refills it, three blocks ahead: each PV warpgroup its half
// of the 512 columns right after P V(j), the right one also the rope columns after Q K^T(j).
//
// TMA form: boxes of 64 columns x min(page_size, 64) tokens, evict-first, issued by one warp.
//
// Gather form: any page size, 16 bytes a cp.async, 128 threads a half.
//
// Table entries are checked here, before anything is read through them; an invalid one marks
// the segment (the QK warpgroup turns that into NaN) and names the request in the status word.
#pragma once

#include "tile.h"

namespace polymla {

PM_DEV void report_bad(const DecodeParams& p, int req) {
    if (p.status) atomicMin(p.status, req);
}

// Where a block lies, for TMA: found early (it reads the table), used when the stage is free.
struct BoxAt {
    int page;       // this lane's, valid in lanes below `boxes`; every lane's when pages hold 64 tokens
    u32 boxes;      // low 8 bits: pages of the block that hold keys, 0 when there is no block;
                    // above: first token within the page / 64
    PM_DEV u32 count() const { return boxes & 255; }
    PM_DEV int token() const { return int(boxes >> 8) * BLOCK; }
};

// Block `blk` counted from segment `seg`; walks on into later segments. By one whole warp.
PM_DEV BoxAt locate(const DecodeParams& p, u32 smem, u32 seg, int blk) {
    BoxAt at{0, 0};
    if (!normalise(smem, seg, blk)) return at;
    const u32 rec = segment_record(smem, seg);
    const u32 lane = threadIdx.x % 32;
    const int req = ld_shared(rec + SEG_REQ);
    int index = blk;
    at.boxes = 1;
    if (p.page_size != BLOCK) {
        if (p.page_size < BLOCK) {
            const int per_block = BLOCK / p.page_size;
            const int valid = ld_shared(rec + SEG_LEN) - blk * BLOCK;
            at.boxes = u32(valid < BLOCK ? (valid + p.page_size - 1) / p.page_size : per_block);
            index = blk * per_block + int(lane);
        } else {
            const int per_page = p.page_size / BLOCK;
            index = blk / per_page;
            at.boxes = 1u | u32(blk - index * per_page) << 8;
        }
    }
    if (lane < at.count() || p.page_size >= BLOCK) {
        at.page = __ldg(p.block_table + i64(req) * p.block_table_stride_b + index);
        if (u32(at.page) >= u32(p.num_pages)) {
            at.page = 0;
            st_shared(rec + SEG_BAD, 1);
            report_bad(p, req);
        }
    }
    __syncwarp();
    return at;
}

// There is room for one block's rope columns only, so their load starts late; the L2 prefetch
// that goes with the right half takes the trip to memory out of it.
//
// One warp of the PV warpgroup of `half`, when all warps of that are done with the stage's previous use.
template <bool ROPE>
PM_DEV void load_half_tma(const DecodeParams& p, const TensorMap* map, const TensorMap* map_kpe, u32 smem,
                          const BoxAt& at, u32 half, u32 stage) {
    const int n = int(at.count());
    if (n == 0) return;
    const u32 full = smem + (half ? Smem::full_r : Smem::full_l) + stage * 8;
    u32 dst = smem + Smem::kv + stage * STAGE_BYTES + half * HALF;
    if (p.page_size >= BLOCK) {     // one box of 64 tokens x 4 groups of 64 columns
        if (elect_one()) {
            mbar_expect_tx(full, HALF);
            tma_load_ckv(dst, map, full, at.token(), half * 4, blockIdx.y, at.page);
            if (ROPE && half) tma_prefetch_rope(map_kpe, at.token(), blockIdx.y, at.page);
        }
        __syncwarp();
        return;
    }
    if (elect_one()) mbar_expect_tx(full, u32(n * p.page_size) * (4 * 128));
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < n * 4; ++i) {   // boxes of one page x 64 columns
        const int page = __shfl_sync(0xffffffffu, at.page, i / 4);
        if (elect_one())
            tma_load_ckv(dst + u32(i / 4 * p.page_size) * 128 + i % 4 * SUB, map, full, 0, half * 4 + i % 4, blockIdx.y,
                         page);
        __syncwarp();
    }
}

PM_DEV void load_rope_tma(const DecodeParams& p, const TensorMap* map, u32 smem, const BoxAt& at) {
    const u32 rows = p.page_size < BLOCK ? u32(p.page_size) : u32(BLOCK);
    const int n = int(at.count());
    if (n == 0) return;
    if (elect_one()) mbar_expect_tx(smem + Smem::full_rope, u32(n) * rows * 128);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
        const int page = __shfl_sync(0xffffffffu, at.page, i);
        if (elect_one())
            tma_load_rope(smem + Smem::rope + u32(i) * rows * 128, map, smem + Smem::full_rope, at.token(), blockIdx.y,
                          page);
        __syncwarp();
    }
}

// Page and offset of token `tok`, checked.
PM_DEV void find_token(const DecodeParams& p, u32 rec, int tok, int& page, int& offset) {
    const int req = ld_shared(rec + SEG_REQ);
    const int index = tok / p.page_size;
    offset = tok - index * p.page_size;
    page = __ldg(p.block_table + i64(req) * p.block_table_stride_b + index);
    if (u32(page) >= u32(p.num_pages)) {
        page = 0;
        st_shared(rec + SEG_BAD, 1);
        report_bad(p, req);
    }
}

// All 128 threads of the PV warpgroup of `half`; a warp copies a row's 512 bytes at a time.
PM_DEV void load_half_gather(const DecodeParams& p, u32 smem, u32 seg, int blk, u32 half, u32 stage) {
    if (!normalise(smem, seg, blk)) return;
    const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 rec = segment_record(smem, seg);
    const int valid = ld_shared(rec + SEG_LEN) - blk * BLOCK;
    const u16* mine = nullptr;      // lane l looks up row 4 l + warp
    const int my_row = int(lane % 16 * 4 + warp);
    if (my_row < valid) {
        int page, offset;
        find_token(p, rec, blk * BLOCK + my_row, page, offset);
        mine = reinterpret_cast<const u16*>(p.ckv) + i64(page) * p.ckv_stride_page + i64(offset) * p.ckv_stride_token +
               i64(blockIdx.y) * p.ckv_stride_head + half * 256;
    }
    __syncwarp();
    const u32 dst = smem + Smem::kv + stage * STAGE_BYTES + half * HALF + (lane / 8) * SUB;
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
        const u16* src = reinterpret_cast<const u16*>(__shfl_sync(0xffffffffu, u64(mine), i));
        const u32 row = u32(4 * i) + warp;
        if (int(row) < valid) cp_async16(dst + swizzle(row, lane % 8), src + lane * 8);
    }
    cp_async_arrive(smem + (half ? Smem::full_r : Smem::full_l) + stage * 8);
}

// All 128 threads of the QK warpgroup.
PM_DEV void load_rope_gather(const DecodeParams& p, u32 smem, u32 seg, int blk) {
    const u32 tid = threadIdx.x % 128;
    const u32 rec = segment_record(smem, seg);
    const int valid = ld_shared(rec + SEG_LEN) - blk * BLOCK;
#pragma unroll 1
    for (u32 row = tid / 8; row < BLOCK; row += 16) {
        if (int(row) >= valid) break;
        int page, offset;
        find_token(p, rec, blk * BLOCK + int(row), page, offset);
        const u16* src = reinterpret_cast<const u16*>(p.kpe) + i64(page) * p.kpe_stride_page +
                         i64(offset) * p.kpe_stride_token + i64(blockIdx.y) * p.kpe_stride_head;
        cp_async16(smem + Smem::rope + swizzle(row, tid % 8), src + tid % 8 * 8);
    }
    cp_async_arrive(smem + Smem::full_rope);
}

}  // namespace polymla
