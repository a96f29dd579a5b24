// The two PV warpgroups: O += P V, one half of the 512 columns each, 64 x 256 f32 in
// 128 registers a thread; then the epilogue.
//
// A piece of a request goes to the workspace straight from registers, not normalised, in fragment order. A whole request goes to
// `out` by way of the place that V's half of the last block had, so that whole lines are written; that stage goes back to the
// loaders late, but they and the QK warpgroup are already at work on the next request in the other two. In the gather form `out`
// may have any strides.
#pragma once

#include "decode_qk.h"

namespace polymla {

template <class Elem, bool ROPE, bool GATHER>
struct PvWarpgroup {
    // Where V's half of a block lies, and then O's: four groups of 64 columns.
    struct Place {
        u32 pair0, pair1, apart;
        PM_DEV u32 group(u32 g) const { return g < 2 ? pair0 + g * SUB : pair1 + (g - 2) * apart; }
    };
    static PM_DEV Place place_of(u32 stage_addr, u32 tail, u32 half) {
        const u32 pair0 = stage_addr + half * RIGHT, pair1 = pair0 + 2 * SUB;
        return Place{pair0, pair1, half ? tail - pair1 : SUB};
    }

    // Zeroes V rows [valid, 64) of this half: their bytes may be NaN, and 0 * NaN is NaN.
    static PM_DEV void zero_tail(const Place& v, int valid, u32 half) {
        const u32 tid = threadIdx.x % 128;
        for (u32 u = u32(valid) * 32 + tid; u < BLOCK * 32; u += 128) {
            const u32 row = u / 32, unit = u % 32;
            st_shared_v4(v.group(unit / 8) + swizzle(row, unit % 8), 0, 0, 0, 0);
        }
        fence_async_shared();
        named_barrier(BAR_TAIL + half, 128);
    }

    // Rows g and g + 8 of this lane.
    static PM_DEV void scale_rows(float (&o)[2][64], float f0, float f1) {
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
            const float f = i & 2 ? f1 : f0;
            o[0][i] *= f;
            o[0][i + 1] *= f;
            o[1][i] *= f;
            o[1][i + 1] *= f;
        }
    }

    // O as it is; tile.h says how.
    static PM_DEV void store_partial(const DecodeParams& p, const float (&o)[2][64], i64 tile, u32 half) {
        const u32 warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
        char* to = reinterpret_cast<char*>(p.partial_out) + tile * PARTIAL_BYTES;
        const u32 at = (warp * CHUNKS + half * (CHUNKS / 2)) * 32 + lane;
        char *first = to + at * 16, *rest = to + PARTIAL_REST + at * 8;
#pragma unroll
        for (u32 i = 0; i < CHUNKS / 2; ++i) {
            partial_store(first + i * 512, rest + i * 256, &o[i / 8][i % 8 * 8]);
        }
    }

    static PM_DEV u16* out_row(const DecodeParams& p, int req, const RowIndex& r) {
        return reinterpret_cast<u16*>(p.out) + i64(req) * p.out_stride_b + i64(r.s) * p.out_stride_s + i64(r.h) * p.out_stride_h;
    }

