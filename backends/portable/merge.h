// Merges the pieces (pieces.h) of split requests, in split order, so that the bits never depend on timing.
//
// Unit      a piece of every split: 8 query rows x 32 columns, by `combine_ways` warps: way w adds up splits w, w + ways, ...
// Roles     a block of 16 warps has 16 / ways units of the same 8 rows at a time. First each of eight warps weighs the splits of
//           one of these rows, a split a lane; then all add up what they have loaded meanwhile; way 0 adds the ways up.
// Pipeline  8 splits' loads a warp are under way while the weights are worked out. Nothing is worked out between the end of the
//           decode kernel and the first load that could be before; from there on instructions are what the time goes into, so
//           there are forms of it for 32 and more splits to weigh (merge_many). Not for 64, nor merge_few's for 2: it takes longer
//           to fetch the instructions of a larger kernel than they save.
//           A request of up to 16 splits takes no such turns: merge_few and merge_half, where warps share nothing.
// Grid      b * ceil(turns of a request / combine_units) blocks of 512 threads, one a multiprocessor; a turn is such a set of
//           units. A batch-invariant run fixes the ways.
#pragma once

#include "pieces.h"

namespace polymla {

constexpr int MERGE_THREADS = 512;
constexpr int MERGE_WARPS = MERGE_THREADS / 32;
constexpr int MERGE_AT_ONCE = 8;        // splits that a warp loads together
constexpr int MERGE_HALF = 16;          // splits of which a lane adds up half of its share
constexpr int MERGE_WEIGHTS = 160;      // splits that are weighed together at most; with 132 multiprocessors no request has more
static_assert(MERGE_WARPS >= PIECE_ROWS, "a warp weighs the splits of a row");

struct MergeSmem {
    Floats4 sums[MERGE_WARPS][2][32];
    float weights[MERGE_WEIGHTS][PIECE_ROWS + 1];     // by split and row; padded, for a warp writes a column
};

// Where the merged row of a lane begins, in elements of out.
PM_DEV i64 merged_row(const DecodeParams& p, int req, int kv_head, int group) {
    return pm_settled(out_offset(p, req, Row(p, kv_head, group * PIECE_ROWS + pm_thread() % 32 / 4)));
}
// A lane's share of the merged piece, as PieceShare has it, or half of it, from column `col` of its row on.
template <class Elem, int VALUES>
PM_DEV void store_merged(const DecodeParams& p, i64 at, int col, const float (&acc)[VALUES]) {
    u16* to = static_cast<u16*>(p.out) + at;
    u32 word[VALUES / 2];
#pragma unroll
    for (int q = 0; q < VALUES / 2; ++q) word[q] = Elem::pack(acc[2 * q], acc[2 * q + 1]);
    if (p.flags & FLAG_OUT_VEC) {
#pragma unroll
        for (int q = 0; q < VALUES / 2; ++q) *reinterpret_cast<u32*>(to + col + q * 8) = word[q];
        return;
    }
#pragma unroll
    for (int q = 0; q < VALUES / 2; ++q) {
        to[i64(col + q * 8) * p.out_stride_d] = u16(word[q]);
        to[i64(col + q * 8 + 1) * p.out_stride_d] = u16(word[q] >> 16);
    }
}

// What the weights of a row's splits are relative to, and their sum.
struct Weighed {
    float from_top, sum;
    PM_DEV float inverse() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }
    PM_DEV float lse() const { return sum == 0.0f ? -pm_inf() : from_top + pm_log2(sum); }
};
// Makes weights of a row's logarithms, by one lane.
template <int N>
PM_DEV Weighed weigh(float (&x)[N]) {
    float top = x[0], sum = 0.0f;
#pragma unroll
    for (int i = 1; i < N; ++i) top = pm_max(top, x[i]);
    const float from_top = top == -pm_inf() ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] = pm_exp2(x[i] - from_top);
    return {from_top, sum};
}
// Adds the weighted shares of all splits.
template <class Share, int VALUES, int N>
PM_DEV void add_up(float (&acc)[VALUES], const float (&weights)[N], float inverse, const Share (&share)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int e = 0; e < VALUES; ++e) acc[e] += weights[i] * inverse * share[i].value(e);
}

