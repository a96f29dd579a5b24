// The 64-row tile where the dialect has named barriers and asynchronous copies that arrive on a barrier (PM_ROLES): matrix
// work of Q K^T and of P V under way at once, on different warps.
//
// Tile      64 packed query rows x 64 tokens; O is 64 x head_dim_v f32 in the registers of the P V warps.
// Roles     8 warps (threads 0..255) copy Q and KV, and own 64 columns of O each; 4 warps (256..383) own 32 x 32 scores
//           each, over all columns, so that scores never leave registers: softmax, P.
// Pipeline  2 stages of KV, each in two halves of 32 tokens, because a half is free as soon as P V is done with it:
//
//   Q K^T warps  | Q K^T (i)   softmax (i) |P(i)| Q K^T (i+1)   softmax (i+1) |P(i+1)| ...
//   P V warps    | P V (i-1) first, load; second, load | P V (i) first, load; ...
//
//           P(i) is written when P V (i-1) has read P(i-1); the load of half h of tile i + 2 begins when all P V warps are
//           done with half h of tile i, and its arrival is counted by the half's barrier in shared memory.
// Shared    As the uniform kernel's, but no room for scores: config.h.
//
// Grid      As the uniform kernel's; 384 threads.
//
// Rows must be aligned (FLAG_Q_VEC16, FLAG_KV_VEC16, FLAG_OUT_VEC); what is not is the uniform kernel's.
#pragma once

#include "decode.h"

namespace polymla {

template <class Elem, class Tile, class C>
struct RoleDecoder {
    typedef typename Tile::C Acc;
    typedef Decoder<Elem, Tile, C> Uniform;
    typedef typename Uniform::State State;
    static_assert(C::M == 64 && C::N == 64 && C::STAGES == 2 && C::HALVES == 2 && PM_WARP == 32, "one shape");

    // Rows of scores of a warp, and of a thread.
    static constexpr int WM = 32, MT = WM / 16, R = 2 * MT;
    static constexpr int PV_THREADS = DECODE_THREADS, QK_THREADS = C::M / WM * 64, THREADS = PV_THREADS + QK_THREADS;
    static constexpr int STEPS = C::DK / 16, AHEAD = 1, QK_UNROLL = 8;
    enum Barrier { P_FULL = 1, P_FREE, PV_ONLY, PV_HERE, QK_HERE, PAIR_0 };

    static PM_DEV char* full(char* smem, int stage, int half) { return smem + C::barriers + (stage * 2 + half) * 8; }
    static PM_DEV char* q_full(char* smem) { return smem + C::barriers + 32; }

    // All threads, from wherever they are. (A barrier of the whole block at two places of the code is what synccheck takes for
    // divergence.) The Q K^T warps wait before they say that they are here: so nobody comes to the next meeting while
    // somebody is still to leave this one.
    template <bool PV>
    static PM_DEV void meet() {
        if (PV) {
            pm_bar_arrive(PV_HERE, THREADS);
            pm_bar_sync(QK_HERE, THREADS);
        } else {
            pm_bar_sync(PV_HERE, THREADS);
            pm_bar_arrive(QK_HERE, THREADS);
        }
    }

    // What both roles know of a segment.
    struct Work {
        int first, last;    // tokens
        int tiles;
        u32 done;           // tiles of the segments before
        u32 parity;         // of the load of Q
    };

    static PM_DEV void load_half(const DecodeParams& p, const Segment& s, const Work& w, KvLoader<C>& loader, int kv_head,
                                 int tile, int half, char* smem) {
        const int stage = int((w.done + u32(tile)) & 1);
        int* bad = reinterpret_cast<int*>(smem + C::bad);
        loader.copy(p, s, kv_head, tile, half, smem + C::kv + stage * C::STAGE_BYTES, bad, true);
        pm_copy_arrive(full(smem, stage, half));
    }

