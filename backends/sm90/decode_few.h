// At most 16 packed query rows: the products transposed, tokens and columns of V as M, the rows as N. Where there are few rows a tile of
// 64 would be padding: four times the work of the tensor cores, and each of its steps as long.
//
// Tile      64 tokens x 16 rows, O^T 512 x 16 f32.
// Roles     warps 0-3   S^T = K Q^T (m64n16, both operands in shared memory), softmax, P
//           warps 4-7   O^T += V^T P^T, columns   0..256: four m64n16 accumulators, 32 registers a thread
//           warps 8-11  the same, columns 256..512
//           warps 12-15 as in decode.cu; the ring of stages holds KV only, Q has the place that its tiles have there
// Pipeline  K Q^T of block j+1 runs while the other warps are at block j. There is no gate: nobody waits for the tensor cores.
//
// P (rows x tokens, as both operands want it) is S^T transposed by stmatrix, in place of the rope columns. Maxima of a row are of all four
// warps, because each has other tokens: they meet in shared memory, but only where the running maximum is not trusted (decode_qk.h).
// A segment's O goes through the place of the last block's V, for whole lines of `out` or for the order of pieces (tile.h).
#pragma once

#include "decode_pv.h"

namespace polymla {

// Of eight accumulators of an m64n16 fragment, lane (g, t): number i has token or column g + 8 * (i & 2 ? 1 : 0) of its warp's 16, and row
// 2 t + (i & 1) + 8 * (i / 4). A thread so has four rows, number of(i).
PM_DEV constexpr int few_of(int i) { return (i & 1) + i / 4 * 2; }
PM_DEV u32 few_row(u32 lane, int of) { return lane % 4 * 2 + (of & 1) + (of >> 1) * 8; }
// Where this lane's row of a transposed 16 x 16 block goes, in a tile of 128-byte rows; `pair` counts blocks along the rows.
PM_DEV u32 few_place(u32 lane, u32 pair) { return swizzle(lane % 8 + lane / 16 * 8, pair * 2 + lane / 8 % 2); }

template <class Elem, bool ROPE>
struct FewQk {
    static PM_DEV void run(const DecodeParams& p, u32 smem) {
        const u32 tid = threadIdx.x, warp = uniform(tid / 32), lane = tid % 32;
        const u32 rows = p.s_q * p.heads_per_kv;
        // Rows past the last are never loaded.
        for (u32 i = tid; i < 9 * FEW * 8; i += 128)
            if (i / 8 % FEW >= rows) st_shared_v4(smem + Smem::q_rope + i * 16, 0, 0, 0, 0);
        fence_async_shared();
        const Desc q = desc_k_major(uniform(smem + Smem::q_rope));
        u32 turn = 0, item = 0;     // of the ring: 0..2, then 3..5 with the other parity; blocks so far
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            float m[4], l[4] = {0, 0, 0, 0};
#pragma unroll
            for (int j = 0; j < 4; ++j) m[j] = few_row(lane, j) < rows ? M_INIT : __int_as_float(0x7f800000);
            int left = ld_shared(rec + SEG_END) - ld_shared(rec + SEG_BEGIN);
            // Others may still read the row sums of the segment before.
            named_barrier(BAR_QK, 128);
            if (tid < FEW) {
                const int len = ld_shared(rec + SEG_LEN);
                st_shared(smem + Smem::limit + tid * 4, tid < rows ? row_limit(p, ld_shared(rec + SEG_REQ), len, int(tid)) : len);
            }
            mbar_wait(smem + Smem::full_q, seg & 1);
            named_barrier(BAR_QK, 128);
            const int least = int(__reduce_min_sync(0xffffffffu, u32(ld_shared(smem + Smem::limit + lane % FEW * 4))));
            const int masked = ld_shared(rec + SEG_END) - least / BLOCK;
            bool trusted = false;
#pragma unroll 1
            while (left > 0) {
                float s[8];
                const u32 at = turn >= STAGES ? turn - STAGES : turn, parity = turn >= STAGES, buf = item & 1;
                const u32 stage = uniform(smem + Smem::kv + at * STAGE_BYTES), full = smem + Smem::full + at * 8;
                const Desc k = desc_k_major(stage);
                PM_MARK(0, item, 0);
                mbar_wait(full, parity);
                fence_regs(s);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    few_qk_step<Elem>(s, k + (i / 4) * (SUB >> 4) + (i % 4) * 2, q + (i / 4) * (FEW_Q >> 4) + (i % 4) * 2, i != 0);
                wgmma_commit();
                mbar_wait(full + STAGES * 8, parity);
                wgmma_fence();
#pragma unroll
                for (int i = 16; i < (ROPE ? 32 : 28); ++i) {       // the rope columns are the eighth tile of a stage, Q's are the ninth
                    const int tile = i / 4 == 7 ? 8 : i / 4;
                    few_qk_step<Elem>(s, k + (i / 4) * (SUB >> 4) + (i % 4) * 2, q + tile * (FEW_Q >> 4) + (i % 4) * 2, 1);
                }
                wgmma_commit();
                mbar_wait(smem + Smem::full_tail + buf * 8, (item >> 1) & 1);
                wgmma_fence();
                const Desc tail = desc_k_major(uniform(smem + Smem::tail + buf * SUB));
#pragma unroll
                for (int i = 0; i < 4; ++i) few_qk_step<Elem>(s, tail + i * 2, q + 7 * (FEW_Q >> 4) + i * 2, 1);
                wgmma_commit();
                wgmma_wait<0>();
                fence_regs(s);
                PM_MARK(0, item, 5);

                if (left <= masked) {
                    const int token = (ld_shared(rec + SEG_END) - left) * BLOCK + int(warp * 16 + lane / 4);
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        if (token + (i & 2 ? 8 : 0) >= ld_shared(smem + Smem::limit + few_row(lane, few_of(i)) * 4))
                            s[i] = -__int_as_float(0x7f800000);
                }
                const float scale = p.scale_log2;
                if (!trusted) {
                    // The row's largest: of this lane's two, of the warp's eight lanes, of four warps.
                    float top[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const int i = (j & 1) + (j >> 1) * 4;
                        top[j] = fmaxf(s[i], s[i + 2]) * scale;
#pragma unroll
                        for (u32 apart = 4; apart < 32; apart *= 2) top[j] = fmaxf(top[j], __shfl_xor_sync(0xffffffffu, top[j], apart));
                        if (lane < 4) st_shared_f(smem + SmemFew::warps + (warp * FEW + few_row(lane, j)) * 4, top[j]);
                    }
                    named_barrier(BAR_QK, 128);
                    bool moved = false;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const u32 from = smem + SmemFew::warps + few_row(lane, j) * 4;
#pragma unroll
                        for (u32 w = 0; w < 4; ++w) top[j] = fmaxf(top[j], ld_shared_f(from + w * FEW * 4));
                        int e = 0;
                        if (top[j] > m[j] + RESCALE_STEP) {
                            const float to = floorf(top[j]) - HEADROOM;
                            e = int(fmaxf(m[j] - to, -127.0f));
                            l[j] *= exp2_fast(float(e));
                            m[j] = to;
                            moved = true;
                        }
                        if (warp == 0 && lane < 4) st_shared_i8(smem + Smem::scale + buf * 64 + few_row(lane, j), e);
                    }
                    moved = __any_sync(0xffffffffu, moved);
                    if (tid == 0) st_shared_i8(smem + Smem::rescale + buf * 4, moved);
                } else if (tid == 0) {
                    st_shared_i8(smem + Smem::rescale + buf * 4, 0);
                }
                float sum[4] = {0, 0, 0, 0};
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    s[i] = exp2_fast(fmaf(s[i], scale, -m[few_of(i)]));
                    sum[few_of(i)] += s[i];
                }
                // All have read the rope columns, whose place P takes, and the maxima; with any weight too large, once more.
                const bool large = fmaxf(fmaxf(sum[0], sum[1]), fmaxf(sum[2], sum[3])) > SUM_LIMIT;
                if (barrier_or(BAR_QK, 128, trusted && large)) {
                    trusted = false;
                    continue;
                }
                trusted = true;
#pragma unroll
                for (int j = 0; j < 4; ++j) l[j] += sum[j];
                stmatrix_x4_trans(stage + ROPE_TILE + few_place(lane, warp), pack2<Elem>(s[0], s[1]), pack2<Elem>(s[2], s[3]),
                                  pack2<Elem>(s[4], s[5]), pack2<Elem>(s[6], s[7]));
                fence_async_shared();
                __syncwarp();
                if (arrives(lane)) mbar_arrive(smem + Smem::p_full + buf * 8);
                PM_MARK(0, item, 7);
                turn = turn == 2 * STAGES - 1 ? 0 : turn + 1;
                ++item;
                --left;
            }
            __syncwarp();
            if (arrives(lane)) mbar_arrive(smem + Smem::done_q);
            // Sums of rows: over eight lanes, then four warps.
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (u32 apart = 4; apart < 32; apart *= 2) l[j] += __shfl_xor_sync(0xffffffffu, l[j], apart);
                if (lane < 4) st_shared_f(smem + SmemFew::warps + (warp * FEW + few_row(lane, j)) * 4, l[j]);
                // Maxima are the same in all warps; limits are not needed any more.
                if (warp == 0 && lane < 4) st_shared_f(smem + Smem::limit + few_row(lane, j) * 4, m[j]);
            }
            named_barrier(BAR_QK, 128);
            mbar_wait(smem + Smem::inv_empty, (seg & 1) ^ 1);
            const int req = ld_shared(rec + SEG_REQ), slot = ld_shared(rec + SEG_SLOT), bad = ld_shared(rec + SEG_BAD);
            if (warp == 0) {
                float total = 0;
#pragma unroll
                for (u32 w = 0; w < 4; ++w) total += ld_shared_f(smem + SmemFew::warps + (w * FEW + lane % FEW) * 4);
                if (bad) total = __int_as_float(0x7fc00000);
                const float top = ld_shared_f(smem + Smem::limit + lane % FEW * 4);
                if (lane < FEW) st_shared_f(smem + SmemFew::inv + lane * 4, total == 0.0f ? 0.0f : __fdividef(1.0f, total));
                if (slot >= 0) {
                    // [g][4]: of row g, then of row g + 8 (tile.h); the other row groups of the slot are never read.
                    const i64 tile = partial_tile(p, slot, int(blockIdx.y), 0);
                    if (lane < FEW)
                        *reinterpret_cast<float2*>(p.partial_rows + tile * PARTIAL_ROWS + lane % 8 * 4 + lane / 8 * 2) = make_float2(top, total);
                } else if (lane < rows) {
                    const RowIndex r(p, int(lane));
                    p.lse[i64(req) * p.lse_stride_b + i64(r.h) * p.lse_stride_h + i64(r.s) * p.lse_stride_s] =
                        total == 0.0f ? __int_as_float(0x7f800000) : (log2_fast(total) + top) * LN2;
                }
            }
            __syncwarp();
            if (arrives(lane)) mbar_arrive(smem + Smem::inv_full);
            leave_segment(rec);
        }
    }
};

