// The QK warpgroup: S = Q K^T, online softmax, P to shared memory.
//
// Q (64 x 576) lives in registers, 144 a thread, for a whole segment. The running
// maximum is lazy: it moves only when a block exceeds it by more than 8 (base 2), so
// P stays below 2^8 and the PV warpgroups almost never rescale O. A P buffer carries,
// beside P itself, the factor for O when the maximum did move.
//
// The gate: PV(j) is held back until Q K^T(j+1) is nearly through the tensor cores,
// because then PV(j) covers the softmax of block j+1. When block j+1 has not landed
// yet there is nothing to wait for and the gate opens at once.
#pragma once

#include "decode_walk.h"

namespace polymla {

constexpr float M_INIT = -1e30f;       // below any scaled logit, finite so that differences are
constexpr float RESCALE_STEP = 8.0f;   // lazy maximum: P <= 2^8

template <class Elem, bool ROPE, bool GATHER>
struct QkWarpgroup {
    // Loads this warp's 16 rows of Q, coalesced, and turns them into A fragments through the
    // warp's own rows of the P buffers (2 KiB in each). The rope columns stay in shared memory.
    static PM_DEV void load_q(const DecodeParams& p, u32 (&q)[32][4], u32 smem, int req, u32 item) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        u32 pe[4][4];
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

    // Refills the rope sub-tile with the block after block blk - 1 of segment seg.
    static PM_DEV void load_rope(const DecodeParams& p, const TensorMap* map, u32 smem, u32 seg, int blk) {
        if (!normalise(smem, seg, blk)) return;
        if (GATHER)
            load_rope_gather(p, smem, seg, blk);
        else
            load_rope_tma(p, map, smem, seg, blk);
    }

