// Dense MLA decoding, split over KV: the tuned kernel, for head dimensions known at compile time.
//
// Tile      M packed query rows (s_q x heads of one KV head) x N tokens; O is M x head_dim_v f32 in registers.
// Roles     256 threads, all alike: copy, Q K^T, softmax, P V. Each warp has all rows of its columns of O.
// Pipeline  STAGES tiles of KV; a barrier on each side of the short softmax, and one where a tile has landed:
//
//   | P V (i-1)  [landed i] Q K^T (i) | scores -> softmax (i) | P V (i)  [landed i+1] Q K^T (i+1) | ...
//   load of tile i - 1 + STAGES begins at [landed i], when P V (i-1) is done with its stage
//
//           so matrix work of two tiles runs between two softmaxes, and warps drift apart inside it.
// Shared    Q, KV stages (config.h), P, the scores of KS column parts. In the 64-row tile the scores lie in the late
//           half of the free stage, whose load waits until the softmax has read them.
//
// Grid      m_tiles * h_kv * num_parts blocks, M tiles of one request next to one another, so that their KV meets in L2.
#pragma once

#include "load.h"
#ifdef PM_PIECES
#include "pieces.h"
#endif

namespace polymla {

template <class Elem, class Tile, class C>
struct Decoder {
    typedef typename Tile::C Acc;
    static constexpr int K_UNROLL = Tile::UNROLL ? C::K_UNROLL : 1;
    static constexpr int SX = (C::N / 8 < 4 ? C::N / 8 : 4) - 1;

    // Where the score of a row and column lies; the XOR spreads 4 rows over the banks.
    static PM_DEV int score_at(int row, int col) { return row * C::N + (col ^ ((row & SX) * 8)); }

    static PM_DEV void qk(char* smem, float* scores, const char* stage) {
        const int warp = pm_thread() / PM_WARP;
        const int ks = warp % C::KS, wn = warp / C::KS % (C::N / C::WN), wm = warp / C::KS / (C::N / C::WN);
        const Swizzled<C::U> key = {const_cast<char*>(stage)};
        Acc acc[C::WM / 16][C::WN / 16] = {};
        if (warp < C::QK_WARPS) {
            const Swizzled<C::Q_COLS / 8> q = {smem + C::q};
#pragma unroll K_UNROLL
            for (int k = 0; k < C::K_STEPS; ++k) {
                const int step = ks * C::K_STEPS + k;
                Tile::template qk<C::WM / 16, C::WN / 16>(acc, q, wm * C::WM, step, key, wn * C::WN, step);
            }
        }
        store_scores(acc, scores + ks * C::M * C::N, wm * C::WM, wn * C::WN, warp < C::QK_WARPS);
    }

    // As qk, with Q brought in piece by piece: the smallest class has no room for all of it.
    static PM_DEV void qk_pieces(const DecodeParams& p, const Segment& s, int kv_head, int row0, char* smem,
                                 float* scores, char* stage) {
        const int warp = pm_thread() / PM_WARP;
        const int ks = warp % C::KS, wn = warp / C::KS % (C::N / C::WN), wm = warp / C::KS / (C::N / C::WN);
        const Swizzled<C::Q_COLS / 8> q = {smem + C::q};
        const Swizzled<C::U> key = {stage};
        Acc acc[C::WM / 16][C::WN / 16] = {};
#pragma unroll 1
        for (int col0 = 0; col0 < C::DK; col0 += C::Q_COLS) {
            if (col0 > 0) pm_sync();
            load_q<C, DECODE_THREADS>(p, s.req, kv_head, row0, col0, smem, p.flags & FLAG_Q_VEC16);
            pm_copy_commit();
            pm_copy_wait<0>();
            pm_sync();
            if (warp < C::QK_WARPS) {
#pragma unroll K_UNROLL
                for (int k = 0; k < C::K_STEPS; ++k) {
                    const int step = ks * C::K_STEPS + k;
                    Tile::template qk<C::WM / 16, C::WN / 16>(acc, q, wm * C::WM, step, key, wn * C::WN,
                                                              col0 / 16 + step);
                }
            }
        }
        store_scores(acc, scores + ks * C::M * C::N, wm * C::WM, wn * C::WN, warp < C::QK_WARPS);
    }