    static PM_DEV void pv_role(const DecodeParams& p, const Segment& s, const Work& w, int kv_head, int row0, char* smem,
                               Acc (&acc)[C::GROUPS][C::MT][4]) {
        KvLoader<C> loader;
        loader.first = w.first;
        loader.last = w.last;
        loader.look_up(p, s, 0);
        load_q<C>(p, s.req, kv_head, row0, 0, smem, true);
        pm_copy_arrive(q_full(smem));
#pragma unroll 1
        for (int t = 0; t < 2; ++t) {
            if (t < w.tiles)
#pragma unroll 1
                for (int half = 0; half < 2; ++half) load_half(p, s, w, loader, kv_head, t, half, smem);
            loader.look_up(p, s, t + 1);
        }
        const int warp = pm_thread() / PM_WARP;
        const Swizzled<C::N / 8> weights = {smem + C::p};
#pragma unroll 1
        for (int i = 0; i < w.tiles; ++i) {
            const Swizzled<C::U> value = {smem + C::kv + int((w.done + u32(i)) & 1) * C::STAGE_BYTES};
            pm_bar_sync(P_FULL, THREADS);       // P (i) and its factors are there, and so is the tile
            Uniform::rescale(smem, acc);
            // Not unrolled: what the two halves cost in registers and instructions is more than a branch.
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int step = 2 * half; step < 2 * half + 2; ++step)
#pragma unroll
                    for (int g = 0; g < C::GROUPS; ++g)
                        Tile::template pv<C::MT>(acc[g], weights, value, step, (warp * C::GROUPS + g) * 64);
                if (half == 1 && i + 1 < w.tiles) pm_bar_arrive(P_FREE, THREADS);
                if (i + 2 < w.tiles) {
                    pm_bar_sync(PV_ONLY, PV_THREADS);
                    load_half(p, s, w, loader, kv_head, i + 2, half, smem);
                }
            }
            loader.look_up(p, s, i + 3);
        }
    }

    // A row's running maximum and its sum over this thread's columns, base 2; each thread has R rows.
    struct Rows {
        float m[R], l[R];
    };
    static PM_DEV int row_of(int r) { return (qk_warp() / 2) * WM + (r / 2) * 16 + Tile::row(2 * (r % 2)); }
    static PM_DEV int qk_warp() { return pm_thread() / PM_WARP - PV_THREADS / PM_WARP; }

    // The maximum of a row over both warps that share it. `slot` is this warp's of the two.
    static PM_DEV void exchange(float (&x)[R], float* room, bool add) {
        const int wn = qk_warp() % 2;
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                const float y = pm_shfl_xor(x[r], lanes);
                x[r] = add ? x[r] + y : pm_max(x[r], y);
            }
        if (Tile::lane() % 4 == 0)
#pragma unroll
            for (int r = 0; r < R; ++r) room[wn * C::M + row_of(r)] = x[r];
        pm_bar_sync(PAIR_0 + qk_warp() / 2, 64);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            // In one order for both, so that both have the same bits.
            const float a = room[row_of(r)], b = room[C::M + row_of(r)];
            x[r] = add ? a + b : pm_max(a, b);
        }
    }

    static PM_DEV void qk_role(const DecodeParams& p, const Work& w, char* smem, Rows& rows) {
        const int wm = qk_warp() / 2, wn = qk_warp() % 2;
        const Swizzled<C::U> q = {smem + C::q};
        float* room = reinterpret_cast<float*>(smem + C::room);
        float* factors = reinterpret_cast<float*>(smem + C::factor);
        const Swizzled<C::N / 8> weights = {smem + C::p};
        int limit[R];
#pragma unroll
        for (int r = 0; r < R; ++r) limit[r] = reinterpret_cast<const int*>(smem + C::limit)[row_of(r)];
        pm_mbar_wait(q_full(smem), w.parity);
#pragma unroll 1
        for (int i = 0; i < w.tiles; ++i) {
            const u32 count = w.done + u32(i);
            const Swizzled<C::U> key = {smem + C::kv + int(count & 1) * C::STAGE_BYTES};
            pm_mbar_wait(full(smem, int(count & 1), wn), (count >> 1) & 1);
            Acc acc[MT][2] = {};
            // Operands are loaded AHEAD steps before their use: one warp alone has to hide that latency.
            typename Tile::template Operands<MT, 2> o[AHEAD + 1];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) Tile::load(o[k], q, wm * WM, k, key, wn * 32, k);
#pragma unroll QK_UNROLL
            for (int k = 0; k < STEPS - AHEAD; ++k) {
                Tile::load(o[(k + AHEAD) % (AHEAD + 1)], q, wm * WM, k + AHEAD, key, wn * 32, k + AHEAD);
                Tile::multiply(acc, o[k % (AHEAD + 1)]);
            }
#pragma unroll
            for (int k = STEPS - AHEAD; k < STEPS; ++k) Tile::multiply(acc, o[k % (AHEAD + 1)]);
            const u32 tok = u32(w.first) + u32(i) * C::N + u32(wn) * 32;
            float top[R];
#pragma unroll
            for (int r = 0; r < R; ++r) top[r] = -pm_inf();
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int e = 0; e < Tile::SIZE; ++e) {
                        const int r = 2 * m + (e & 2) / 2;
                        float& x = acc[m][n].v[e];
                        // An invalid row's negative limit unmasks it: the row becomes NaN, or is not there, at the end.
                        x = tok + u32(16 * n + Tile::col(e)) < u32(limit[r]) ? x * p.scale_log2 : -pm_inf();
                        top[r] = pm_max(top[r], x);
                    }
            exchange(top, room, false);
            float factor[R];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float m = pm_max(rows.m[r], top[r]);
                const float from = m == -pm_inf() ? 0.0f : m;   // no key yet: every x is -infinity and becomes 0
                factor[r] = rows.m[r] == m ? 1.0f : pm_exp2(rows.m[r] - from);
                rows.m[r] = m;
                rows.l[r] *= factor[r];
                top[r] = from;
            }
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
            if (i > 0) pm_bar_sync(P_FREE, THREADS);    // P (i-1) and its factors are read
            if (wn == 0 && Tile::lane() % 4 == 0)
