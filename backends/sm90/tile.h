// Tile types of the decode kernel: where things lie in shared memory, how the
// tensor cores find them, and the order in which partial results are stored.
#pragma once

#include "wgmma.h"

namespace polymla {

constexpr int TILE_M = 64;        // packed query rows (s_q x heads of one kv head) per CTA
constexpr int BLOCK = 64;         // tokens per KV block
constexpr int DV = 512;           // head_dim_v; columns of the latent part of K
constexpr int STAGES = 3;         // KV blocks in shared memory
constexpr int P_BUFS = 2;

// A sub-tile is 64 rows x 64 16-bit columns, 128 bytes a row, in the 128-byte
// swizzle that TMA writes and wgmma reads: 16-byte unit u of row r lies at u ^ (r & 7).
constexpr u32 SUB = 64 * 128;
constexpr u32 HALF = 4 * SUB;     // 256 columns: what one PV warpgroup reads
constexpr u32 STAGE_BYTES = 8 * SUB;

PM_DEV constexpr u32 swizzle(u32 row, u32 unit) { return row * 128 + ((unit ^ (row & 7)) << 4); }

// Shared-memory offsets from a 1024-byte aligned base.
constexpr u32 SEGMENTS = 8;       // segment records in flight
struct Smem {
    static constexpr u32 kv = 0;                            // [STAGES][8 sub-tiles]
    static constexpr u32 rope = kv + STAGES * STAGE_BYTES;  // one sub-tile: free again right after Q K^T
    static constexpr u32 p = rope + SUB;                    // [P_BUFS] sub-tiles
    static constexpr u32 q_rope = p + P_BUFS * SUB;         // the rope columns of Q
    static constexpr u32 q_last = q_rope + SUB;             // columns 496..512 of Q, no swizzle, 2 KiB
    static constexpr u32 scale = q_last + 2048;             // i16 [P_BUFS][64]: exponent of the factor for O
    static constexpr u32 rescale = scale + P_BUFS * 128;    // i32 [P_BUFS][4]: this warp's rows need `scale`
    static constexpr u32 limit = rescale + P_BUFS * 16;     // i32 [64]: keys each row of the segment sees
    static constexpr u32 segment = limit + 256;             // [SEGMENTS] records of 24 bytes
    static constexpr u32 walk = segment + SEGMENTS * 24;    // schedule walk
    // Row statistics, maximum then sum, at 2048 * warp in the q_rope tile: written after the
    // segment's last Q K^T, read before the P buffers are given back for the next Q.
    static constexpr u32 row_m = q_rope, row_l = q_rope + 64;
    static constexpr u32 full_l = walk + 48;                // [STAGES] columns 0..256 landed
    static constexpr u32 full_r = full_l + STAGES * 8;      // [STAGES] columns 256..512
    static constexpr u32 full_rope = full_r + STAGES * 8;
    static constexpr u32 p_full = full_rope + 8;            // [P_BUFS]
    static constexpr u32 p_empty = p_full + P_BUFS * 8;     // [P_BUFS]
    static constexpr u32 gate = p_empty + P_BUFS * 8;       // [P_BUFS]
    static constexpr u32 done_rope = gate + P_BUFS * 8;     // the QK warps have read the rope tile
    static constexpr u32 done_half = done_rope + 8;         // [2] the PV warps have read their half of the stage
    static constexpr u32 total = done_half + 16;
};
static_assert(Smem::total <= 232448, "one CTA has 227 KiB of shared memory");

// Named barriers (0 is __syncthreads).
enum Barrier { BAR_QK = 1, BAR_TAIL = 2 };

// A cursor over the ring: stage index and the parity of its current use.
struct Ring {
    u32 stage = 0, parity = 0;
    PM_DEV void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// ---- wgmma descriptors, 128-byte swizzle -----------------------------------------
// K-major (rows of 64 columns): 8-row groups lie 1024 bytes apart; a step of 16
// columns is 32 bytes further.
PM_DEV u64 desc_k_major(u32 addr) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | u64((addr & 0x3FFFF) >> 4);
}
// K-major without swizzle, one step of 16 columns: 8 x 8 core matrices of 128 contiguous
// bytes, the two of a row group adjacent.
PM_DEV u64 desc_q_last(u32 addr) {
    return (u64(256 >> 4) << 32) | (u64(128 >> 4) << 16) | u64((addr & 0x3FFFF) >> 4);
}
// N-major (V as it lies, tokens x columns): 64-column groups lie SUB bytes apart,
// 8-token groups 1024 bytes; a step of 16 tokens is 2048 bytes further.
PM_DEV u64 desc_n_major(u32 addr) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(SUB >> 4) << 16) | u64((addr & 0x3FFFF) >> 4);
}

// ---- 16-bit conversions --------------------------------------------------------------
template <class Elem>
PM_DEV u32 pack2(float lo, float hi);
template <>
PM_DEV u32 pack2<Bf16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <>
PM_DEV u32 pack2<F16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// Shared-memory loads and stores by 32-bit address.
PM_DEV int ld_shared(u32 addr) {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}
PM_DEV float ld_shared_f(u32 addr) { return __int_as_float(ld_shared(addr)); }
PM_DEV void st_shared(u32 addr, int v) { asm volatile("st.shared.s32 [%0], %1;" ::"r"(addr), "r"(v) : "memory"); }
PM_DEV void st_shared_f(u32 addr, float v) { st_shared(addr, __float_as_int(v)); }

// ---- segments ------------------------------------------------------------------------
// A segment is one request's blocks [begin, end) within a part, never empty. They lie as
// records in shared memory, because no warp has registers to spare for schedule state.
// Record: i32 req (-1 ends the part), begin, end, len, slot, bad
//   len   keys of the request;  slot  where the partial result goes, -1 for a whole request
//   bad   an invalid table entry was met
constexpr u32 SEG_BYTES = 24;
enum SegField { SEG_REQ = 0, SEG_BEGIN = 4, SEG_END = 8, SEG_LEN = 12, SEG_SLOT = 16, SEG_BAD = 20 };
PM_DEV u32 segment_record(u32 smem, u32 seg) { return smem + Smem::segment + (seg % SEGMENTS) * SEG_BYTES; }

// Moves (seg, blk) to the segment that holds it when blk lies past the end; false past the part's end.
PM_DEV bool normalise(u32 smem, u32& seg, int& blk) {
    for (;;) {
        const u32 rec = segment_record(smem, seg);
        if (ld_shared(rec + SEG_REQ) < 0) return false;
        const int end = ld_shared(rec + SEG_END);
        if (blk < end) return true;
        blk += ld_shared(segment_record(smem, ++seg) + SEG_BEGIN) - end;
    }
}

// ---- partial results -----------------------------------------------------------------------
// [slot][h_kv][m_tile][row group of 16][half of 256 columns][n8 block 0..32][lane 0..32][4] f32:
// exactly the accumulator fragments, so that a warp stores and reads 512 contiguous bytes.
// Lane (g, t) = (lane / 4, lane % 4) of block i holds row g columns 8i + 2t, +1, then row g + 8.
PM_DEV i64 partial_tile(const DecodeParams& p, int slot, int kv_head, int m_tile) {
    return (i64(slot) * p.h_kv + kv_head) * p.m_tiles + m_tile;
}

}  // namespace polymla