    // Eight neighbouring columns of any stride.
    static PM_DEV void scatter8(u16* dst, i64 step, const uint4& v) {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            *dst = u16(words[i / 2] >> (i % 2 * 16));
            dst += step;
        }
    }

    // Whole rows by way of the place that V had: a warp writes 128 bytes of four rows at
    // a time. Straight from registers it would write 16 bytes of eight rows each, which keeps the load-store unit from everyone
    // for ten thousand cycles. A request without keys (no place) has one value everywhere.
    static PM_DEV void store_rows(const DecodeParams& p, const float (&o)[2][64], int req, u32 smem, u32 stage, u32 buf, bool placed,
                                  u32 half) {
        const u32 tid = opaque(threadIdx.x), warp = tid / 32 % 4, lane = tid % 32;
        const Place place = place_of(smem + Smem::kv + stage * STAGE_BYTES, smem + Smem::tail + buf * SUB, half);
        if (placed) {
            named_barrier(BAR_TAIL + half, 128);    // V is read
#pragma unroll
            for (u32 g = 0; g < 4; ++g) {
                const u32 at = place.group(g) + warp * 2048;
#pragma unroll
                for (u32 i = 0; i < 8; i += 2)
                    stmatrix_packed<Elem>(at + swizzle(lane % 16, i + lane / 16), &o[g / 2][g % 2 * 32 + 4 * i]);
            }
            __syncwarp();
        }
        const u32 word = pack2<Elem>(o[0][0], o[0][0]);
#pragma unroll 1
        for (u32 i = lane / 8; i < 16; i += 4) {
            const RowIndex r(p, int(blockIdx.x * TILE_M + warp * 16 + i));
            if (!r.valid) return;
            const i64 step = GATHER ? p.out_stride_d : 1;
            u16* dst = out_row(p, req, r) + (half * 256 + lane % 8 * 8) * step;
#pragma unroll
            for (u32 g = 0; g < 4; ++g) {
                uint4 v = {word, word, word, word};
                if (placed) v = ld_shared_v4(place.group(g) + warp * 2048 + swizzle(i, lane % 8));
                if (!GATHER || p.flags & FLAG_OUT_VEC16)
                    st_global_v4(dst + g * 64, v);
                else
                    scatter8(dst + g * 64 * step, step, v);
            }
        }
    }

    // A piece, or O / l, in place, then out.
    static PM_DEV void store(const DecodeParams& p, float (&o)[2][64], const float (&inv)[2], int req, int slot, u32 smem, u32 stage,
                             u32 buf, bool placed, u32 half) {
        const int first = int(blockIdx.x * TILE_M + threadIdx.x / 32 % 4 * 16);
        const bool none = first >= p.s_q * p.heads_per_kv;
        if (slot < 0) scale_rows(o, inv[0], inv[1]);
        fence_regs(o[0]);
        fence_regs(o[1]);
        if (slot >= 0) {
            if (!none) store_partial(p, o, partial_tile(p, slot, blockIdx.y, blockIdx.x), half);
        } else {
            store_rows(p, o, req, smem, stage, buf, placed, half);
        }
    }

    // Tells the CTA that loads this side of the stages: the one of that rank in a pair.
    static PM_DEV void arrive_empty(u32 smem, u32 stage, u32 side, u32 rank) {
        const u32 bar = smem + Smem::empty + (side * STAGES + stage) * 8;
        if (rank == cluster_rank())
            mbar_arrive(bar);
        else
            mbar_arrive_cluster(map_to_rank(bar, rank));
    }

    // This warp is done with a stage. Both halves read P, which lies on the right side.
    static PM_DEV void release(u32 smem, u32 stage, u32 half) {
        if (!arrives(threadIdx.x % 32)) return;
        if (half == 0) arrive_empty(smem, stage, 0, 0);
        arrive_empty(smem, stage, 1, cluster_size() - 1);
    }

    // 1 / sum of this lane's two rows, at the end of a segment.
    static PM_DEV void take_factors(float (&inv)[2], u32 smem, u32 seg) {
        const u32 at = smem + Smem::inv + (threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4) * 4;
        mbar_wait(smem + Smem::inv_full, seg & 1);
        inv[0] = ld_shared_f(at);
        inv[1] = ld_shared_f(at + 32);
    }

    static PM_DEV void run(const DecodeParams& p, u32 smem, u32 half) {
        const u32 warp = threadIdx.x / 32 % 4;
        float o[2][64];     // columns 0..128 and 128..256 of this half
        u32 stage = 0, item = 0;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            int left = ld_shared(rec + SEG_END) - ld_shared(rec + SEG_BEGIN);     // blocks to do
            float inv[2];
            int fresh = 0;      // 0 until O holds something
            // Here and for all: zeroed for segments without blocks only, O would be two sets of registers to ptxas, and spill.
#pragma unroll
            for (int i = 0; i < 64; ++i) o[0][i] = o[1][i] = 0.0f;
            if (left > 0) stage = stage == STAGES - 1 ? 0 : stage + 1;    // Q had this one
#pragma unroll 1
            while (left > 0) {
                const u32 buf = item & 1, use = (item >> 1) & 1;
                PM_MARK(1 + half, item, 0);
                mbar_wait(smem + Smem::p_full + buf * 8, use);
                PM_MARK(1 + half, item, 1);
                if (fresh && ld_shared_i8(smem + Smem::rescale + buf * 4 + warp)) {
                    const u32 at = smem + Smem::scale + buf * 64 + warp * 16 + threadIdx.x % 32 / 4;
                    scale_rows(o, exp2_fast(float(ld_shared_i8(at))), exp2_fast(float(ld_shared_i8(at + 8))));
                }
                // Two pairs of 64-column groups; the last group lies apart.
                const u32 stage_addr = uniform(smem + Smem::kv + stage * STAGE_BYTES);
                const Place v = place_of(stage_addr, smem + Smem::tail + buf * SUB, half);
                // The block itself landed before its Q K^T; that P is here says so.
                if (GATHER) fence_async_shared();
                --left;
                if (left == 0) {
                    const int valid = ld_shared(rec + SEG_LEN) - (ld_shared(rec + SEG_END) - 1) * BLOCK;
                    if (valid < BLOCK) zero_tail(v, valid, half);
                }
                PM_MARK(1 + half, item, 2);
                mbar_wait(smem + Smem::gate + buf * 8, use);
                PM_MARK(1 + half, item, 3);

                const Desc desc_p = desc_k_major(stage_addr + ROPE_TILE);
                const Desc desc_v0 = desc_n_major(v.pair0, SUB), desc_v1 = desc_n_major(v.pair1, v.apart);
                fence_regs(o[0]);
                fence_regs(o[1]);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) pv_step<Elem>(o[1], desc_p + k * 2, desc_v1 + k * (2048 >> 4), 1);
                wgmma_commit();
#pragma unroll
                for (int k = 0; k < 4; ++k) pv_step<Elem>(o[0], desc_p + k * 2, desc_v0 + k * (2048 >> 4), 1);
                wgmma_commit();
                PM_MARK(1 + half, item, 4);
                // The late tile is in the pair that went first: give it back at half time.
                if (half) wgmma_wait<1>();
                // O of a whole request goes out by way of the last block's place.
                const bool held = left == 0 && ld_shared(rec + SEG_SLOT) < 0;
                __syncwarp();
                if (arrives(threadIdx.x % 32) && !(half && held)) mbar_arrive(smem + Smem::empty_tail + buf * 8);
                wgmma_wait<0>();
                PM_MARK(1 + half, item, 5);
                fence_regs(o[0]);
                fence_regs(o[1]);
                fresh = 1;
                __syncwarp();
                if (!held) release(smem, stage, half);
                PM_MARK(1 + half, item, 7);
                stage = stage == STAGES - 1 ? 0 : stage + 1;
                ++item;
            }
            // A barrier under a condition that ptxas cannot see to be uniform costs the whole loop its uniform registers.
            const int req = ld_shared(rec + SEG_REQ), slot = int(uniform(u32(ld_shared(rec + SEG_SLOT))));
            take_factors(inv, smem, seg);
            leave_segment(rec);
            if (arrives(threadIdx.x % 32)) mbar_arrive(smem + Smem::inv_empty);
            const u32 last = stage == 0 ? STAGES - 1 : stage - 1, buf = ~item & 1;      // of the last block
            const bool placed = fresh;
            store(p, o, inv, req, slot, smem, last, buf, placed, half);
            if (placed && slot < 0) {
                fence_async_shared();
                __syncwarp();
                if (half && arrives(threadIdx.x % 32)) mbar_arrive(smem + Smem::empty_tail + buf * 8);
                release(smem, last, half);
            }
            PM_MARK(1 + half, item - 1, 8);
        }
    }
};

}  // namespace polymla
