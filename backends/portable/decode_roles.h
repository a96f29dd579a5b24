// The 64-row tile where the dialect has barriers in shared memory and asynchronous copies that arrive on them (PM_ROLES):
// copies, matrix work of Q K^T and of P V under way at once, on different warps.
//
// Tile      64 packed query rows x 64 tokens; O is 64 x head_dim_v f32 in the registers of the P V warps.
// Roles     8 warps own 64 columns of O each; 4 warps own 32 x 32 scores each, over all columns, so that scores never leave
//           registers: softmax, P; 4 warps copy Q and KV. The score warps are two groups: one has the first 32 tokens of
//           every tile, the other the last.
// Pipeline  2 stages of KV in two halves; a half is a step, and the groups take turns, so that the softmax of one runs beside
//           the matrix work of the other, and P V beside both:
//
//   copies     | (0) (1) (2) (3)      | (4)          | (5)        | ...
//   group 0    | Q K^T (0)   softmax (0) | Q K^T (2)   softmax (2) | ...
//   group 1    | Q K^T (1)         softmax (1) | Q K^T (3)   softmax (3) | ...
//   P V warps                     | P V (0) | P V (1) | P V (2) ...
//
//           A row's running maximum goes from step to step, hence from group to group; its sum is added up in the end. P
//           has a half for each group. What P V has read is free: the half of P, and the half of KV for step h + 4. Copies run
//           ahead into the part's next segment.
// Shared    As the uniform kernel's, but no room for scores: config.h. Everything that one role tells another is ordered by a
//           barrier in shared memory.
//
// Grid      As the uniform kernel's; 512 threads, of whom the P V warps take registers from the others.
//
// Rows must be aligned (FLAG_Q_VEC16, FLAG_KV_VEC16, FLAG_OUT_VEC); what is not is the uniform kernel's.
#pragma once

#include "decode.h"

namespace polymla {

template <class Elem, class Tile, class C>
struct RoleDecoder {
    typedef typename Tile::C Acc;
    typedef Decoder<Elem, Tile, C> Uniform;
    static_assert(C::M == 64 && C::N == 64 && C::STAGES == 2 && C::HALVES == 2 && PM_WARP == 32 && C::GROUPS == 1, "one shape");

    // Rows of scores of a warp, and of a thread.
    static constexpr int WM = 32, MT = WM / 16, R = 2 * MT, PAIRS = C::M / WM;
    static constexpr int PV_THREADS = DECODE_THREADS, QK_THREADS = PAIRS * 64, COPY_THREADS = 128;
    static constexpr int QK_FIRST = PV_THREADS, COPY_FIRST = QK_FIRST + QK_THREADS, THREADS = COPY_FIRST + COPY_THREADS;
    static constexpr int STEPS = C::DK / 16, UNROLL = STEPS % 12 == 0 ? 12 : 8;
    static_assert(STEPS % UNROLL == 0 && UNROLL % 4 == 0, "whole 128-byte pieces of rows");
    typedef KvLoader<C, COPY_THREADS> Loader;

    // Barriers in shared memory. The n-th use of one waits for its n-th phase, which nobody may then be ahead of, neither by
    // waiting nor by arriving. What a role may run ahead with, by a segment, has one for each of the two slots: the copying
    // warps do, and the second group in segments without keys.
    enum Barrier {
        SEGMENT,                // a slot says what the next segment is
        LOADED = SEGMENT + 2,   // all copies of its segment are under way
        STORED = LOADED + 2,    // and O is stored: nobody wants the slot any more
        ROWS = STORED + 2,      // a segment's rows are finished
        Q_FULL = ROWS + 2,      // Q has landed; for every segment with keys
        Q_EMPTY,                // and is read
        FULL,                   // a half stage has landed: stage * 2 + half
        EMPTY = FULL + 4,       // and it, and the half of P with it, is read
        P_FULL = EMPTY + 4,     // P and its factors are there: group
        MAXIMA = P_FULL + 2,    // for a group's 32 rows: 2 * pair + group
        SUMS = MAXIMA + 2 * PAIRS,
        TURN = SUMS + PAIRS,    // a score warp is through with a tile's matrix work: the P V warps beside it may have theirs
        BARRIERS = TURN + QK_THREADS / 32
    };
    static PM_DEV char* barrier(char* smem, int which) { return smem + C::barriers + which * 8; }
    static PM_DEV int arrivals(int which) {
        return which < LOADED                        ? 1
               : which < STORED                      ? COPY_THREADS
               : which < ROWS                        ? PV_THREADS
               : which < Q_FULL || which == Q_EMPTY  ? QK_THREADS
               : which < EMPTY                       ? COPY_THREADS
               : which < P_FULL                      ? PV_THREADS
               : which < MAXIMA                      ? PAIRS * 32
               : which < TURN                        ? 32
                                                     : 1;
    }
    static PM_DEV void wait(char* smem, int which, u32 phase) { pm_mbar_wait(barrier(smem, which), phase & 1); }
    static PM_DEV void wait_slot(char* smem, int which, u32 turn) { wait(smem, which + int(turn & 1), turn >> 1); }
    // What this thread did so far is seen by who waits. (One lane for its warp, after a barrier of the warp, is no faster, and
    // compute-sanitizer does not understand it.)
    static PM_DEV void arrive(char* smem, int which) { pm_mbar_arrive(barrier(smem, which)); }
    // Behind them: the walk over the part, of one thread. Registers are dear to the copying warps.
    static constexpr int WALK = C::barriers + BARRIERS * 8;
    static_assert(WALK + int(sizeof(SegmentWalk)) <= C::roles_total, "the room that config.h gives");