    static PM_DEV void store_scores(const Acc (&acc)[C::WM / 16][C::WN / 16], float* scores, int row0, int col0,
                                    bool mine) {
        if (!mine) return;
#pragma unroll
        for (int m = 0; m < C::WM / 16; ++m)
#pragma unroll
            for (int n = 0; n < C::WN / 16; ++n)
#pragma unroll
                for (int i = 0; i < Tile::SIZE; ++i) {
                    const int row = row0 + 16 * m + Tile::row(i), col = col0 + 16 * n + Tile::col(i);
                    if (Tile::RUN != 2) {
                        scores[score_at(row, col)] = acc[m][n].v[i];
                    } else if (i % 2 == 0) {
                        const Floats2 pair = {{acc[m][n].v[i], acc[m][n].v[i + 1]}};
                        *reinterpret_cast<Floats2*>(scores + score_at(row, col)) = pair;
                    }
                }
    }

    // Running maximum and sum of the row that this thread works on, base 2; the same in all TPR threads of the row.
    struct RowState {
        float m, l;
    };

    // Scores of a tile whose first token is `tok` -> P, and the factor for O.
    static PM_DEV void softmax(const DecodeParams& p, char* smem, const float* scores, int tok, RowState& state) {
        const int r = pm_thread() / C::TPR, part = pm_thread() % C::TPR;
        if (r >= C::M) return;
        // An invalid row's negative limit unmasks it: the row becomes NaN, or is not there, at the end.
        const int limit = reinterpret_cast<const int*>(smem + C::limit)[r];
        float x[C::PIECES][4];
        float top = -pm_inf();
#pragma unroll
        for (int i = 0; i < C::PIECES; ++i) {
            // Odd rows take their pieces in another order, away from the banks of even ones.
            const int col = 4 * ((part + C::TPR * i) ^ (C::N >= 32 ? (r & 1) * 4 : 0));
            const float* at = scores + score_at(r, col);
            Floats4 sum = *reinterpret_cast<const Floats4*>(at);
#pragma unroll
            for (int ks = 1; ks < C::KS; ++ks) {
                const Floats4 more = *reinterpret_cast<const Floats4*>(at + ks * C::M * C::N);
#pragma unroll
                for (int e = 0; e < 4; ++e) sum.f[e] += more.f[e];
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                x[i][e] = u32(tok) + u32(col + e) < u32(limit) ? sum.f[e] * p.scale_log2 : -pm_inf();
                top = pm_max(top, x[i][e]);
            }
        }
#pragma unroll
        for (int lanes = 1; lanes < C::TPR; lanes *= 2) top = pm_max(top, pm_shfl_xor(top, lanes));
        const float m = running_maximum(state.m, top);
        const float from = m == -pm_inf() ? 0.0f : m;   // no key yet: every x is -infinity and becomes 0
        const float factor = state.m == m ? 1.0f : pm_exp2(state.m - from);
        float sum = 0.0f;
        const Swizzled<C::N / 8> out = {smem + C::p};
#pragma unroll
        for (int i = 0; i < C::PIECES; ++i) {
            const int piece = (part + C::TPR * i) ^ (C::N >= 32 ? (r & 1) * 4 : 0);
            float e[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                e[k] = pm_exp2(x[i][k] - from);
                sum += e[k];
            }
            const Words2 packed = {{Elem::pack(e[0], e[1]), Elem::pack(e[2], e[3])}};
            *reinterpret_cast<Words2*>(out.unit(r, piece / 2) + (piece & 1) * 8) = packed;
        }
#pragma unroll
        for (int lanes = 1; lanes < C::TPR; lanes *= 2) sum += pm_shfl_xor(sum, lanes);
        state.l = state.l * factor + sum;
        state.m = m;
        if (part == 0) reinterpret_cast<float*>(smem + C::factor)[r] = factor;
    }