#pragma unroll
                for (int r = 0; r < R; ++r) factors[row_of(r)] = factor[r];
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int e = 0; e < Tile::SIZE; e += 2) {
                        const int row = row_of(2 * m + (e & 2) / 2), col = wn * 32 + 16 * n + Tile::col(e);
                        *reinterpret_cast<u32*>(weights.unit(row, col / 8) + (col % 8) * 2) =
                            Elem::pack(acc[m][n].v[e], acc[m][n].v[e + 1]);
                    }
            pm_bar_arrive(P_FULL, THREADS);
        }
    }

    // Where each row goes, and what it is multiplied by.
    static PM_DEV void finish_rows(const DecodeParams& p, const Segment& s, int kv_head, int row0, char* smem, Rows& rows) {
        exchange(rows.l, reinterpret_cast<float*>(smem + C::room), true);
        const int* limit = reinterpret_cast<const int*>(smem + C::limit);
        i64* offset = reinterpret_cast<i64*>(smem + C::q);
        if (qk_warp() % 2 != 0 || Tile::lane() % 4 != 0) return;
#pragma unroll
        for (int r = 0; r < R; ++r)
            Uniform::finish_row(p, s, kv_head, row0, row_of(r), limit[row_of(r)], rows.m[r], rows.l[r], smem, offset);
    }

    // The part's next segment; false where there is none. All threads, all of whom are done with the one before.
    template <bool PV>
    static PM_DEV bool next(const DecodeParams& p, int row0, char* smem, State& state, Work& w) {
        w.done += u32(w.tiles);
        if (w.tiles > 0) w.parity ^= 1;
        meet<PV>();          // everybody is done with the segment before
        if (pm_thread() == 0) Uniform::next_segment(p, state, smem);
        meet<PV>();
        if (!state.more) return false;
        const Segment& s = state.segment;
        if (pm_thread() < C::M) Uniform::find_limit(p, s, row0, pm_thread(), smem);
        if (s.bad && pm_thread() == 0) report(p.status, s.req);
        w.first = s.begin * BLOCK_TOKENS;
        w.last = s.bad ? w.first : int(i64(s.end) * BLOCK_TOKENS < s.len ? s.end * BLOCK_TOKENS : s.len);
        w.tiles = int((u32(w.last > w.first ? w.last - w.first : 0) + C::N - 1) / C::N);
        meet<PV>();          // limits are there
        return true;
    }

    static PM_DEV void run(const DecodeParams& p, char* smem) {
        const int m_tiles = (p.s_q * p.heads_per_kv + C::M - 1) / C::M;
        const int row0 = pm_block() % m_tiles * C::M, kv_head = pm_block() / m_tiles % p.h_kv;
        State& state = *reinterpret_cast<State*>(smem + C::state);
        if (pm_thread() == 0) {
            state.walk.begin(p, pm_block() / m_tiles / p.h_kv);
            for (int i = 0; i < 5; ++i) pm_mbar_init(smem + C::barriers + i * 8, PV_THREADS);
        }
        const Segment& s = state.segment;
        Work w = {};
        if (pm_thread() < PV_THREADS) {
            pm_more_registers();                // O takes more than scores do
            while (next<true>(p, row0, smem, state, w)) {
                Acc acc[C::GROUPS][C::MT][4] = {};
                if (w.tiles > 0) pv_role(p, s, w, kv_head, row0, smem, acc);
                meet<true>();      // nobody reads Q or factors, or writes `bad`, any more
                meet<true>();      // the rows are finished
                const i64* offset = reinterpret_cast<const i64*>(smem + C::q);
                if (s.slot < 0)
                    Uniform::store(p, false, true, smem, offset, acc);
                else
                    Uniform::store(p, true, true, smem, offset, acc);
            }
        } else {
            pm_fewer_registers();
            while (next<false>(p, row0, smem, state, w)) {
                Rows rows;
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    rows.m[r] = -pm_inf();
                    rows.l[r] = 0.0f;
                }
                if (w.tiles > 0) qk_role(p, w, smem, rows);
                meet<false>();
                finish_rows(p, s, kv_head, row0, smem, rows);
                meet<false>();
            }
        }
    }
};

}  // namespace polymla