    // A segment, as the copying warps tell it to the others. Two slots: the copies may be a segment ahead.
    struct Slot {
        Segment segment;
        int more, bad;
    };
    static PM_DEV Slot& slot_of(char* smem, u32 turn) { return reinterpret_cast<Slot*>(smem + C::state)[turn & 1]; }
    struct Work {
        int first, last;        // tokens
        int tiles;
        PM_DEV Work(const Segment& s) {
            first = s.begin * BLOCK_TOKENS;
            last = s.bad ? first : int(i64(s.end) * BLOCK_TOKENS < s.len ? s.end * BLOCK_TOKENS : s.len);
            tiles = int((u32(last > first ? last - first : 0) + C::N - 1) / C::N);
        }
    };

    // ---- copies ------------------------------------------------------------------------------------
    static PM_DEV void copy_role(const DecodeParams& p, int kv_head, int row0, char* smem) {
        SegmentWalk& walk = *reinterpret_cast<SegmentWalk*>(smem + WALK);
        u32 done = 0, loads = 0;            // tiles, and segments with keys, of the segments before
        for (u32 turn = 0;; ++turn) {
            Slot& slot = slot_of(smem, turn);
            if (pm_thread() == COPY_FIRST) {
                if (turn > 1) wait_slot(smem, STORED, turn - 2);
                slot.more = walk.next(p, slot.segment);
                slot.bad = slot.more && slot.segment.bad;
                if (slot.bad) report(p.status, slot.segment.req);
                // With nowhere to put a partial result, the request becomes NaN.
                if (slot.more && slot.segment.slot >= p.slots) slot.segment.slot = -1;
                pm_mbar_arrive(barrier(smem, SEGMENT + int(turn & 1)));
            }
            wait_slot(smem, SEGMENT, turn);
            if (!slot.more) return;
            const Segment& s = slot.segment;
            const Work w(s);
            if (w.tiles > 0) {
                Loader loader;
                loader.first = w.first;
                loader.last = w.last;
                loader.look_up(p, s, 0);
                if (loads > 0) wait(smem, Q_EMPTY, loads - 1);
                load_q<C, COPY_THREADS>(p, s.req, kv_head, row0, 0, smem, true);
                pm_copy_arrive(barrier(smem, Q_FULL));
                ++loads;
#pragma unroll 1
                for (int t = 0; t < w.tiles; ++t) {
                    const u32 count = done + u32(t);
                    const int stage = int(count & 1);
#pragma unroll 1
                    for (int half = 0; half < 2; ++half) {
                        // All that can be done before the room is free is: it is the way from there that P V waits for.
                        typename Loader::Found found;
                        loader.find(p, s, kv_head, t, half, &slot.bad, found);
                        if (count > 1) {
#pragma unroll
                            for (int pass = 0; pass < Loader::PASSES; ++pass)
                                if (found.valid[pass])
                                    for (int line = pm_thread() % 8; line < C::DK / 64; line += 8)
                                        pm_prefetch(found.row[pass].at(line * 64));
                            wait(smem, EMPTY + stage * 2 + half, (count >> 1) - 1);
                        }
                        Loader::copy(found, half, smem + C::kv + stage * C::STAGE_BYTES, true);
                        pm_copy_arrive(barrier(smem, FULL + stage * 2 + half));
                    }
                    loader.look_up(p, s, t + 1);
                }
                done += u32(w.tiles);
            }
            arrive(smem, LOADED + int(turn & 1));
        }
    }

