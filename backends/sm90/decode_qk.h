// The QK warpgroup: S = Q K^T, online softmax, P to shared memory.
//
// Q (64 x 576) lives in registers, 144 a thread, for a whole segment. The running
// maximum is lazy: it moves only when a block exceeds it by more than 8 (base 2), so
// P stays below 2^8 and the PV warpgroups almost never rescale O. A P buffer carries,
// beside P itself, the factor for O when the maximum did move.
//
// The gate: PV(j) is held back until Q K^T(j+1) is nearly through the tensor cores,
// because then PV(j) covers the softmax of block j+1. When block j+1 has not landed
// yet there is nothing to wait for and the gate opens at once; so it does with a single
// M tile, which is bound by memory: an early PV(j) gives its stage back early.
#pragma once

#include "decode_walk.h"

namespace polymla {

constexpr float M_INIT = -1e30f;       // below any scaled logit, finite so that differences are
constexpr float RESCALE_STEP = 8.0f;   // lazy maximum: P <= 2^8

template <class Elem, bool ROPE, bool GATHER>
struct QkWarpgroup {
    // Loads this warp's 16 rows of Q, coalesced.
    static PM_DEV void fetch_q(const DecodeParams& p, u32 (&q)[32][4], u32 (&pe)[4][4], int req) {
        u32 lane = threadIdx.x % 32;
        const u32 warp = threadIdx.x / 32;
        asm volatile("" : "+r"(lane));      // addresses are worth recomputing, not keeping in registers
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const RowIndex r(p, blockIdx.x * TILE_M + int(warp * 16 + lane / 8) + 4 * i);
            const u16* nope = reinterpret_cast<const u16*>(p.q_nope) + i64(req) * p.q_nope_stride_b +
                              i64(r.s) * p.q_nope_stride_s + i64(r.h) * p.q_nope_stride_h + (lane % 8) * 8;
#pragma unroll
            for (int c = 0; c < 8; ++c) load16(q[c * 4 + i], nope + c * 64, r.valid);
            if (ROPE)
                load16(pe[i],
                       reinterpret_cast<const u16*>(p.q_pe) + i64(req) * p.q_pe_stride_b + i64(r.s) * p.q_pe_stride_s +
                           i64(r.h) * p.q_pe_stride_h + (lane % 8) * 8,
                       r.valid);
        }
    }

    // Turns them into A fragments through the warp's own rows of the P buffers (2 KiB in each).
    // The rope columns and the last 16 of the others stay in shared memory.
    static PM_DEV void stage_q(u32 (&q)[32][4], const u32 (&pe)[4][4], u32 smem, u32 item) {
        u32 lane = threadIdx.x % 32;
        const u32 warp = threadIdx.x / 32;
        asm volatile("" : "+r"(lane));
        // Every warp is done with the previous segment's Q, and both P buffers with their P.
        named_barrier(BAR_QK, 128);
        mbar_wait(smem + Smem::p_empty + (item & 1) * 8, ((item >> 1) & 1) ^ 1);
        mbar_wait(smem + Smem::p_empty + ((item + 1) & 1) * 8, (((item + 1) >> 1) & 1) ^ 1);
        if (ROPE) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                st_shared_v4(smem + Smem::q_rope + warp * 2048 + swizzle(lane / 8 + 4 * i, lane % 8), pe[i][0],
                             pe[i][1], pe[i][2], pe[i][3]);
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const u32 tile = smem + Smem::p + (c & 1) * SUB + warp * 2048;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32(&d)[4] = q[c * 4 + i];
                const u32 row = lane / 8 + 4 * i, unit = lane % 8;
                st_shared_v4(tile + swizzle(row, unit), d[0], d[1], d[2], d[3]);
                if (c == 7 && unit >= 6)
                    st_shared_v4(smem + Smem::q_last + warp * 512 + row / 8 * 256 + (unit - 6) * 128 + row % 8 * 16, d[0],
                                 d[1], d[2], d[3]);
            }
            if (c == 7) fence_async_shared();
            __syncwarp();
#pragma unroll
            for (int k = 0; k < (c < 7 ? 4 : 3); ++k) ldmatrix_x4(q[c * 4 + k], tile + swizzle(lane % 16, 2 * k + lane / 16));
        }
        named_barrier(BAR_QK, 128);
    }

    static PM_DEV void load16(u32 (&d)[4], const u16* src, bool valid) {
        d[0] = d[1] = d[2] = d[3] = 0;
        if (valid)
            asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                         : "l"(src));
    }

    // The largest of eight of a row's sixteen logits in this lane.
    template <int AT>
    static PM_DEV float max_of(const float (&s)[32]) {
        const float a = fmaxf(fmaxf(s[AT], s[AT + 1]), fmaxf(s[AT + 4], s[AT + 5]));
        return fmaxf(a, fmaxf(fmaxf(s[AT + 8], s[AT + 9]), fmaxf(s[AT + 12], s[AT + 13])));
    }

    // Raises a row's running maximum when the row's block exceeds it; returns the exponent of the factor.
    static PM_DEV int raise(float& m, float& l, float top) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        if (!(top > m + RESCALE_STEP)) return 0;
        top = ceilf(top);
        const int e = int(fmaxf(m - top, -1000.0f));
        l *= exp2_fast(float(e));
        m = top;
        return e;
    }

    // P number `item` is in shared memory: tell the PV warpgroups, and open the gate unless that
    // is left to the next block's Q K^T.
    static PM_DEV void hand_over(u32 smem, u32 item, bool open) {
        fence_async_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbar_arrive(smem + Smem::p_full + (item & 1) * 8);
        if (open && threadIdx.x == 0) mbar_arrive(smem + Smem::gate + (item & 1) * 8);
    }

    static PM_DEV void run(const DecodeParams& p, u32 smem) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        u32 q[32][4];
        Ring kv;
        u32 item = 0;