template <class Elem, bool ROPE>
struct FewPv {
    using Pv = PvWarpgroup<Elem, ROPE, false>;
    static constexpr u32 PIECE_ROW = 264 * 4;       // of a piece's 256 f32, in shared memory

    // O^T of this half -> the order of pieces, by way of shared memory.
    static PM_DEV void store_piece(const DecodeParams& p, const float (&o)[4][8], i64 tile, u32 base, u32 half) {
        const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        named_barrier(BAR_TAIL + half, 128);        // V is read
#pragma unroll
        for (u32 g = 0; g < 4; ++g)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                st_shared_f(base + few_row(lane, few_of(i)) * PIECE_ROW + (g * 64 + warp * 16 + lane / 4 + (i & 2 ? 8 : 0)) * 4, o[g][i]);
        named_barrier(BAR_TAIL + half, 128);
        char* to = reinterpret_cast<char*>(p.partial_out) + tile * PARTIAL_BYTES;
#pragma unroll 1
        for (u32 c = warp * 4; c < warp * 4 + 4; ++c) {
            const u32 from = base + lane / 4 * PIECE_ROW + (c * 16 + lane % 4 * 2) * 4, at = (half * (CHUNKS / 2) + c) * 32 + lane;
            float v[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 two = ld_shared_f2(from + (i & 1 ? 8 * PIECE_ROW : 0) + (i & 2 ? 32 : 0));
                v[2 * i] = two.x, v[2 * i + 1] = two.y;
            }
            partial_store(to + at * 16, to + PARTIAL_REST + at * 8, v);
        }
    }