// Pieces [begin, end) of a request with at most N splits, by warps that need nothing of each other: each lane weighs its row.
// 8 / N pieces of a warp are on their way at a time.
template <class Elem, int N>
PM_DEV void merge_few(const DecodeParams& p, int req, int first, int n, int begin, int end) {
    constexpr int AT_ONCE = MERGE_AT_ONCE / N;
    const int rows = p.s_q * p.heads_per_kv, groups = piece_groups(p);
    const int warp = pm_thread() / 32, lane = pm_thread() % 32;
    const i64 slot_bytes = piece_group_at(p, 1, 0, 0), lse_stride = i64(p.h_kv) * rows;
    bool waited = false;
#pragma unroll 1
    for (int piece0 = begin + warp; !waited || piece0 < end; piece0 += AT_ONCE * MERGE_WARPS) {
        PieceShare share[AT_ONCE][N];
        PieceAt from[AT_ONCE];
        const float* lse[AT_ONCE];
        i64 to[AT_ONCE];
        bool is_row[AT_ONCE];
        float x[AT_ONCE][N];
        int kv_head[AT_ONCE], group[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int piece = piece0 + k * MERGE_WARPS, index = piece / PIECES_A_ROW;
            kv_head[k] = p.h_kv == 1 ? 0 : index / groups;
            group[k] = index - kv_head[k] * groups;
            from[k] = PieceAt(p, first, kv_head[k], group[k], piece % PIECES_A_ROW, lane);
            lse[k] = p.partial_lse + pm_settled(partial_row(p, first, kv_head[k], group[k] * PIECE_ROWS + lane / 4));
            to[k] = merged_row(p, req, kv_head[k], group[k]);
            is_row[k] = group[k] * PIECE_ROWS + lane / 4 < rows;
        }
        if (!waited) pm_grid_wait();
        waited = true;
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const bool there = piece0 + k * MERGE_WARPS < end && i < n;
                x[k][i] = there && is_row[k] ? *lse[k] : -pm_inf();
                if (there)
                    share[k][i].load(from[k]);
                else
                    share[k][i].clear();
                lse[k] += lse_stride;
                from[k].next(slot_bytes);
            }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int piece = piece0 + k * MERGE_WARPS, row = group[k] * PIECE_ROWS + lane / 4;
            if (piece >= end) return;
            const Weighed row_sum = weigh(x[k]);
            const float inverse = row_sum.inverse();
            if (piece % PIECES_A_ROW == 0 && lane % 4 == 0 && is_row[k]) store_lse(p, req, Row(p, kv_head[k], row), row_sum.lse());
            float acc[8] = {};
            add_up(acc, x[k], inverse, share[k]);
            if (is_row[k]) store_merged<Elem>(p, to[k], piece % PIECES_A_ROW * PIECE_COLUMNS + lane % 4 * 2, acc);
        }
    }
}

// The same where there are more: a warp has four rows of a piece, two lanes a share, so that a lane has registers for all of its
// splits.
template <class Elem>
PM_DEV void merge_half(const DecodeParams& p, int req, int first, int n, int begin, int end) {
    const int rows = p.s_q * p.heads_per_kv, groups = piece_groups(p);
    const int warp = pm_thread() / 32, lane = pm_thread() % 32, half = lane % 2;
    const i64 slot_bytes = piece_group_at(p, 1, 0, 0), lse_stride = i64(p.h_kv) * rows;
    bool waited = false;
#pragma unroll 1
    for (int unit = 2 * begin + warp; !waited || unit < 2 * end; unit += MERGE_WARPS) {
        const int piece = unit / 2, owner = unit % 2 * 16 + lane / 2, index = piece / PIECES_A_ROW;
        const int kv_head = p.h_kv == 1 ? 0 : index / groups, group = index - kv_head * groups, row = group * PIECE_ROWS + owner / 4;
        PieceAt from(p, first, kv_head, group, piece % PIECES_A_ROW, owner);
        from.to_half(half);
        const float* lse = p.partial_lse + pm_settled(partial_row(p, first, kv_head, row));
        const i64 to = pm_settled(out_offset(p, req, Row(p, kv_head, row)));
        const bool is_row = row < rows;
        if (!waited) pm_grid_wait();
        waited = true;
        if (unit >= 2 * end) return;
        PieceHalf share[MERGE_HALF];
        float x[MERGE_HALF];
#pragma unroll
        for (int i = 0; i < MERGE_HALF; ++i) {
            x[i] = i < n && is_row ? *lse : -pm_inf();
            if (i < n)
                share[i].load(from);
            else
                share[i].clear();
            lse += lse_stride;
            from.next(slot_bytes);
        }
        const Weighed row_sum = weigh(x);
        const float inverse = row_sum.inverse();
        if (piece % PIECES_A_ROW == 0 && lane % 8 == 0 && is_row) store_lse(p, req, Row(p, kv_head, row), row_sum.lse());
        float acc[4] = {};
        add_up(acc, x, inverse, share);
        if (is_row) store_merged<Elem>(p, to, piece % PIECES_A_ROW * PIECE_COLUMNS + owner % 4 * 2 + half * 16, acc);
    }
}

