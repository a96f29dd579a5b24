// Tile types of the decode kernel: where things lie in shared memory, how the
// tensor cores find them, and the order in which partial results are stored.
#pragma once

#include "wgmma.h"

namespace polymla {

constexpr int TILE_M = 64;        // packed query rows (s_q x heads of one kv head) per CTA
constexpr int BLOCK = 64;         // tokens per KV block
constexpr int DV = 512;           // head_dim_v; columns of the latent part of K
constexpr int STAGES = 3;         // KV blocks in shared memory

constexpr float M_INIT = -1e30f;  // below any scaled logit, finite so that differences are
constexpr float LN2 = 0.6931471805599453f;

// A sub-tile is 64 rows x 64 16-bit columns, 128 bytes a row, in the 128-byte
// swizzle that TMA writes and wgmma reads: 16-byte unit u of row r lies at u ^ (r & 7).
constexpr u32 SUB = 64 * 128;
constexpr u32 STAGE_BYTES = 8 * SUB;    // columns 0..448, then the rope columns
constexpr u32 RIGHT = 4 * SUB;          // within a stage: column 256
constexpr u32 ROPE_TILE = 7 * SUB;      // within a stage: the rope columns; after Q K^T, P

PM_DEV constexpr u32 swizzle(u32 row, u32 unit) { return row * 128 + ((unit ^ (row & 7)) << 4); }

// Shared-memory offsets from a 1024-byte aligned base.
constexpr u32 SEGMENTS = 4;       // segment records in flight
struct Smem {
    static constexpr u32 kv = 0;                            // [STAGES][8 sub-tiles]
    static constexpr u32 tail = kv + STAGES * STAGE_BYTES;  // [2] columns 448..512
    static constexpr u32 q_rope = tail + 2 * SUB;           // the rope columns of Q
    static constexpr u32 q_tail = q_rope + SUB;             // columns 448..512 of Q
    static constexpr u32 q_last = q_tail + SUB;             // columns 432..448 of Q, no swizzle, 2 KiB
    static constexpr u32 scale = q_last + 2048;             // i8 [2][64]: exponent of the factor for O
    static constexpr u32 rescale = scale + 128;             // i8 [2][4]: this warp's rows need `scale`
    static constexpr u32 limit = rescale + 8;               // i32 [64]: keys each row of the segment sees
    static constexpr u32 inv = limit + 256;                 // f32 [64]: 1 / row sum, at the end of a segment
    static constexpr u32 segment = inv + 256;               // [SEGMENTS] records of 40 bytes, below
    static constexpr u32 part = segment + SEGMENTS * 40;    // i32 [6]: the walker's copy of its PartMeta
    // Barriers. `full`: bytes have landed; `empty`: everyone is done with them.
    static constexpr u32 full = part + 24;                  // [2][STAGES] columns 0..256; 256..448 and rope
    static constexpr u32 empty = full + 2 * STAGES * 8;     // [2][STAGES] (in both CTAs of a pair)
    static constexpr u32 full_tail = empty + 2 * STAGES * 8;    // [2]
    static constexpr u32 empty_tail = full_tail + 16;       // [2] and P V is under way in both halves
    static constexpr u32 full_q = empty_tail + 16;          // Q's rope and tail tiles
    static constexpr u32 done_q = full_q + 8;               // the segment's last Q K^T has read them
    static constexpr u32 p_full = done_q + 8;               // [2] P is in shared memory
    static constexpr u32 gate = p_full + 16;                // [2] P V may start
    static constexpr u32 inv_full = gate + 16;              // `inv` is written
    static constexpr u32 inv_empty = inv_full + 8;          // and read
    static constexpr u32 total = inv_empty + 8;
};
static_assert(Smem::full % 8 == 0 && Smem::segment % 8 == 0, "mbarriers are 8 bytes");
static_assert(Smem::total <= 232448, "one CTA has 227 KiB of shared memory");

// The few-rows kernel: Q is nine tiles of 16 rows x 64 columns from q_rope on (the rope columns last), limits and factors are of 16 rows.
constexpr int FEW = 16;             // most rows
constexpr u32 FEW_Q = FEW * 128;    // a tile
struct SmemFew {
    static constexpr u32 warps = Smem::limit + FEW * 4;     // f32 [4][16]: something of each QK warp for each row
    static constexpr u32 inv = Smem::inv + 192;             // f32 [16]
};
static_assert(9 * FEW_Q == Smem::scale - Smem::q_rope && SmemFew::warps + 4 * FEW * 4 <= SmemFew::inv, "places");

// Named barriers (0 is __syncthreads).
enum Barrier { BAR_QK = 1, BAR_TAIL = 2 };   // BAR_TAIL + half

// A cursor over the ring of stages, in one register. Q of a segment takes one turn, then each of its KV blocks.
struct Ring {
    u32 turn = 0;       // 0..2 with parity 0, then 3..5 with parity 1
    PM_DEV u32 stage() const { return turn < STAGES ? turn : turn - STAGES; }
    PM_DEV u32 parity() const { return turn >= STAGES; }
    PM_DEV void advance() { turn = turn == 2 * STAGES - 1 ? 0 : turn + 1; }
    PM_DEV void retreat() { turn = turn == 0 ? 2 * STAGES - 1 : turn - 1; }
};

// ---- wgmma descriptors, 128-byte swizzle -----------------------------------------
// K-major (rows of 64 columns): 8-row groups lie 1024 bytes apart; a step of 16
// columns is 32 bytes further.
PM_DEV Desc desc_k_major(u32 addr) { return Desc{1u << 16 | (addr & 0x3FFFF) >> 4, 1u << 30 | 1024 >> 4}; }
// K-major without swizzle, one step of 16 columns: 8 x 8 core matrices of 128 contiguous
// bytes, the two of a row group adjacent.
PM_DEV Desc desc_q_last(u32 addr) { return Desc{(128 >> 4) << 16 | (addr & 0x3FFFF) >> 4, 256 >> 4}; }
// N-major (V as it lies, tokens x columns): the second 64-column group lies `apart` bytes behind
// the first, 8-token groups 1024 bytes; a step of 16 tokens is 2048 bytes further.
PM_DEV Desc desc_n_major(u32 addr, u32 apart) { return Desc{(apart >> 4) << 16 | (addr & 0x3FFFF) >> 4, 1u << 30 | 1024 >> 4}; }

// The query position that packed row `row` belongs to; the rest of the division is its head.
PM_DEV int query_of(const DecodeParams& p, int row) { return p.heads_magic ? int(__umulhi(u32(row), p.heads_magic)) : row; }

// ---- arrivals of whole warps ----------------------------------------------------------
// After __syncwarp one lane arrives for its warp. racecheck does not follow that; with POLYMLA_ARRIVE_ALL, for it alone, all lanes do.
#ifdef POLYMLA_ARRIVE_ALL
constexpr u32 ARRIVALS = 32;
#else
constexpr u32 ARRIVALS = 1;
#endif
PM_DEV bool arrives(u32 lane) { return ARRIVALS == 32 || lane == 0; }
// What a barrier counts, of `n`: loaders that arrive alone (1) or all (32), or so many warps.
PM_DEV u32 arrivals(u32 n) { return n < 4 || n == 32 ? n : n * ARRIVALS; }

// ---- segments ------------------------------------------------------------------------
// A segment is one request's blocks [begin, end) within a part. The walker writes them as records
// into a ring in shared memory; each role reads what it needs. Without blocks nothing is loaded or multiplied, but
// results are written.
// Record: i32 req (-1 ends the part), begin, end, len, slot, bad; then two mbarriers
//   len   keys of the request;  slot  where the partial result goes, -1 for a whole request
//   bad   the length is invalid, or an invalid table entry was met
//   full  it is written;  empty  all warps are done with it: each role goes through segments without blocks at its own pace, so
//         that only a count of all of them says when its place is free
constexpr u32 SEG_BYTES = 40;
constexpr u32 SEG_READERS = 15;     // all warps but the walker's
enum SegField { SEG_REQ = 0, SEG_BEGIN = 4, SEG_END = 8, SEG_LEN = 12, SEG_SLOT = 16, SEG_BAD = 20, SEG_FULL = 24, SEG_EMPTY = 32 };
static_assert(Smem::part == Smem::segment + SEGMENTS * SEG_BYTES, "records");
PM_DEV u32 segment_record(u32 smem, u32 seg) { return smem + Smem::segment + (seg % SEGMENTS) * SEG_BYTES; }

PM_DEV bool has_blocks(u32 rec) { return ld_shared(rec + SEG_BEGIN) < ld_shared(rec + SEG_END); }

// Waits for record `seg`; false past the part's last segment.
PM_DEV bool wait_segment(u32 smem, u32 seg) {
    const u32 rec = segment_record(smem, seg);
    mbar_wait(rec + SEG_FULL, seg / SEGMENTS & 1);
    return ld_shared(rec + SEG_REQ) >= 0;
}

// This warp will not read or mark the record any more.
PM_DEV void leave_segment(u32 rec) {
    __syncwarp();
    if (arrives(opaque(threadIdx.x) % 32)) mbar_arrive(rec + SEG_EMPTY);
}

// ---- partial results -----------------------------------------------------------------------
// O of a piece, as accumulated: not divided by its sum. Of each f32 the lowest byte is dropped: 2^-15 of every value, whatever its
// size, for a quarter less to write and read again, which is what small batches wait for. Of four values of a row, the bytes of
// the last take the place of those dropped in the others.
//
// [slot][h_kv][m_tile][row group of 16][chunk of 16 columns, 0..32][lane 0..32]: accumulator fragments, eight values a lane.
// Lane (g, t) = (lane / 4, lane % 4) has of the chunk's first n8 block row g, columns 2t, 2t + 1, then row g + 8; then the same of
// the second. Two arrays, so that a warp stores and reads whole lines: 16 bytes a lane with the first four words, and at
// PARTIAL_REST 8 bytes a lane with the other two.
//
// Beside it [slot][h_kv][m_tile][row group][g 0..8][4] f32: the maximum that the weights of row g are relative to, and their
// sum; then those of row g + 8. A logarithm of the sum would not do instead: with logits of thousands f32 has too few bits for it.
constexpr int CHUNKS = 32;                              // in a row group
constexpr int CHUNK_LANES = 4 * CHUNKS * 32;            // in a tile
constexpr int PARTIAL_REST = CHUNK_LANES * 16;          // within a tile
constexpr int PARTIAL_BYTES = CHUNK_LANES * 24;         // of a tile
constexpr int PARTIAL_ROWS = TILE_M * 2;                // floats of a tile

// The lowest byte of each is some other's: less than was dropped. What is not finite becomes NaN, as it would on division.
PM_DEV void partial_unpack(float (&v)[8], const uint4& first, const uint2& rest) {
    const u32 w[6] = {first.x, first.y, first.z, first.w, rest.x, rest.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int k = 0; k < 3; ++k) v[2 * i + k + (k & 2)] = __uint_as_float(w[3 * i + k]);
        v[2 * i + 5] = __uint_as_float(__byte_perm(__byte_perm(w[3 * i], w[3 * i + 1], 0x0400), w[3 * i + 2], 0x4210));
    }
}
PM_DEV i64 partial_tile(const DecodeParams& p, int slot, int kv_head, int m_tile) {
    return (i64(slot) * p.h_kv + kv_head) * p.m_tiles + m_tile;
}

}  // namespace polymla
