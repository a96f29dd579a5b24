// Partial results of tiles on mma.sync, as their registers hold them: three bytes a value, in whole lines of 128 bytes.
//
// A piece is 8 query rows x 32 columns of O of one split. Lane l of the 32 that own it has row l / 4, columns 2 (l % 4) and the
// next of each 8: 8 values, of which the upper 16 bits lie in a word for two (16 bytes a lane, 512 in all), and the next 8 bits
// in a word for four (8 bytes a lane) behind those. The last 8 bits of the mantissa are dropped; who reads puts the 8 before
// them in their place, so that the error, below 2^-16 of the value, has no direction, and NaN stays NaN.
#pragma once

#include "common.h"

namespace polymla {

constexpr int PIECE_ROWS = 8, PIECE_COLUMNS = 32;
constexpr int PIECE_LOW = 512, PIECE_BYTES = 768;
constexpr int PIECES_A_ROW = 512 / PIECE_COLUMNS;       // the tuned kernels' head_dim_v
constexpr int PIECE_GROUP_BYTES = PIECES_A_ROW * PIECE_BYTES;

PM_DEV int piece_groups(const DecodeParams& p) { return (p.s_q * p.heads_per_kv + PIECE_ROWS - 1) / PIECE_ROWS; }
// Where 8 rows of a slot begin, in bytes from partial_out.
PM_DEV i64 piece_group_at(const DecodeParams& p, int slot, int kv_head, int group) {
    return ((i64(slot) * p.h_kv + kv_head) * piece_groups(p) + group) * PIECE_GROUP_BYTES;
}

PM_DEV u32 pm_to_bits(float x) {
    FloatBits v;
    v.f = x;
    return v.u;
}

// A warp's 64 columns of O, from column 64 `columns` on, its rows multiplied by `factor`. All 8 rows of a piece are written,
// whether there are as many or not.
template <int MT, class Acc>
PM_DEV void store_pieces(const DecodeParams& p, int slot, int kv_head, int row0, int columns, int lane, const float (&factor)[2 * MT],
                         const Acc (&acc)[MT][4]) {
    const int rows = p.s_q * p.heads_per_kv - row0;
    char* to = reinterpret_cast<char*>(p.partial_out) + piece_group_at(p, slot, kv_head, row0 / PIECE_ROWS) +
               columns * (2 * PIECE_BYTES) + lane * 16;
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
        if (PIECE_ROWS * i >= rows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Words4 high;
            u32 low[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const float* v = acc[i / 2][half * 2 + q / 2].v + q % 2 * 4 + i % 2 * 2;
                const u32 x = pm_to_bits(v[0] * factor[i]), y = pm_to_bits(v[1] * factor[i]);
                high.w[q] = pm_bytes(x, y, 0x7632);
                low[q] = pm_bytes(x, y, 0x0051);
            }
            const Words2 packed = {{pm_bytes(low[0], low[1], 0x5410), pm_bytes(low[2], low[3], 0x5410)}};
            char* at = to + i * PIECE_GROUP_BYTES + half * PIECE_BYTES;
            *reinterpret_cast<Words4*>(at) = high;
            *reinterpret_cast<Words2*>(at + PIECE_LOW - lane * 8) = packed;
        }
    }
}

// Value i of a share, of the words that have its bits.
PM_DEV float piece_value(u32 high, u32 low, int i) {
    const u32 last = u32(4 + i % 4) * 0x11u;
    return pm_from_bits(pm_bytes(high, low, (i % 2 ? 0x3200u : 0x1000u) | last));
}

// Where a lane's share of a piece is.
struct PieceAt {
    const char *high, *low;
    PieceAt() = default;
    PM_DEV PieceAt(const DecodeParams& p, int slot, int kv_head, int group, int chunk, int lane) {
        const i64 piece = piece_group_at(p, slot, kv_head, group) + chunk * PIECE_BYTES;
        high = reinterpret_cast<const char*>(p.partial_out) + pm_settled(piece + lane * 16);
        low = reinterpret_cast<const char*>(p.partial_out) + pm_settled(piece + PIECE_LOW + lane * 8);
    }
    PM_DEV void to_half(int half) {
        high += half * 8;
        low += half * 4;
    }
    PM_DEV void next(i64 bytes) {
        high += bytes;
        low += bytes;
    }
};

// Half of a lane's share of a piece: the one that PieceAt::to_half names.
struct PieceHalf {
    Words2 high;
    u32 low;
    PM_DEV void load(const PieceAt& at) {
        high = *reinterpret_cast<const Words2*>(at.high);
        low = *reinterpret_cast<const u32*>(at.low);
    }
    PM_DEV void clear() { high.w[0] = high.w[1] = low = 0; }
    PM_DEV float value(int i) const { return piece_value(high.w[i / 2], low, i); }
};

// A lane's share of a piece.
struct PieceShare {
    Words4 high;
    Words2 low;
    PM_DEV void load(const PieceAt& at) {
        high = *reinterpret_cast<const Words4*>(at.high);
        low = *reinterpret_cast<const Words2*>(at.low);
    }
    PM_DEV void clear() { high.w[0] = high.w[1] = high.w[2] = high.w[3] = low.w[0] = low.w[1] = 0; }
    // Value i is of column i / 2 * 8 + l % 4 * 2 + i % 2 of the piece.
    PM_DEV float value(int i) const { return piece_value(high.w[i / 2], low.w[i / 4], i); }
};

}  // namespace polymla
