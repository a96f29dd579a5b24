// The two PV warpgroups: O += P V, one half of the 512 columns each, 64 x 256 f32 in
// 128 registers a thread; then the epilogue straight from registers.
//
// A whole request is written to `out`; a piece of one goes to the workspace, normalised,
// in fragment order with its base-2 log-sum-exp. The epilogue touches no shared memory,
// so the producer and the QK warpgroup are already at work on the next request.
#pragma once

#include "decode_qk.h"

namespace polymla {

constexpr float LN2 = 0.6931471805599453f;

template <class Elem, bool ROPE, bool GATHER>
struct PvWarpgroup {
    // Zeroes V rows [valid, 64) of this half: their bytes may be NaN, and 0 * NaN is NaN.
    static PM_DEV void zero_tail(u32 half_addr, int valid, u32 half) {
        const u32 tid = threadIdx.x % 128;
        for (u32 u = u32(valid) * 32 + tid; u < BLOCK * 32; u += 128) {
            const u32 row = u / 32, unit = u % 32;
            st_shared_v4(half_addr + (unit / 8) * SUB + swizzle(row, unit % 8), 0, 0, 0, 0);
        }
        fence_async_shared();
        named_barrier(BAR_TAIL + half, 128);
    }

    static PM_DEV void store_partial(const DecodeParams& p, const float (&o)[128], i64 tile, u32 half) {
        const u32 warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
        const float* dst = p.partial_out + (((tile * 4 + warp) * 2 + half) * 1024 + lane) * 4;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(dst + i * 128), "f"(o[4 * i]),
                         "f"(o[4 * i + 1]), "f"(o[4 * i + 2]), "f"(o[4 * i + 3])
                         : "memory");
    }