    // Multiplies O by the factors of its rows, unless all are 1.
    static PM_DEV void rescale(const float* factor, Acc (&acc)[C::GROUPS][C::MT][4]) {
        float f[C::MT][Tile::SIZE];     // mostly one value for several i; the compiler sees which
        bool rescale = false;
#pragma unroll
        for (int m = 0; m < C::MT; ++m)
#pragma unroll
            for (int i = 0; i < Tile::SIZE; ++i) {
                f[m][i] = factor[16 * m + Tile::pv_row(i)];
                rescale = rescale || f[m][i] != 1.0f;
            }
        if (!rescale) return;           // mostly so, once the maximum has settled
#pragma unroll
        for (int g = 0; g < C::GROUPS; ++g)
#pragma unroll
            for (int m = 0; m < C::MT; ++m)
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int i = 0; i < Tile::SIZE; ++i) acc[g][m][t].v[i] *= f[m][i];
    }

    static PM_DEV void pv(char* smem, const char* stage, Acc (&acc)[C::GROUPS][C::MT][4]) {
        const int warp = pm_thread() / PM_WARP;
        rescale(reinterpret_cast<const float*>(smem + C::factor), acc);
        const Swizzled<C::N / 8> weights = {smem + C::p};
        const Swizzled<C::U> value = {const_cast<char*>(stage)};
#pragma unroll
        for (int step = 0; step < C::N / 16; ++step)
#pragma unroll
            for (int g = 0; g < C::GROUPS; ++g)
                Tile::template pv<C::MT>(acc[g], weights, value, step, (warp * C::GROUPS + g) * 64);
    }

    // Final rows, or the partial ones of a split. `offset` says where each row of the tile begins, -1 for none. `vec`: final
    // rows are aligned, with their elements next to one another.
    static PM_DEV void store(const DecodeParams& p, bool partial, bool vec, const float* inverse, const i64* offset,
                             const Acc (&acc)[C::GROUPS][C::MT][4]) {
        const int warp = pm_thread() / PM_WARP;
        const i64 step = p.out_stride_d;
#pragma unroll
        for (int m = 0; m < C::MT; ++m)
#pragma unroll
            for (int set = 0; set < Tile::ROW_SETS; ++set) {
                const int r = 16 * m + Tile::run_row(set);
                const i64 at = offset[r];
                const float f = inverse[r];
                if (at < 0) continue;
                const int col0 = warp * C::GROUPS * 64;
                float* part = p.partial_out + at + col0;
                u16* out = static_cast<u16*>(p.out) + at + (vec ? col0 : col0 * step);
#pragma unroll
                for (int g = 0; g < C::GROUPS; ++g)
#pragma unroll
                    for (int j = 0; j < Tile::RUNS / Tile::ROW_SETS; ++j) {
                        const int run = j * Tile::ROW_SETS + set, col = g * 64 + Tile::run_col(run);
                        float v[Tile::RUN];
#pragma unroll
                        for (int e = 0; e < Tile::RUN; ++e) v[e] = Tile::run_value(acc[g][m], run, e) * f;
                        if (partial) {
#pragma unroll
                            for (int e = 0; e < Tile::RUN; e += 2) {
                                const Floats2 pair = {{v[e], v[e + 1]}};
                                *reinterpret_cast<Floats2*>(part + col + e) = pair;
                            }
                        } else if (vec) {
#pragma unroll
                            for (int e = 0; e < Tile::RUN; e += 2)
                                *reinterpret_cast<u32*>(out + col + e) = Elem::pack(v[e], v[e + 1]);
                        } else {
#pragma unroll
                            for (int e = 0; e < Tile::RUN; ++e) out[(col + e) * step] = Elem::from_float(v[e]);
                        }
                    }
            }
    }