    static PM_DEV void run(const DecodeParams& p, const TensorMap* map_kpe, u32 smem) {
        const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        u32 q[32][4];
        Ring kv;
        u32 item = 0;

        if (ROPE && (GATHER || warp == 0)) load_rope(p, map_kpe, smem, 0, ld_shared(segment_record(smem, 0) + SEG_BEGIN));
#pragma unroll 1
        for (u32 seg = 0;; ++seg) {
            const u32 rec = segment_record(smem, seg);
            const int req = ld_shared(rec + SEG_REQ);
            if (req < 0) break;
            if (warp == 0) walk_step<Elem>(p, smem, seg + 3);
            load_q(p, q, smem, req, item);
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
            bool gated = false;     // the previous block's PV still waits for us

#pragma unroll 1
            do {
                float s[32];
                // ---- S = Q K^T
                const u64 desc = desc_k_major(smem + Smem::kv + kv.stage * STAGE_BYTES);
                mbar_wait(smem + Smem::full_l + kv.stage * 8, kv.parity);
                if (GATHER) fence_async_shared();
                fence_regs(s);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 16; ++k)
                    qk_step<Elem>(s, q[k], desc + (k / 4) * (SUB >> 4) + (k % 4) * 2, k != 0);
                mbar_wait(smem + Smem::full_r + kv.stage * 8, kv.parity);
                if (GATHER) fence_async_shared();
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
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        qk_step_shared<Elem>(s, desc_k_major(smem + Smem::q_rope) + k * 2,
                                             desc_k_major(smem + Smem::rope) + k * 2);
                    wgmma_commit();
                }
                wgmma_wait<1>();
                if (gated && threadIdx.x == 0) mbar_arrive(smem + Smem::gate + ((item + 1) & 1) * 8);
                wgmma_wait<0>();
                fence_regs(s);
                if (ROPE) {
                    __syncwarp();
                    if (lane == 0) mbar_arrive(smem + Smem::done_rope);
                    if (GATHER || warp == 0) {
                        mbar_wait(smem + Smem::done_rope, item & 1);
                        load_rope(p, map_kpe, smem, seg, blk + 1);
                    }
                }

                // ---- mask, running maximum
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
                float top0 = fmaxf(s[0], s[1]), top1 = fmaxf(s[2], s[3]);
#pragma unroll
                for (int i = 1; i < 8; ++i) {
                    top0 = fmaxf(top0, fmaxf(s[4 * i], s[4 * i + 1]));
                    top1 = fmaxf(top1, fmaxf(s[4 * i + 2], s[4 * i + 3]));
                }
                top0 = fmaxf(top0, __shfl_xor_sync(0xffffffffu, top0, 1));
                top1 = fmaxf(top1, __shfl_xor_sync(0xffffffffu, top1, 1));
                const float scale = p.scale_log2;
                top0 = fmaxf(top0, __shfl_xor_sync(0xffffffffu, top0, 2)) * scale;
                top1 = fmaxf(top1, __shfl_xor_sync(0xffffffffu, top1, 2)) * scale;
                const bool up0 = top0 > m[0] + RESCALE_STEP, up1 = top1 > m[1] + RESCALE_STEP;
                const bool rescale = __any_sync(0xffffffffu, up0 || up1);
                int e0 = 0, e1 = 0;     // exponents: the factor is a power of two, so rescaling is exact
                if (rescale) {
                    if (up0) {
                        top0 = ceilf(top0);
                        e0 = int(fmaxf(m[0] - top0, -1000.0f));
                        m[0] = top0;
                    }
                    if (up1) {
                        top1 = ceilf(top1);
                        e1 = int(fmaxf(m[1] - top1, -1000.0f));
                        m[1] = top1;
                    }
                    l[0] *= exp2_fast(float(e0));
                    l[1] *= exp2_fast(float(e1));
                }

                // ---- P = 2^(scale * S - m), row sums
                u32 packed[16];
                float sum0 = 0, sum1 = 0;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float a = exp2_fast(fmaf(s[4 * i], scale, -m[0]));
                    const float b = exp2_fast(fmaf(s[4 * i + 1], scale, -m[0]));
                    const float c = exp2_fast(fmaf(s[4 * i + 2], scale, -m[1]));
                    const float d = exp2_fast(fmaf(s[4 * i + 3], scale, -m[1]));
                    sum0 += a + b;
                    sum1 += c + d;
                    packed[2 * i] = pack2<Elem>(a, b);
                    packed[2 * i + 1] = pack2<Elem>(c, d);
                }
                l[0] += sum0;
                l[1] += sum1;

                // ---- hand P over
                const u32 buf = item & 1;
                mbar_wait(smem + Smem::p_empty + buf * 8, ((item >> 1) & 1) ^ 1);
                const u32 tile = smem + Smem::p + buf * SUB + warp * 2048;
#pragma unroll
                for (int i = 0; i < 8; i += 2)
                    stmatrix_x4(tile + swizzle(lane % 16, i + lane / 16), packed[2 * i], packed[2 * i + 1],
                                packed[2 * i + 2], packed[2 * i + 3]);
                if (lane == 0) st_shared(smem + Smem::rescale + buf * 16 + warp * 4, rescale);
                if (rescale && lane % 4 == 0) {
                    const u32 at = smem + Smem::scale + buf * 128 + (warp * 16 + lane / 4) * 2;
                    asm volatile("st.shared.s16 [%0], %1;" ::"r"(at), "h"(short(e0)) : "memory");
                    asm volatile("st.shared.s16 [%0], %1;" ::"r"(at + 16), "h"(short(e1)) : "memory");
                }
                const bool last = blk + 1 == end;
                if (last) {
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
                }
                fence_async_shared();
                __syncwarp();
                if (lane == 0) mbar_arrive(smem + Smem::p_full + buf * 8);
                kv.advance();
                gated = !last && mbar_test(smem + Smem::full_l + kv.stage * 8, kv.parity) &&
                        mbar_test(smem + Smem::full_r + kv.stage * 8, kv.parity);
                if (!gated && threadIdx.x == 0) mbar_arrive(smem + Smem::gate + buf * 8);
                ++item;
            } while (++blk < end);
        }
    }
};

}  // namespace polymla