    // Two packed rows of this half, 32 columns at a time: the quad transposes its words so that
    // every lane stores 16 contiguous bytes.
    static PM_DEV void store_rows(const DecodeParams& p, const float (&o)[128], int req, int row, u32 half) {
        const u32 t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const RowIndex r(p, row + 8 * k);
            u16* dst = reinterpret_cast<u16*>(p.out) + i64(req) * p.out_stride_b + i64(r.s) * p.out_stride_s +
                       i64(r.h) * p.out_stride_h + half * 256 * p.out_stride_d;
            if (!(p.flags & FLAG_OUT_VEC16)) {
                dst += 2 * t * p.out_stride_d;
                if (r.valid)
#pragma unroll
                    for (int i = 0; i < 32; ++i) {
                        const u32 w = pack2<Elem>(o[4 * i + 2 * k], o[4 * i + 2 * k + 1]);
                        dst[0] = u16(w);
                        dst[p.out_stride_d] = u16(w >> 16);
                        dst += 8 * p.out_stride_d;
                    }
                continue;
            }
            dst += t * 8;
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                u32 a = pack2<Elem>(o[4 * i + 2 * k], o[4 * i + 2 * k + 1]);
                u32 b = pack2<Elem>(o[4 * i + 2 * k + 4], o[4 * i + 2 * k + 5]);
                u32 c = pack2<Elem>(o[4 * i + 2 * k + 8], o[4 * i + 2 * k + 9]);
                u32 d = pack2<Elem>(o[4 * i + 2 * k + 12], o[4 * i + 2 * k + 13]);
                swap_lanes<2>(a, c, t & 2);
                swap_lanes<2>(b, d, t & 2);
                swap_lanes<1>(a, b, t & 1);
                swap_lanes<1>(c, d, t & 1);
                if (r.valid)
                    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(dst + i * 8), "r"(a), "r"(b), "r"(c),
                                 "r"(d)
                                 : "memory");
            }
        }
    }

    // Exchanges lo of the lanes with the bit set against hi of those without.
    template <int BIT>
    static PM_DEV void swap_lanes(u32& lo, u32& hi, bool set) {
        const u32 got = __shfl_xor_sync(0xffffffffu, set ? lo : hi, BIT);
        if (set) lo = got; else hi = got;
    }

    // lse of this thread's two rows, by the left warpgroup's first lane of each quad.
    static PM_DEV void store_lse(const DecodeParams& p, const float (&l)[2], const float (&m)[2], int req, int slot) {
        const u32 warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
        const float inf = __int_as_float(0x7f800000);
        if (lane % 4 != 0) return;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int row = int(warp * 16 + lane / 4) + 8 * k;
            if (slot >= 0) {
                const i64 tile = partial_tile(p, slot, blockIdx.y, blockIdx.x);
                p.partial_lse[tile * TILE_M + row] = l[k] == 0.0f ? -inf : log2f(l[k]) + m[k];
            } else {
                const RowIndex r(p, blockIdx.x * TILE_M + row);
                if (r.valid)
                    p.lse[i64(req) * p.lse_stride_b + i64(r.h) * p.lse_stride_h + i64(r.s) * p.lse_stride_s] =
                        l[k] == 0.0f ? inf : logf(l[k]) + m[k] * LN2;
            }
        }
    }

    // O / l, in place, then out. l is 0 where no key was seen and NaN for an invalid request.
    static PM_DEV void store(const DecodeParams& p, float (&o)[128], const float (&l)[2], const float (&m)[2], int req,
                             int slot, u32 half) {
        const u32 warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
        const int first = int(blockIdx.x * TILE_M + warp * 16);
        if (first >= p.s_q * p.heads_per_kv) return;
        if (half == 0) store_lse(p, l, m, req, slot);
        const float inv0 = l[0] == 0.0f ? 0.0f : 1.0f / l[0];
        const float inv1 = l[1] == 0.0f ? 0.0f : 1.0f / l[1];
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            o[4 * i] *= inv0;
            o[4 * i + 1] *= inv0;
            o[4 * i + 2] *= inv1;
            o[4 * i + 3] *= inv1;
        }
        fence_regs(o);
        if (slot >= 0) {
            store_partial(p, o, partial_tile(p, slot, blockIdx.y, blockIdx.x), half);
        } else {
            store_rows(p, o, req, first + int(lane / 4), half);
        }
    }

    static PM_DEV void run(const DecodeParams& p, const TensorMap* map, const TensorMap* map_kpe, u32 smem, u32 half) {
        const u32 warp = threadIdx.x / 32 % 4;
        float o[128];
        Ring kv;
        u32 item = 0;
        // The rope columns are the business of warp 1 of the right half: `rope` is the block to
        // load when Q K^T of the one before it is through.
        const bool rope_warp = ROPE && !GATHER && half && warp == 1;
        BoxAt rope{0, 0};

        {
            const int begin = ld_shared(segment_record(smem, 0) + SEG_BEGIN);
#pragma unroll 1
            for (int i = 0; i < STAGES; ++i) {
                if (GATHER)
                    load_half_gather(p, smem, 0, begin + i, half, i);
                else if (warp == 0)
                    load_half_tma<ROPE>(p, map, map_kpe, smem, locate(p, smem, 0, begin + i), half, i);
            }
            if (rope_warp) {
                load_rope_tma(p, map_kpe, smem, locate(p, smem, 0, begin));
                rope = locate(p, smem, 0, begin + 1);
            }
        }
#pragma unroll 1
        for (u32 seg = 0;; ++seg) {
            const u32 rec = segment_record(smem, seg);
            if (ld_shared(rec + SEG_REQ) < 0) break;
            int blk = ld_shared(rec + SEG_BEGIN);
            const int end = ld_shared(rec + SEG_END);
            float l[2], m[2];
            int fresh = 0;      // 0 until O holds something
#pragma unroll 1
            do {
                const u32 buf = item & 1, use = (item >> 1) & 1;
                PM_MARK(1 + half, item, 0);
                mbar_wait(smem + Smem::p_full + buf * 8, use);
                PM_MARK(1 + half, item, 1);
                if (rope_warp && rope.boxes) {
                    mbar_wait(smem + Smem::done_rope, item & 1);
                    load_rope_tma(p, map_kpe, smem, rope);
                }
                if (fresh && ld_shared(smem + Smem::rescale + buf * 16 + warp * 4)) {
                    const u32 at = smem + Smem::scale + buf * 128 + (warp * 16 + threadIdx.x % 32 / 4) * 2;
                    short e0, e1;
                    asm volatile("ld.shared.s16 %0, [%1];" : "=h"(e0) : "r"(at) : "memory");
                    asm volatile("ld.shared.s16 %0, [%1];" : "=h"(e1) : "r"(at + 16) : "memory");
                    const float f0 = exp2_fast(float(e0)), f1 = exp2_fast(float(e1));
#pragma unroll
                    for (int i = 0; i < 32; ++i) {
                        o[4 * i] *= f0;
                        o[4 * i + 1] *= f0;
                        o[4 * i + 2] *= f1;
                        o[4 * i + 3] *= f1;
                    }
                }
                const u32 half_addr = smem + Smem::kv + kv.stage * STAGE_BYTES + half * HALF;
                // The block itself landed before its Q K^T; that P is here says so.
                if (GATHER) fence_async_shared();
                if (blk + 1 == end) {
                    const int valid = ld_shared(rec + SEG_LEN) - blk * BLOCK;
                    if (valid < BLOCK) zero_tail(half_addr, valid, half);
                }
                PM_MARK(1 + half, item, 2);
                mbar_wait(smem + Smem::gate + buf * 8, use);
                PM_MARK(1 + half, item, 3);

                const u64 desc_p = desc_k_major(smem + Smem::p + buf * SUB);
                const u64 desc_v = desc_n_major(half_addr);
                fence_regs(o);
                wgmma_fence();
                pv_step<Elem>(o, desc_p, desc_v, fresh);
#pragma unroll
                for (int k = 1; k < 4; ++k) pv_step<Elem>(o, desc_p + k * 2, desc_v + k * (2048 >> 4), 1);
                wgmma_commit();
                PM_MARK(1 + half, item, 4);
                BoxAt next{0, 0};       // what to load when this stage is free, looked up under the wgmma
                if (!GATHER && warp == 0) next = locate(p, smem, seg, blk + STAGES);
                if (rope_warp) {
                    rope = locate(p, smem, seg, blk + 2);
                    // Q K^T of the next block is through, as a rule: it opened our gate.
                    if (rope.boxes && __all_sync(0xffffffffu, mbar_test(smem + Smem::done_rope, (item + 1) & 1))) {
                        load_rope_tma(p, map_kpe, smem, rope);
                        rope.boxes = 0;
                    }
                }
                wgmma_wait<0>();
                PM_MARK(1 + half, item, 5);
                fence_regs(o);
                fresh = 1;
                if (blk + 1 == end) {
                    const u32 at = smem + warp * 2048 + (threadIdx.x % 32 & ~3u);
                    m[0] = ld_shared_f(at + Smem::row_m);
                    m[1] = ld_shared_f(at + Smem::row_m + 32);
                    l[0] = ld_shared_f(at + Smem::row_l);
                    l[1] = ld_shared_f(at + Smem::row_l + 32);
                }
                __syncwarp();
                if (threadIdx.x % 32 == 0) {
                    mbar_arrive(smem + Smem::p_empty + buf * 8);
                    mbar_arrive(smem + Smem::done_half + half * 8);
                }
                if (GATHER || warp == 0) {
                    mbar_wait(smem + Smem::done_half + half * 8, item & 1);
                    PM_MARK(1 + half, item, 6);
                    if (GATHER) {
                        load_half_gather(p, smem, seg, blk + STAGES, half, kv.stage);
                    } else {
                        load_half_tma<ROPE>(p, map, map_kpe, smem, next, half, kv.stage);
                    }
                }
                PM_MARK(1 + half, item, 7);
                kv.advance();
                ++item;
            } while (++blk < end);
            store(p, o, l, m, ld_shared(rec + SEG_REQ), ld_shared(rec + SEG_SLOT), half);
                PM_MARK(1 + half, item, 8);
        }
    }
};

}  // namespace polymla