    // Ends row r of the tile: its lse, where its O goes (-1: nowhere), what O is multiplied by. `bad`: some key was not there.
    static PM_DEV void finish_row(const DecodeParams& p, const Segment& s, int kv_head, int row0, int r, int limit, bool bad,
                                  float m, float l, float& inverse, i64& offset) {
        offset = -1;
        if (limit == -2) return;
        const Row row(p, kv_head, row0 + r);
        const bool invalid = bad || limit == -1;
        const bool empty = l == 0.0f;
        inverse = invalid ? pm_nan() : empty ? 0.0f : 1.0f / l;
        const float log2_sum = invalid ? pm_nan() : empty ? -pm_inf() : m + pm_log2(l);
        if (s.slot < 0) {
            store_lse(p, s.req, row, log2_sum);
            offset = out_offset(p, s.req, row);
        } else {
            const i64 at = partial_row(p, s.slot, kv_head, row0 + r);
            p.partial_lse[at] = log2_sum;
            offset = at * C::DV;
        }
    }

    // Keys that row r of the tile sees; -1 invalid, -2 no such row.
    static PM_DEV int find_limit(const DecodeParams& p, const Segment& s, int row0, int r) {
        int v = -2;
        if (row0 + r < p.s_q * p.heads_per_kv) v = visible_end(p, s.req, query_of(p, row0 + r), s.len);
        if (v == -1) report(p.status, s.req);
        return v;
    }

    typedef KvLoader<C, DECODE_THREADS> Loader;
    // What the copies of a segment wait for.
    static PM_DEV void look_up(const DecodeParams& p, const Segment& s, Loader& loader) {
        loader.first = s.begin * BLOCK_TOKENS;
        loader.last = s.bad ? loader.first : int(i64(s.end) * BLOCK_TOKENS < s.len ? s.end * BLOCK_TOKENS : s.len);
        loader.look_up(p, s, 0);
    }

    static PM_DEV void segment(const DecodeParams& p, const Segment& s, int kv_head, int row0, Loader& loader, char* smem) {
        int* limit = reinterpret_cast<int*>(smem + C::limit);
        int* bad = reinterpret_cast<int*>(smem + C::bad);
        float* scores = reinterpret_cast<float*>(smem + C::s);
        auto copy = [&](int tile, int half, char* stage) {
            typename Loader::Found found;
            loader.find(p, s, kv_head, tile, half, bad, found);
            Loader::copy(found, half, stage, p.flags & FLAG_KV_VEC16);
        };
        const int tokens = loader.last > loader.first ? loader.last - loader.first : 0;
        const int tiles = int((u32(tokens) + C::N - 1) / C::N);

        static_assert(C::M <= DECODE_THREADS, "a row a thread");
        if (pm_thread() < C::M) limit[pm_thread()] = find_limit(p, s, row0, pm_thread());
        if (s.bad) report(p.status, s.req);
        if (C::Q_COLS == C::DK && tiles > 0) load_q<C, DECODE_THREADS>(p, s.req, kv_head, row0, 0, smem, p.flags & FLAG_Q_VEC16);
#pragma unroll
        for (int t = 0; t < C::STAGES - 1; ++t) {
            if (t < tiles) {
                for (int half = 0; half < C::HALVES; ++half) copy(t, half, smem + C::kv + t * C::STAGE_BYTES);
                loader.look_up(p, s, t + 1);
            }
            pm_copy_commit();
        }

        Acc acc[C::GROUPS][C::MT][4] = {};
        RowState state = {-pm_inf(), 0.0f};
        int stage = 0;                  // of tile i
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            const int next = i + C::STAGES - 1;
            char* free_stage = smem + C::kv + (stage == 0 ? C::STAGES - 1 : stage - 1) * C::STAGE_BYTES;
            char* here = smem + C::kv + stage * C::STAGE_BYTES;
            if (C::STAGES == 1) {
                pm_sync();              // P V (i-1) is done with the stage
            } else {
                pm_copy_wait<(C::STAGES > 2 ? C::STAGES - 2 : 0)>();
                pm_sync();              // tile i has landed, P V (i-1) is done
            }
            if (i + 1 == tiles) pm_grid_release();      // not before: blocks that wait for this one take a multiprocessor
            if (next < tiles) {
                copy(next, 0, C::STAGES == 1 ? here : free_stage);
                if (C::HALVES == 1) loader.look_up(p, s, next + 1);
            }
            pm_copy_commit();
            if (C::STAGES == 1) {
                pm_copy_wait<0>();
                pm_sync();
            }
            if (C::S_OVERLAY) scores = reinterpret_cast<float*>(free_stage + C::STAGE_BYTES / 2);
            if (C::Q_COLS == C::DK)
                qk(smem, scores, here);
            else
                qk_pieces(p, s, kv_head, row0, smem, scores, here);
            pm_sync();                  // scores are there
            softmax(p, smem, scores, loader.first + i * C::N, state);
            pm_sync();                  // P is there, scores are read
            if (C::HALVES == 2 && next < tiles) {
                copy(next, 1, free_stage);
                loader.look_up(p, s, next + 1);
                pm_copy_commit();
            }
            pv(smem, here, acc);
            stage = stage == C::STAGES - 1 ? 0 : stage + 1;
        }