    static PM_DEV void store_rows(const DecodeParams& p, const float (&o)[4][8], int req, const typename Pv::Place& place, bool placed,
                                  float empty, u32 half) {
        const u32 tid = threadIdx.x % 128, warp = tid / 32, lane = tid % 32;
        if (placed) {
            named_barrier(BAR_TAIL + half, 128);    // V is read
#pragma unroll
            for (u32 g = 0; g < 4; ++g)
                stmatrix_x4_trans(place.group(g) + few_place(lane, warp), pack2<Elem>(o[g][0], o[g][1]), pack2<Elem>(o[g][2], o[g][3]),
                                  pack2<Elem>(o[g][4], o[g][5]), pack2<Elem>(o[g][6], o[g][7]));
            named_barrier(BAR_TAIL + half, 128);
        }
        const u32 word = pack2<Elem>(empty, empty), group = lane / 8, unit = lane % 8;
#pragma unroll 1
        for (u32 row = warp; row < FEW; row += 4) {
            const RowIndex r(p, int(row));
            if (!r.valid) return;
            uint4 v = {word, word, word, word};
            if (placed) v = ld_shared_v4(place.group(group) + swizzle(row, unit));
            st_global_v4(Pv::out_row(p, req, r) + half * 256 + group * 64 + unit * 8, v);
        }
    }