    // ---- P V ---------------------------------------------------------------------------------------
    // What P V multiplies its rows by before it adds a group's step.
    static PM_DEV float* factors(char* smem, int group) {
        return reinterpret_cast<float*>(smem + (group ? C::factor_1 : C::factor));
    }

    // As Uniform::store, in fewer instructions.
    static PM_DEV void store(const DecodeParams& p, const Segment& s, int kv_head, int row0, const char* smem,
                             const Acc (&acc)[C::GROUPS][C::MT][4]) {
        const int thread = pm_thread_again(), row = thread % 32 / 4, rows = p.s_q * p.heads_per_kv - row0;
        const int col = thread / 32 * 64 + thread % 4 * 2;
        const float* inverse = reinterpret_cast<const float*>(smem + C::inverse) + row;
        const i64* offset = reinterpret_cast<const i64*>(smem + C::offsets) + row;
        float f[2 * C::MT];
#pragma unroll
        for (int i = 0; i < 2 * C::MT; ++i) f[i] = inverse[8 * i];
        if (s.slot >= 0) {
            store_pieces<C::MT>(p, s.slot, kv_head, row0, thread / 32, thread % 32, f, acc[0]);
            return;
        }
#pragma unroll
        for (int i = 0; i < 2 * C::MT; ++i) {
            if (row + 8 * i >= rows) continue;
            u16* to = static_cast<u16*>(p.out) + offset[8 * i] + col;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float* v = acc[0][i / 2][j / 2].v + j % 2 * 4 + i % 2 * 2;
                *reinterpret_cast<u32*>(to + j * 8) = Elem::pack(v[0] * f[i], v[1] * f[i]);
            }
        }
    }

    static PM_DEV void pv_role(const DecodeParams& p, int kv_head, int row0, char* smem) {
        u32 step = 0, turns = 0;            // of all segments
        for (u32 turn = 0;; ++turn) {
            wait_slot(smem, SEGMENT, turn);
            const Slot& slot = slot_of(smem, turn);
            if (!slot.more) return;
            const u32 end = step + 2 * u32(Work(slot.segment).tiles);
            Acc acc[C::GROUPS][C::MT][4] = {};
            // Not unrolled: what two steps cost in registers and instructions is more than a branch.
#pragma unroll 1
            for (; step < end; ++step) {
                // Registers are for O: where this lane reads is worked out again.
                const int half = int(step & 1), piece = int(step & 3), thread = pm_thread_again();
                const int v = C::kv + piece * (C::STAGE_BYTES / 2) + thread / 32 * 128 + Tile::pv_lane(thread % 32, C::U * 16);
                const int from = C::p + (Tile::pv_lane(thread % 32, C::N * 2) ^ half * 64);
                wait(smem, P_FULL + half, step >> 1);       // the tokens have landed too
                // A scheduler's tensor cores serve one score warp and two of these, which wait until it is at its softmax: the
                // score warps have the longer way, and what they lose to P V is lost to all.
                const int scheduler = thread / 32 % (QK_THREADS / 32);
                if (half == scheduler % 2 && (step | 1) + 1 < end) wait(smem, TURN + scheduler, turns++);
                Uniform::rescale(factors(smem, half), acc);
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    Tile::template pv_step<C::MT, C::N / 8>(acc[0], smem, from ^ k * 32, v + k * 16 * C::U * 16);
                arrive(smem, EMPTY + piece);
            }
            wait_slot(smem, ROWS, turn);
            store(p, slot.segment, kv_head, row0, smem, acc);
            arrive(smem, STORED + int(turn & 1));
        }
    }

    // ---- Q K^T and softmax ---------------------------------------------------------------------------
    // Of each of a thread's R rows: keys that it sees; base 2, the maximum when this group last looked, and the sum of this
    // thread's columns relative to it.
    struct Rows {
        int limit[R];
        float m[R], l[R];
    };
    // Which part of the scores this thread has: worked out anew where it is used, because registers are dear.
    struct Place {
        int lane, warp, group, pair;
        int row;                // the first of R, which are 8 apart
        bool first;             // of the 4 lanes that share them
        PM_DEV Place() {
            const int thread = pm_thread_again() - QK_FIRST;
            lane = thread % 32;
            warp = thread / 32;
            group = warp % 2;
            pair = warp / 2;
            row = pair * WM + lane / 4;
            first = lane % 4 == 0;
        }
    };