// Turns [turn, turn_end) of a request whose splits are weighed 32 WEIGHED at a time; that is all of them, unless WEIGHED is 1.
// `lost`: some splits had nowhere to go, so the request is NaN.
template <class Elem, int WEIGHED>
PM_DEV void merge_many(const DecodeParams& p, MergeSmem& smem, int req, int first, int n, bool lost, u32 turn, u32 turn_end) {
    constexpr int ROUND = 32 * WEIGHED;
    constexpr bool ROUNDS = WEIGHED == 1;
    static_assert(ROUND <= MERGE_WEIGHTS, "room for them");
    const int rows = p.s_q * p.heads_per_kv, groups = piece_groups(p);
    const int ways = p.combine_ways, together = MERGE_WARPS / ways;
    const u32 turns_a_group = u32(PIECES_A_ROW / together);
    const int warp = pm_thread() / 32, lane = pm_thread() % 32;
    const int way = warp % ways;
    const i64 slot_bytes = piece_group_at(p, 1, 0, 0), step = ways * slot_bytes, lse_stride = i64(p.h_kv) * rows;
    bool waited = false;
#pragma unroll 1
    for (; turn < turn_end; ++turn) {
        const int index = int(turn / turns_a_group), kv_head = p.h_kv == 1 ? 0 : index / groups, group = index - kv_head * groups;
        const int chunk = int(turn - u32(index) * turns_a_group) * together + warp / ways;
        PieceAt from(p, first, kv_head, group, chunk, lane);
        from.next(way * slot_bytes);
        // One of the first warps has a row to weigh.
        const int my_row = group * PIECE_ROWS + warp;
        const bool weighs = warp < PIECE_ROWS;
        const float* lse = p.partial_lse + pm_settled(partial_row(p, first, kv_head, my_row) + lane * lse_stride);
        const i64 to = merged_row(p, req, kv_head, group);
        if (!waited) pm_grid_wait();
        waited = true;

        float x[WEIGHED];
        auto read = [&](int round) {
#pragma unroll
            for (int k = 0; k < WEIGHED; ++k) {
                const int i = round + k * 32;
                x[k] = i + lane < n && my_row < rows ? lse[i * lse_stride] : -pm_inf();
            }
        };
        PieceShare share[MERGE_AT_ONCE];
        // This way's splits from i on, below `end`.
        auto load = [&](int i, int end) {
#pragma unroll
            for (int k = 0; k < MERGE_AT_ONCE; ++k, i += ways) {
                if (i >= end) break;
                share[k].load(from);
                from.next(step);
            }
        };
        if (weighs) read(0);
        load(way, pm_min(n, ROUND));
        float from_top = 0.0f, inverse = 0.0f;
        if (weighs) {
            float top = -pm_inf(), sum = 0.0f;
#pragma unroll 1
            for (int round = 0; round == 0 || (ROUNDS && round < n); round += ROUND) {
                if (round > 0) read(round);
                const float before = from_top;
#pragma unroll
                for (int k = 0; k < WEIGHED; ++k) top = pm_max(x[k], top);      // passes over NaN, which the sum does not
#pragma unroll
                for (int lanes = 1; lanes < 32; lanes *= 2) top = pm_max(pm_shfl_xor(top, lanes), top);
                from_top = top == -pm_inf() ? 0.0f : top;
                sum = round == 0 ? 0.0f : sum * pm_exp2(before - from_top);
#pragma unroll
                for (int k = 0; k < WEIGHED; ++k) sum += pm_exp2(x[k] - from_top);
            }
#pragma unroll
            for (int lanes = 1; lanes < 32; lanes *= 2) sum += pm_shfl_xor(sum, lanes);
            inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
            if (lane == 0 && my_row < rows && turn == u32(index) * turns_a_group)
                store_lse(p, req, Row(p, kv_head, my_row),
                          lost ? pm_nan() : sum == 0.0f ? -pm_inf() : from_top + pm_log2(sum));
        }

        float acc[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[e] = lost ? pm_nan() : 0.0f;
#pragma unroll 1
        for (int round = 0; round == 0 || (ROUNDS && round < n); round += ROUND) {
            const int end = pm_min(n - round, ROUND);
            if (weighs) {
                if (ROUNDS && n > ROUND) read(round);
#pragma unroll
                for (int k = 0; k < WEIGHED; ++k) smem.weights[k * 32 + lane][warp] = pm_exp2(x[k] - from_top) * inverse;
            }
            pm_sync();
#pragma unroll 1
            for (int i0 = way; i0 < end; i0 += MERGE_AT_ONCE * ways) {
                if (round + i0 > way) load(i0, end);
#pragma unroll
                for (int k = 0; k < MERGE_AT_ONCE; ++k) {
                    if (i0 + k * ways >= end) break;
                    const float w = smem.weights[i0 + k * ways][lane / 4];
#pragma unroll
                    for (int e = 0; e < 8; ++e) acc[e] += w * share[k].value(e);
                }
            }
            if (ROUNDS || turn + 1 < turn_end) pm_sync();   // the weights are read
        }

        if (ways > 1) {
            smem.sums[warp][0][lane] = Floats4{{acc[0], acc[1], acc[2], acc[3]}};
            smem.sums[warp][1][lane] = Floats4{{acc[4], acc[5], acc[6], acc[7]}};
            pm_sync();
            if (way == 0)
#pragma unroll 1
                for (int k = 1; k < ways; k += 2) {
                    const bool both = k + 1 < ways;     // two at a time, but for the last
                    const int next = both ? k + 1 : k;
                    const Floats4 a = smem.sums[warp + k][0][lane], b = smem.sums[warp + k][1][lane];
                    const Floats4 c = smem.sums[warp + next][0][lane], d = smem.sums[warp + next][1][lane];
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        acc[e] += a.f[e] + (both ? c.f[e] : 0.0f);
                        acc[4 + e] += b.f[e] + (both ? d.f[e] : 0.0f);
                    }
                }
        }
        if (way == 0 && group * PIECE_ROWS + lane / 4 < rows) store_merged<Elem>(p, to, chunk * PIECE_COLUMNS + lane % 4 * 2, acc);
        if (ways > 1 && turn + 1 < turn_end) pm_sync();     // the sums are read
    }
}

