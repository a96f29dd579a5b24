// Tile classes: how a block of the tuned decode kernel uses its shared memory.
//
// POLYMLA_SMEM_KIB names the class by what a block may have: 28, 64, 99, 163 or 227 KiB. A class offers tiles of some
// numbers of query rows; the host takes the smallest that holds all rows of a KV head, else the largest.
//
//   class  rows  tokens  stages  who has it
//   28     16    16      1       Moore Threads S70 (warp 128)
//   64     16    32      1       gfx906, gfx90a, gfx942, MetaX
//   99     16    32      2       sm_86, sm_89, sm_120
//          32    16      2
//   163    16    32      3       sm_80, gfx950
//          32    32      2
//          64    32      2
//   227    16    64      2       sm_90, sm_100
//          32    64      2
//          64    64      2
#pragma once

#include "common.h"

namespace polymla {

constexpr int DECODE_THREADS = 256;
constexpr int DECODE_WARPS = DECODE_THREADS / PM_WARP;

// M query rows x N tokens; S_OVERLAY: the scores lie in the half of the free stage that is loaded late; Q_COLS: columns of
// Q in shared memory at a time.
template <int DK_, int DV_, int M_, int N_, int STAGES_, bool S_OVERLAY_, int Q_COLS_>
struct Config {
    static constexpr int DK = DK_, DV = DV_, M = M_, N = N_, STAGES = STAGES_, Q_COLS = Q_COLS_;
    static constexpr bool S_OVERLAY = S_OVERLAY_;
    static_assert(DK % 64 == 0 && DV % 64 == 0 && DK % Q_COLS == 0, "rows are whole 128-byte pieces");
    static_assert(!S_OVERLAY || STAGES == 2, "the overlay needs the one free stage of two");
    static constexpr int U = DK / 8;                // 16-byte units of a KV row

    // Q K^T: warps are laid out as (M / WM) x (N / WN) x KS; KS warps share a tile of S, each adding up its part of the
    // columns, because a square warp tile reads the fewest operand bytes.
    static constexpr int WM = M < 32 ? M : 32;
    static constexpr int WN = N == 64 || (M / WM) * (N / 16) > DECODE_WARPS ? 32 : 16;
    static constexpr int TILES = (M / WM) * (N / WN);
    static constexpr int KS = DECODE_WARPS / TILES >= 4 ? 4 : DECODE_WARPS / TILES;
    static constexpr int QK_WARPS = TILES * KS;
    static constexpr int K_STEPS = Q_COLS / 16 / KS; // of one warp, in one piece of Q
    // Unrolled in halves: in one piece, ptxas moves so many loads ahead that the 64-row tile spills.
    static constexpr int K_UNROLL = K_STEPS > 9 ? K_STEPS / 2 : K_STEPS;
    static_assert(KS >= 1 && Q_COLS / 16 % KS == 0, "the columns divide among warps");

    // P V: every warp has all M rows of GROUPS x 64 columns.
    static constexpr int MT = M / 16;
    static constexpr int GROUPS = DV / 64 / DECODE_WARPS;
    static_assert(GROUPS >= 1 && DV / 64 % DECODE_WARPS == 0, "the columns of V divide among warps");

    // Softmax: TPR threads a row.
    static constexpr int TPR = DECODE_THREADS / M < N / 4 ? DECODE_THREADS / M : N / 4;
    static constexpr int PIECES = N / 4 / TPR;      // of 4 scores, of one thread
    static_assert(TPR <= 32 && M * TPR % 32 == 0, "a row's threads are neighbours among 32");

    // A stage is copied in one piece, or in two halves.
    static constexpr int HALVES = S_OVERLAY ? 2 : 1;
    static constexpr int HALF = N / HALVES;

    // Shared memory, in bytes from a 16-byte aligned base.
    static constexpr int STAGE_BYTES = N * DK * 2;
    static constexpr int S_BYTES = KS * M * N * 4;
    static constexpr int q = 0;
    static constexpr int kv = q + M * Q_COLS * 2;
    static constexpr int p = kv + STAGES * STAGE_BYTES;
    static constexpr int factor = p + M * N * 2;    // f32 [M]: what O is multiplied by before P V is added; at the end 1 / l
    static constexpr int limit = factor + M * 4;    // i32 [M]: keys a row sees; -1 invalid, -2 no such row
    static constexpr int bad = limit + M * 4;       // i32: an invalid table entry was met
    static constexpr int state = bad + 16;          // the walk over the part, and its current segment
    static constexpr int s = state + 64;
    static constexpr int total = s + (S_OVERLAY ? 0 : S_BYTES);
    static_assert(!S_OVERLAY || S_BYTES <= STAGE_BYTES / 2, "the scores fit the late half");
    static_assert(total <= POLYMLA_SMEM_KIB * 1024, "the class's shared memory");
};

template <int DK, int DV, int M>
struct ClassConfig;

#define PM_CLASS(M, N, STAGES, OVERLAY, Q_COLS)                                     \
    template <int DK, int DV>                                                       \
    struct ClassConfig<DK, DV, M> {                                                 \
        typedef Config<DK, DV, M, N, STAGES, OVERLAY, Q_COLS> type;                 \
    };
#if POLYMLA_SMEM_KIB == 28
PM_CLASS(16, 16, 1, false, (DK % 192 ? 256 : 192))
#elif POLYMLA_SMEM_KIB == 64
PM_CLASS(16, 32, 1, false, DK)
#elif POLYMLA_SMEM_KIB == 99
PM_CLASS(16, 32, 2, true, DK)
PM_CLASS(32, 16, 2, false, DK)
#elif POLYMLA_SMEM_KIB == 163
PM_CLASS(16, 32, 3, false, DK)
PM_CLASS(32, 32, 2, false, DK)
PM_CLASS(64, 32, 2, true, DK)
#elif POLYMLA_SMEM_KIB == 227
PM_CLASS(16, 64, 2, false, DK)
PM_CLASS(32, 64, 2, false, DK)
PM_CLASS(64, 64, 2, true, DK)
#else
#error "POLYMLA_SMEM_KIB must be 28, 64, 99, 163 or 227"
#endif
#undef PM_CLASS

}  // namespace polymla