    static PM_DEV void scores(char* smem, int stage, Acc (&acc)[MT][2]) {
        // Operands are loaded a step before their use: one warp alone has to hide that latency.
        const Place at;
        const char* q = smem + C::q + at.pair * WM * C::U * 16;
        const char* key = smem + C::kv + stage * C::STAGE_BYTES + at.group * 32 * C::U * 16;
        const int a = Tile::template a_lane<C::U>(), b = Tile::template b_lane<C::U>();
        typename Tile::template Operands<MT, 2> o[2];
        Tile::template load_step<MT, 2, C::U>(o[0], q, a, key, b, 0);
#pragma unroll 1
        for (int step0 = 0; step0 < STEPS; step0 += UNROLL, q += UNROLL * 32, key += UNROLL * 32)
#pragma unroll
            for (int k = 0; k < UNROLL; ++k) {
                if (k + 1 < UNROLL || step0 + UNROLL < STEPS)
                    Tile::template load_step<MT, 2, C::U>(o[(k + 1) % 2], q, a, key, b, k + 1);
                Tile::multiply(acc, o[k % 2]);
            }
    }

    // Scores of a group's half of the 64 tokens from `tok` on -> P and the factors for O.
    static PM_DEV void softmax(const DecodeParams& p, char* smem, u32 tok, u32 count, bool first_tile, Acc (&acc)[MT][2],
                               Rows& rows) {
        const Place at;
        const int mine = at.group;
        tok += u32(mine) * 32;
        const bool begins = first_tile && mine == 0;
        float* room = reinterpret_cast<float*>(smem + C::room);     // [2][M]: the maxima after a group's last step
        bool whole = true;
#pragma unroll
        for (int r = 0; r < R; ++r) whole = whole && tok + 32 <= u32(rows.limit[r]);
        float top[R];
#pragma unroll
        for (int r = 0; r < R; ++r) top[r] = -pm_inf();
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < Tile::SIZE; ++e) acc[m][n].v[e] *= p.scale_log2;
        if (!whole)
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int e = 0; e < Tile::SIZE; ++e)
                        // An invalid row's negative limit unmasks it: the row becomes NaN, or is not there, at the end.
                        if (tok + u32(16 * n + 2 * (e & 4) + at.lane % 4 * 2 + (e & 1)) >= u32(rows.limit[2 * m + (e & 2) / 2])) acc[m][n].v[e] = -pm_inf();
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < Tile::SIZE; ++e) {
                    float& most = top[2 * m + (e & 2) / 2];
                    most = pm_max(most, acc[m][n].v[e]);
                }
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) top[r] = pm_max(top[r], pm_shfl_xor(top[r], lanes));
        // The maximum comes from the other group's step before this one, and goes to its next one. Group 1 tells group 0 of
        // its last step too, which nobody asks for.
        if (mine == 1)
            wait(smem, MAXIMA + 2 * at.pair + 1, count);
        else if (count > 0)
            wait(smem, MAXIMA + 2 * at.pair, count - 1);
        float factor[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float before = begins ? -pm_inf() : room[(1 - mine) * C::M + at.row + 8 * r];
            const float m = running_maximum(before, top[r]);
            const float from = m == -pm_inf() ? 0.0f : m;   // no key yet: every x is -infinity and becomes 0
            if (at.first) room[mine * C::M + at.row + 8 * r] = m;
            factor[r] = before == m ? 1.0f : pm_exp2(before - from);
            rows.l[r] *= rows.m[r] == m ? 1.0f : pm_exp2(rows.m[r] - from);
            rows.m[r] = m;
            top[r] = from;
        }
        arrive(smem, MAXIMA + 2 * at.pair + 1 - mine);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < Tile::SIZE; ++e) {
                    const int r = 2 * m + (e & 2) / 2;
                    float& x = acc[m][n].v[e];
                    x = pm_exp2(x - top[r]);
                    rows.l[r] += x;
                }
        // This group's last P and its factors are read.
        if (count > 0) wait(smem, EMPTY + int((count - 1) & 1) * 2 + mine, (count - 1) >> 1);
        if (at.first)
