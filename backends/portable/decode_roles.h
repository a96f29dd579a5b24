// The 64-row tile where the dialect has barriers in shared memory and copies of whole rows that arrive on them (PM_ROLES, class
// 227): copies, matrix work of Q K^T and of P V under way at once, on different warps.
//
// Tile      64 packed query rows x 64 tokens; O is 64 x head_dim_v f32 in the registers of the P V warps.
// Roles     8 warps own 64 columns of O each; 4 warps own 32 x 32 scores each, over all columns, so that scores never leave
//           registers: softmax, P; 4 warps copy Q (but the first, which idle P V warps bring) and KV. The score warps are two
//           groups: one has the first 32 tokens of every tile, the other the last.
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
// Shared    roles_shared.h. Everything that one role tells another is ordered by a barrier in shared memory.
//
// Grid      As the uniform kernel's; 512 threads, of whom the P V warps take registers from the others.
//
// Rows must be aligned (FLAG_Q_VEC16, FLAG_KV_VEC16, FLAG_OUT_VEC); what is not is the uniform kernel's.
#pragma once

#include "decode.h"
#include "roles_shared.h"

namespace polymla {

template <class Elem, class Tile, class C>
struct RoleDecoder : RoleShared<C> {
    typedef typename Tile::C Acc;
    typedef Decoder<Elem, Tile, C> Uniform;
    typedef RoleShared<C> Shared;
    typedef typename Shared::Slot Slot;
    typedef typename Shared::Work Work;
    using Shared::arrive;
    using Shared::barrier;
    using Shared::end_note;
    using Shared::factors;
    using Shared::maximum_note;
    using Shared::slot_of;
    using Shared::wait;
    using Shared::wait_slot;
    static_assert(C::M == 64 && C::N == 64 && C::STAGES == 2 && C::HALVES == 2 && PM_WARP == 32 && C::GROUPS == 1, "one shape");

    // Rows of scores of a warp, and of a thread.
    static constexpr int WM = 32, MT = WM / 16, R = 2 * MT;
    static constexpr int STEPS = C::DK / 16;
    // A thread has REGISTERS at first; O takes more than scores do. Copies are a few more where head_dim_k is head_dim_v, for the
    // compiler's reasons.
    static constexpr int REGISTERS = 128, PV_REGISTERS = 168, QK_REGISTERS = C::DK == C::DV ? 112 : 128;
    static constexpr int COPY_REGISTERS = 4 * REGISTERS - 2 * PV_REGISTERS - QK_REGISTERS;
    static constexpr float LARGE_SCORE = 1 << 20;   // base 2; the last place of a maximum below it is at most 1/16
    static_assert(Shared::PAIRS * WM == C::M, "every row has a warp in each group");