template <class Elem>
PM_DEV void merge(const DecodeParams& p, char* smem_base) {
    MergeSmem& smem = *reinterpret_cast<MergeSmem*>(smem_base);
    const int together = MERGE_WARPS / p.combine_ways;
    const u32 turns = u32(p.h_kv * piece_groups(p)) * u32(PIECES_A_ROW / together), units = u32(p.combine_units);
    const u32 blocks = (turns + units - 1) / units;
    const int req = int(u32(pm_block()) / blocks);
    const u32 turn = (u32(pm_block()) - u32(req) * blocks) * units, turn_end = turns - turn < units ? turns : turn + units;
    // The plan is older than the kernel before this one, which waited for it.
    const int first = p.num_splits[req], all = p.num_splits[req + 1] - first;
    const bool lost = i64(first) + all > p.slots;
    const int n = lost ? 0 : all;
    if (all <= 1) {
        pm_grid_wait();                 // the next kernel must not overtake the one before this
    } else if (n <= MERGE_AT_ONCE && !lost) {
        const int begin = int(turn) * together, end = int(turn_end) * together;
        if (n <= 4)
            merge_few<Elem, 4>(p, req, first, n, begin, end);
        else
            merge_few<Elem, 8>(p, req, first, n, begin, end);
    } else if (n <= MERGE_HALF && !lost) {
        merge_half<Elem>(p, req, first, n, int(turn) * together, int(turn_end) * together);
    } else if (n > 32 && n <= MERGE_WEIGHTS) {
        merge_many<Elem, MERGE_WEIGHTS / 32>(p, smem, req, first, n, false, turn, turn_end);
    } else {
        merge_many<Elem, 1>(p, smem, req, lost ? 0 : first, n, lost, turn, turn_end);
    }
}

}  // namespace polymla