#pragma unroll
            for (int r = 0; r < R; ++r) factors(smem, mine)[at.row + 8 * r] = factor[r];
        // As Swizzled<8> lays them; 8 columns on is another unit, by an XOR.
        char* to = smem + C::p + at.row * 128 + at.lane % 4 * 4;
        const int unit = (mine * 4 ^ (at.row & 7)) * 16;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < Tile::SIZE; e += 2)
                    *reinterpret_cast<u32*>(to + (unit ^ (2 * n + e / 4) * 16) + (16 * m + (e & 2) * 4) * 128) =
                        Elem::pack(acc[m][n].v[e], acc[m][n].v[e + 1]);
        arrive(smem, P_FULL + mine);
    }

    // Adds up what the groups know of each row, always in the same order; then where the row goes, and what it is multiplied
    // by.
    static PM_DEV void finish_rows(const DecodeParams& p, const Slot& slot, u32 turn, u32 loads, bool any, int kv_head, int row0,
                                   int limit, char* smem, Rows& rows) {
        const Place at;
        float* sums = reinterpret_cast<float*>(smem + C::sums);     // of group 1: maxima [M], sums [M]
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) rows.l[r] += pm_shfl_xor(rows.l[r], lanes);
        if (at.group == 1) {
            if (!any) return;
            if (at.first)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    sums[at.row + 8 * r] = rows.m[r];
                    sums[C::M + at.row + 8 * r] = rows.l[r];
                }
            arrive(smem, SUMS + at.pair);
            return;
        }
        // From here on a lane has a row.
        const int row = at.pair * WM + at.lane;
        float m = -pm_inf(), l = 0.0f;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float m_r = pm_shfl(rows.m[r], at.lane % 8 * 4), l_r = pm_shfl(rows.l[r], at.lane % 8 * 4);
            if (at.lane / 8 == r) {
                m = m_r;
                l = l_r;
            }
        }
        if (any) {
            wait(smem, SUMS + at.pair, loads);
            const float other = sums[row], most = pm_max(m, other), from = most == -pm_inf() ? 0.0f : most;
            l = l * pm_exp2(m - from) + sums[C::M + row] * pm_exp2(other - from);
            m = most;
        }
        wait_slot(smem, LOADED, turn);      // whoever may find the segment bad has looked
        if (turn > 0) wait_slot(smem, STORED, turn - 1);
        Uniform::finish_row(p, slot.segment, kv_head, row0, row, limit, slot.bad, m, l,
                            reinterpret_cast<float*>(smem + C::inverse), reinterpret_cast<i64*>(smem + C::offsets));
    }

    static PM_DEV void qk_role(const DecodeParams& p, int kv_head, int row0, char* smem) {
        u32 count = 0, loads = 0;           // tiles, segments with keys
        for (u32 turn = 0;; ++turn) {
            wait_slot(smem, SEGMENT, turn);
            const Slot& slot = slot_of(smem, turn);
            if (!slot.more) return;
            const Work w(slot.segment);
            const Place at;
            const int limit = Uniform::find_limit(p, slot.segment, row0, at.pair * WM + at.lane);     // a lane has a row
            Rows rows;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                rows.limit[r] = pm_shfl(limit, at.row % WM + 8 * r);
                rows.m[r] = -pm_inf();
                rows.l[r] = 0.0f;
            }
            if (w.tiles > 0) wait(smem, Q_FULL, loads);
#pragma unroll 1
            for (int i = 0; i < w.tiles; ++i, ++count) {
                const int stage = int(count & 1);
                wait(smem, FULL + stage * 2 + at.group, count >> 1);
                Acc acc[MT][2] = {};
                scores(smem, stage, acc);
                // A hint, which orders nothing; every one is waited for, once.
                if (i > 0 && at.lane == 0) pm_mbar_arrive(barrier(smem, TURN + at.warp));
                if (i + 1 == w.tiles) arrive(smem, Q_EMPTY);
                softmax(p, smem, u32(w.first) + u32(i) * C::N, count, i == 0, acc, rows);
            }
            finish_rows(p, slot, turn, loads, w.tiles > 0, kv_head, row0, limit, smem, rows);
            loads += w.tiles > 0;
            arrive(smem, ROWS + int(turn & 1));
        }
    }

    static PM_DEV void run(const DecodeParams& p, char* smem) {
        const BlockPlace at(p, C::M);
        if (pm_thread() >= COPY_FIRST) {    // first of all, for everybody waits for it
            if (pm_thread() == COPY_FIRST) reinterpret_cast<SegmentWalk*>(smem + WALK)->begin(p, at.part);
            prefetch_table(p, at.part, pm_thread() - COPY_FIRST);
        }
        // By one lane of a warp: the instruction takes one address, and for the lanes' many there would be a loop over them.
        if (pm_thread() < PV_THREADS && pm_thread() % 32 == 0)
#pragma unroll 1
            for (int i = pm_thread() / 32; i < BARRIERS; i += PV_THREADS / 32) pm_mbar_init(barrier(smem, i), arrivals(i));
        pm_sync();
        if (pm_thread() < PV_THREADS) {
            pm_registers_pv();              // O takes more than scores do
            pv_role(p, at.kv_head, at.row0, smem);
        } else if (pm_thread() < COPY_FIRST) {
            pm_registers_qk();
            qk_role(p, at.kv_head, at.row0, smem);
        } else {
            pm_registers_copy();
            copy_role(p, at.kv_head, at.row0, smem);
        }
    }
};

}  // namespace polymla