    static PM_DEV void run(const DecodeParams& p, u32 smem, u32 half) {
        const u32 lane = threadIdx.x % 32;
        u32 stage = 0, item = 0;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            int left = ld_shared(rec + SEG_END) - ld_shared(rec + SEG_BEGIN);
            const bool placed = left > 0;
            float o[4][8];
#pragma unroll
            for (int i = 0; i < 32; ++i) o[i / 8][i % 8] = 0.0f;
#pragma unroll 1
            while (left > 0) {
                const u32 buf = item & 1;
                mbar_wait(smem + Smem::p_full + buf * 8, (item >> 1) & 1);
                PM_MARK(1 + half, item, 1);
                if (ld_shared_i8(smem + Smem::rescale + buf * 4)) {
                    float f[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) f[j] = exp2_fast(float(ld_shared_i8(smem + Smem::scale + buf * 64 + few_row(lane, j))));
#pragma unroll
                    for (int i = 0; i < 32; ++i) o[i / 8][i % 8] *= f[few_of(i % 8)];
                }
                const u32 stage_addr = uniform(smem + Smem::kv + stage * STAGE_BYTES);
                const typename Pv::Place v = Pv::place_of(stage_addr, smem + Smem::tail + buf * SUB, half);
                --left;
                if (left == 0) {
                    const int valid = ld_shared(rec + SEG_LEN) - (ld_shared(rec + SEG_END) - 1) * BLOCK;
                    if (valid < BLOCK) Pv::zero_tail(v, valid, half);
                }
                const Desc weights = desc_k_major(stage_addr + ROPE_TILE);
#pragma unroll
                for (int g = 0; g < 4; ++g) fence_regs(o[g]);
                wgmma_fence();
                // The late tile first, to give it back.
#pragma unroll
                for (int g = 3; g >= 0; --g) {
                    const Desc columns = desc_n_major(uniform(v.group(g)), SUB);
#pragma unroll
                    for (int k = 0; k < 4; ++k) few_pv_step<Elem>(o[g], columns + k * (2048 >> 4), weights + k * 2);
                    if (g == 3 || g == 0) wgmma_commit();
                }
                wgmma_wait<1>();
                const bool held = left == 0;        // O goes out by way of the last block's place
                if (arrives(lane) && !held) mbar_arrive(smem + Smem::empty_tail + buf * 8);
                wgmma_wait<0>();
                PM_MARK(1 + half, item, 5);
#pragma unroll
                for (int g = 0; g < 4; ++g) fence_regs(o[g]);
                __syncwarp();
                if (!held) Pv::release(smem, stage, half);
                stage = stage == STAGES - 1 ? 0 : stage + 1;
                ++item;
            }
            const int req = ld_shared(rec + SEG_REQ), slot = int(uniform(u32(ld_shared(rec + SEG_SLOT))));
            mbar_wait(smem + Smem::inv_full, seg & 1);
            float inv[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) inv[j] = ld_shared_f(smem + SmemFew::inv + few_row(lane, j) * 4);
            // The first row's of this lane, where there are no blocks: 0, or NaN of an invalid request.
            const float empty = 0.0f * ld_shared_f(smem + SmemFew::inv);
            leave_segment(rec);
            if (arrives(lane)) mbar_arrive(smem + Smem::inv_empty);
            const u32 last = stage == 0 ? STAGES - 1 : stage - 1, buf = ~item & 1;
            const u32 stage_addr = smem + Smem::kv + last * STAGE_BYTES;
            const typename Pv::Place place = Pv::place_of(stage_addr, smem + Smem::tail + buf * SUB, half);
            if (slot >= 0) {
                // A piece without blocks has no place; its weights are 0, but O must be a number.
                if (placed) store_piece(p, o, partial_tile(p, slot, int(blockIdx.y), 0), place.pair0, half);
                else store_nothing(p, partial_tile(p, slot, int(blockIdx.y), 0), half);
            } else {
#pragma unroll
                for (int i = 0; i < 32; ++i) o[i / 8][i % 8] *= inv[few_of(i % 8)];
                store_rows(p, o, req, place, placed, empty, half);
            }
            PM_MARK(1 + half, item - 1, 8);
            if (placed) {
                fence_async_shared();
                __syncwarp();
                if (arrives(lane)) mbar_arrive(smem + Smem::empty_tail + buf * 8);
                Pv::release(smem, last, half);
            }
        }
    }

    static PM_DEV void store_nothing(const DecodeParams& p, i64 tile, u32 half) {
        char* to = reinterpret_cast<char*>(p.partial_out) + tile * PARTIAL_BYTES;
        const float zeros[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll 1
        for (u32 c = warp * 4; c < warp * 4 + 4; ++c) {
            const u32 at = (half * (CHUNKS / 2) + c) * 32 + lane;
            partial_store(to + at * 16, to + PARTIAL_REST + at * 8, zeros);
        }
    }
};

}  // namespace polymla