#pragma unroll 1
        for (u32 seg = 0;; ++seg) {
            const u32 rec = segment_record(smem, seg);
            const int req = ld_shared(rec + SEG_REQ);
            if (req < 0) break;
            {
                u32 pe[4][4];
                PM_MARK(0, 0, 13);
                fetch_q(p, q, pe, req);
                PM_MARK(0, 0, 14);
                if (ROPE && GATHER && seg == 0) load_rope_gather(p, smem, 0, ld_shared(rec + SEG_BEGIN));
                if (warp == 0) walk_step<Elem>(p, smem, seg + 3);
                stage_q(q, pe, smem, item);
                PM_MARK(0, 0, 15);
            }
            int blk = ld_shared(rec + SEG_BEGIN);
            const int end = ld_shared(rec + SEG_END);
            int mask_from;      // first block in which some row of this warp is masked
            {
                const int len = ld_shared(rec + SEG_LEN);
                const int row = blockIdx.x * TILE_M + int(warp * 16 + lane / 4);
                const int limit0 = row_limit(p, req, len, row), limit1 = row_limit(p, req, len, row + 8);
                if (lane % 4 == 0) {
                    st_shared(smem + Smem::limit + (warp * 16 + lane / 4) * 4, limit0);
                    st_shared(smem + Smem::limit + (warp * 16 + lane / 4) * 4 + 32, limit1);
                }
                mask_from = int(__reduce_min_sync(0xffffffffu, u32(min(limit0, limit1)))) / BLOCK;
                __syncwarp();
            }
            float m[2] = {M_INIT, M_INIT}, l[2] = {0.0f, 0.0f};

#pragma unroll 1
            for (bool first = true;; first = false) {
                float s[32];
                // ---- S = Q K^T. When the block has landed its first steps go ahead of handing
                // over the previous P: the PV warpgroups are held at the gate anyway.
                PM_MARK(0, item, 0);
                const u64 desc = desc_k_major(smem + Smem::kv + kv.stage * STAGE_BYTES);
                const u32 full_l = smem + Smem::full_l + kv.stage * 8;
                const bool landed = !first && p.m_tiles > 1 && __all_sync(0xffffffffu, mbar_test(full_l, kv.parity));
                if (!landed) {
                    if (!first) hand_over(smem, item - 1, true);
                    mbar_wait(full_l, kv.parity);
                }
                if (GATHER) fence_async_shared();
                PM_MARK(0, item, 1);
                fence_regs(s);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 16; ++k)
                    qk_step<Elem>(s, q[k], desc + (k / 4) * (SUB >> 4) + (k % 4) * 2, k != 0);
                if (landed) hand_over(smem, item - 1, false);
                mbar_wait(smem + Smem::full_r + kv.stage * 8, kv.parity);
                if (GATHER) fence_async_shared();
                PM_MARK(0, item, 2);
                wgmma_fence();
#pragma unroll
                for (int k = 16; k < 28; ++k)
                    qk_step<Elem>(s, q[k], desc + (k / 4) * (SUB >> 4) + (k % 4) * 2, 1);
                if (!ROPE) wgmma_commit();
#pragma unroll
                for (int k = 28; k < 31; ++k)
                    qk_step<Elem>(s, q[k], desc + (k / 4) * (SUB >> 4) + (k % 4) * 2, 1);
                qk_step_shared<Elem>(s, desc_q_last(smem + Smem::q_last), desc + 7 * (SUB >> 4) + 6);
                wgmma_commit();
                if (ROPE) {
                    mbar_wait(smem + Smem::full_rope, item & 1);
                    if (GATHER) fence_async_shared();
                    PM_MARK(0, item, 3);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        qk_step_shared<Elem>(s, desc_k_major(smem + Smem::q_rope) + k * 2,
                                             desc_k_major(smem + Smem::rope) + k * 2);
                    wgmma_commit();
                }
                // P's buffer is free by now, as a rule: the P V before last is through.
                const u32 buf = item & 1;
                mbar_wait(smem + Smem::p_empty + buf * 8, ((item >> 1) & 1) ^ 1);
                wgmma_wait<1>();
                if (landed && threadIdx.x == 0) mbar_arrive(smem + Smem::gate + ((item + 1) & 1) * 8);
                PM_MARK(0, item, 4);
                wgmma_wait<0>();
                fence_regs(s);
                PM_MARK(0, item, 5);
                if (ROPE) {
                    __syncwarp();
                    if (lane == 0) mbar_arrive(smem + Smem::done_rope);
                    if (GATHER) {
                        mbar_wait(smem + Smem::done_rope, item & 1);
                        u32 next_seg = seg;
                        int next_blk = blk + 1;
                        if (normalise(smem, next_seg, next_blk)) load_rope_gather(p, smem, next_seg, next_blk);
                    }
                }
                PM_MARK(0, item, 6);

                // ---- mask
                if (blk >= mask_from) {
                    const u32 at = smem + Smem::limit + (warp * 16 + lane / 4) * 4;
                    const int tok = blk * BLOCK + int(lane % 4) * 2;
                    const int limit0 = ld_shared(at), limit1 = ld_shared(at + 32);
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        if (tok + 8 * i >= limit0) s[4 * i] = -__int_as_float(0x7f800000);
                        if (tok + 8 * i + 1 >= limit0) s[4 * i + 1] = -__int_as_float(0x7f800000);
                        if (tok + 8 * i >= limit1) s[4 * i + 2] = -__int_as_float(0x7f800000);
                        if (tok + 8 * i + 1 >= limit1) s[4 * i + 3] = -__int_as_float(0x7f800000);
                    }
                }
                // ---- running maximum; each lane looks at its own logits, the quad only meets when it moves
                const float scale = p.scale_log2;
                float top0 = fmaxf(max_of<0>(s), max_of<16>(s)) * scale;
                float top1 = fmaxf(max_of<2>(s), max_of<18>(s)) * scale;
                const bool rescale =
                    __any_sync(0xffffffffu, top0 > m[0] + RESCALE_STEP || top1 > m[1] + RESCALE_STEP);
                if (lane == 0) st_shared(smem + Smem::rescale + buf * 16 + warp * 4, rescale);
                if (rescale) {
                    // Exponents: the factor is a power of two, so rescaling is exact.
                    const int e0 = raise(m[0], l[0], top0), e1 = raise(m[1], l[1], top1);
                    if (lane % 4 == 0) {
                        const u32 at = smem + Smem::scale + buf * 128 + (warp * 16 + lane / 4) * 2;
                        asm volatile("st.shared.s16 [%0], %1;" ::"r"(at), "h"(short(e0)) : "memory");
                        asm volatile("st.shared.s16 [%0], %1;" ::"r"(at + 16), "h"(short(e1)) : "memory");
                    }
                }

                // ---- P = 2^(scale * S - m), row sums
                const u32 tile = smem + Smem::p + buf * SUB + warp * 2048;
                float sum[4] = {0, 0, 0, 0};
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
#pragma unroll
                    for (int k = 0; k < 8; ++k) {
                        float& x = s[4 * i + k];
                        x = exp2_fast(fmaf(x, scale, -m[(k >> 1) & 1]));
                    }
                    sum[0] += s[4 * i] + s[4 * i + 1];
                    sum[1] += s[4 * i + 2] + s[4 * i + 3];
                    sum[2] += s[4 * i + 4] + s[4 * i + 5];
                    sum[3] += s[4 * i + 6] + s[4 * i + 7];
                    stmatrix_x4(tile + swizzle(lane % 16, i + lane / 16), pack2<Elem>(s[4 * i], s[4 * i + 1]),
                                pack2<Elem>(s[4 * i + 2], s[4 * i + 3]), pack2<Elem>(s[4 * i + 4], s[4 * i + 5]),
                                pack2<Elem>(s[4 * i + 6], s[4 * i + 7]));
                }
                l[0] += sum[0] + sum[2];
                l[1] += sum[1] + sum[3];
                PM_MARK(0, item, 7);
                kv.advance();
                ++item;
                if (++blk == end) break;
            }
            l[0] += __shfl_xor_sync(0xffffffffu, l[0], 1);
            l[1] += __shfl_xor_sync(0xffffffffu, l[1], 1);
            l[0] += __shfl_xor_sync(0xffffffffu, l[0], 2);
            l[1] += __shfl_xor_sync(0xffffffffu, l[1], 2);
            if (ld_shared(rec + SEG_BAD)) l[0] = l[1] = __int_as_float(0x7fc00000);
            if (lane % 4 == 0) {
                const u32 at = smem + warp * 2048 + lane;
                st_shared_f(at + Smem::row_m, m[0]);
                st_shared_f(at + Smem::row_m + 32, m[1]);
                st_shared_f(at + Smem::row_l, l[0]);
                st_shared_f(at + Smem::row_l + 32, l[1]);
            }
            hand_over(smem, item - 1, true);
        }
    }
};

}  // namespace polymla