        pm_copy_wait<0>();
        pm_sync();                      // the last P V has read its factors, Q's room is free
        i64* offset = reinterpret_cast<i64*>(smem + C::q);
        float* inverse = reinterpret_cast<float*>(smem + C::factor);
        const int r = pm_thread() / C::TPR;
        if (pm_thread() % C::TPR == 0 && r < C::M) {
            finish_row(p, s, kv_head, row0, r, limit[r], *bad != 0, state.m, state.l, inverse[r], offset[r]);
        }
        pm_sync();
        if (s.slot < 0) {
            store(p, false, p.flags & FLAG_OUT_VEC, inverse, offset, acc);
        } else {
#ifdef PM_PIECES
            const int lane = pm_thread() % 32, warp = pm_thread() / 32;
            float f[2 * C::MT];
#pragma unroll
            for (int i = 0; i < 2 * C::MT; ++i) f[i] = inverse[lane / 4 + 8 * i];
#pragma unroll
            for (int g = 0; g < C::GROUPS; ++g) store_pieces<C::MT>(p, s.slot, kv_head, row0, warp * C::GROUPS + g, lane, f, acc[g]);
#else
            store(p, true, true, inverse, offset, acc);
#endif
        }
    }

    // Kept in shared memory by thread 0: the others have no registers to spare for it.
    struct State {
        SegmentWalk walk;
        Segment segment;
        int more;
    };

    static PM_DEV void fill(const DecodeParams& p, State& state, bool more, Segment s, char* smem) {
        // With nowhere to put a partial result, the request becomes NaN.
        if (s.slot >= p.slots) s.slot = -1;
        state.segment = s;
        state.more = more;
        *reinterpret_cast<int*>(smem + C::bad) = s.bad;
    }

    static PM_DEV void run(const DecodeParams& p, char* smem) {
        static_assert(sizeof(State) <= 64, "the room that config.h gives");
        const BlockPlace at(p, C::M);
        State& state = *reinterpret_cast<State*>(smem + C::state);
        // Every thread finds the first segment by itself, because everybody waits for its copies.
        Loader loader;
        {
            SegmentWalk walk;
            walk.begin(p, at.part);
            prefetch_table(p, at.part, pm_thread());
            Segment s = {};
            const bool more = walk.next(p, s);
            look_up(p, s, loader);
            if (pm_thread() == 0) {
                state.walk = walk;
                fill(p, state, more, s, smem);
            }
        }
        pm_sync();
        while (state.more) {
            segment(p, state.segment, at.kv_head, at.row0, loader, smem);
            pm_sync();                  // the segment is done with shared memory
            if (pm_thread() == 0) {
                Segment s = {};
                const bool more = state.walk.next(p, s);
                fill(p, state, more, s, smem);
            }
            pm_sync();
            look_up(p, state.segment, loader);
        }
    }
};

}  // namespace polymla