    // ---- P V ---------------------------------------------------------------------------------------
    // As Uniform::store, in fewer instructions.
    static PM_DEV void store(const DecodeParams& p, const Segment& s, int kv_head, int row0, char* smem,
                             const Acc (&acc)[C::GROUPS][C::MT][4]) {
        const int thread = pm_thread_again(), row = thread % 32 / 4, rows = p.s_q * p.heads_per_kv - row0;
        const int col = thread / 32 * 64 + thread % 4 * 2;
        float f[2 * C::MT];
#pragma unroll
        for (int i = 0; i < 2 * C::MT; ++i) f[i] = end_note(smem, row + 8 * i).inverse;
        if (s.slot >= 0) {
            store_pieces<C::MT>(p, s.slot, kv_head, row0, thread / 32, thread % 32, f, acc[0]);
            return;
        }
#pragma unroll
        for (int i = 0; i < 2 * C::MT; ++i) {
            if (row + 8 * i >= rows) continue;
            u16* to = static_cast<u16*>(p.out) + end_note(smem, row + 8 * i).offset + col;
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
            wait_slot(smem, Shared::SEGMENT, turn);
            const Slot& slot = slot_of(smem, turn);
            if (!slot.more) return;
            const u32 end = step + 2 * u32(Work(slot.segment).tiles);
            Acc acc[C::GROUPS][C::MT][4] = {};
            // Not unrolled: what two steps cost in registers and instructions is more than a branch.
#pragma unroll 1
            for (; step < end; ++step) {
                // Registers are for O: where this lane reads is worked out again.
                const int half = int(step & 1), piece = int(step & 3), thread = pm_thread_again();
                const int v = Shared::kv + piece * Shared::HALF_BYTES + thread / 32 * 128 + Tile::v_lane(thread % 32, Shared::ROW_BYTES);
                const int from = Shared::p + (Tile::p_lane(thread % 32, C::N * 2) ^ half * 64);
                wait(smem, Shared::P_FULL + half, step >> 1);       // the tokens have landed too
                // A scheduler's tensor cores serve one score warp and two of these, which wait until it is at its softmax: the
                // score warps have the longer way, and what they lose to P V is lost to all.
                const int scheduler = thread / 32 % (Shared::QK_THREADS / 32);
                if (half == scheduler % 2 && (step | 1) + 1 < end) wait(smem, Shared::TURN + scheduler, turns++);
                Uniform::rescale(factors(smem, half), acc);
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    Tile::template pv_step<C::MT, C::N / 8>(acc[0], smem, from ^ k * 32, v + k * 16 * Shared::ROW_BYTES);
                arrive(smem, Shared::EMPTY + piece);
            }
            wait_slot(smem, Shared::ROWS, turn);
            store(p, slot.segment, kv_head, row0, smem, acc);
            arrive(smem, Shared::STORED + int(turn & 1));
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
            const int thread = pm_thread_again() - Shared::QK_FIRST;
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
        const char* key = smem + Shared::kv + (stage * 2 + at.group) * Shared::HALF_BYTES + Tile::template b_lane<Shared::ROW_BYTES>();
        const int a = Tile::template a_lane<C::U>();
        typename Tile::template Operands<MT, 2> o[2];
        Tile::template load_step<MT, 2, C::U, Shared::ROW_BYTES>(o[0], q, a, key, 0);
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            if (k + 1 < STEPS) Tile::template load_step<MT, 2, C::U, Shared::ROW_BYTES>(o[(k + 1) % 2], q, a, key, k + 1);
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
        bool whole = true;
#pragma unroll
        for (int r = 0; r < R; ++r) whole = whole && tok + 32 <= u32(rows.limit[r]);
        float top[R];
#pragma unroll
        for (int r = 0; r < R; ++r) top[r] = -pm_inf();
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
        // Scores are scaled where they become weights, in one step with the subtraction. Where the maximum is so large that its
        // own rounding would show, or where there is no score, they are scaled by themselves.
        float scale = p.scale_log2;
        bool small = true;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            top[r] *= scale;
            small = small && top[r] < LARGE_SCORE && top[r] > -LARGE_SCORE;
        }
        if (!small) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int e = 0; e < Tile::SIZE; ++e) acc[m][n].v[e] *= scale;
            scale = 1.0f;
        }
        // The maximum comes from the other group's step before this one, and goes to its next one. Group 1 tells group 0 of
        // its last step too, which nobody asks for.
        if (mine == 1)
            wait(smem, Shared::MAXIMA + 2 * at.pair + 1, count);
        else if (count > 0)
            wait(smem, Shared::MAXIMA + 2 * at.pair, count - 1);
        float before[R], factor[R];         // read before anything is written, which might be the same place to a compiler
#pragma unroll
        for (int r = 0; r < R; ++r) before[r] = begins ? -pm_inf() : maximum_note(smem, at.row + 8 * r).maximum[1 - mine];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float m = running_maximum(before[r], top[r]);
            const float from = m == -pm_inf() ? 0.0f : m;   // no key yet: every x is -infinity and becomes 0
            if (at.first) maximum_note(smem, at.row + 8 * r).maximum[mine] = m;
            factor[r] = before[r] == m ? 1.0f : pm_exp2(before[r] - from);
            rows.l[r] *= rows.m[r] == m ? 1.0f : pm_exp2(rows.m[r] - from);
            rows.m[r] = m;
            top[r] = from;
        }
        arrive(smem, Shared::MAXIMA + 2 * at.pair + 1 - mine);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < Tile::SIZE; ++e) {
                    const int r = 2 * m + (e & 2) / 2;
                    float& x = acc[m][n].v[e];
                    x = pm_exp2(pm_fma(x, scale, -top[r]));
                    rows.l[r] += x;
                }
        // This group's last P and its factors are read.
        if (count > 0) wait(smem, Shared::EMPTY + int((count - 1) & 1) * 2 + mine, (count - 1) >> 1);
        if (at.first)
#pragma unroll
            for (int r = 0; r < R; ++r) factors(smem, mine)[at.row + 8 * r] = factor[r];
        // As Swizzled<8> lays them, 16 x 16 at a time; the next 16 columns are other units, by an XOR.
        char* to = smem + Shared::p + (at.pair * WM + at.lane % 16) * 128;
        const int unit = ((mine * 4 + at.lane / 16) ^ (at.lane & 7)) * 16;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float* v = acc[m][n].v;
                pm_stmatrix_x4(to + (unit ^ n * 32) + m * 16 * 128, Elem::pack(v[0], v[1]), Elem::pack(v[2], v[3]),
                               Elem::pack(v[4], v[5]), Elem::pack(v[6], v[7]));
            }
        arrive(smem, Shared::P_FULL + mine);
    }

    // Adds up what the groups know of each row, always in the same order; then where the row goes, and what it is multiplied
    // by.
    static PM_DEV void finish_rows(const DecodeParams& p, const Slot& slot, u32 turn, u32 loads, bool any, int kv_head, int row0,
                                   int limit, char* smem, Rows& rows) {
        const Place at;
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) rows.l[r] += pm_shfl_xor(rows.l[r], lanes);
        if (at.group == 1) {
            if (!any) return;
            if (at.first)
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    maximum_note(smem, at.row + 8 * r).other_m = rows.m[r];
                    maximum_note(smem, at.row + 8 * r).other_l = rows.l[r];
                }
            arrive(smem, Shared::SUMS + at.pair);
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
            wait(smem, Shared::SUMS + at.pair, loads);
            const float other = maximum_note(smem, row).other_m, most = pm_max(m, other), from = most == -pm_inf() ? 0.0f : most;
            l = l * pm_exp2(m - from) + maximum_note(smem, row).other_l * pm_exp2(other - from);
            m = most;
        }
        wait_slot(smem, Shared::LOADED, turn);      // whoever may find the segment bad has looked
        if (turn > 0) wait_slot(smem, Shared::STORED, turn - 1);
        Uniform::finish_row(p, slot.segment, kv_head, row0, row, limit, slot.bad, m, l, end_note(smem, row).inverse,
                            end_note(smem, row).offset);
    }

    static PM_DEV void qk_role(const DecodeParams& p, int kv_head, int row0, char* smem) {
        u32 count = 0, loads = 0;           // tiles, segments with keys
        for (u32 turn = 0;; ++turn) {
            wait_slot(smem, Shared::SEGMENT, turn);
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
            if (w.tiles > 0) wait(smem, Shared::Q_FULL, loads);
#pragma unroll 1
            for (int i = 0; i < w.tiles; ++i, ++count) {
                const int stage = int(count & 1);
                wait(smem, Shared::FULL + stage * 2 + at.group, count >> 1);
                Acc acc[MT][2] = {};
                scores(smem, stage, acc);
                // A hint, which orders nothing; every one is waited for, once.
                if (i > 0 && at.lane == 0) pm_mbar_arrive(barrier(smem, Shared::TURN + at.warp));
                if (i + 1 == w.tiles) arrive(smem, Shared::Q_EMPTY);
                softmax(p, smem, u32(w.first) + u32(i) * C::N, count, i == 0, acc, rows);
            }
            finish_rows(p, slot, turn, loads, w.tiles > 0, kv_head, row0, limit, smem, rows);
            loads += w.tiles > 0;
            arrive(smem, Shared::ROWS + int(turn & 1));
        }
    }

    static PM_DEV void run(const DecodeParams& p, char* smem) {
        const BlockPlace at(p, C::M);
        const typename Shared::Start start = Shared::begin(p, at.part, at.kv_head, at.row0, smem);
        if (pm_thread() < Shared::PV_THREADS) {
            pm_take_registers<PV_REGISTERS>();
            pv_role(p, at.kv_head, at.row0, smem);
        } else if (pm_thread() < Shared::COPY_FIRST) {
            if (QK_REGISTERS < REGISTERS) pm_leave_registers<QK_REGISTERS>();
            qk_role(p, at.kv_head, at.row0, smem);
        } else {
            pm_leave_registers<COPY_REGISTERS>();
            Shared::copy_role(p, start, at.kv_head, at.row0, smem);
        }
    }
};

}  // namespace polymla
