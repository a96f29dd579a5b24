// The two PV warpgroups: O += P V, one half of the 512 columns each, 64 x 256 f32 in
// 128 registers a thread; then the epilogue straight from registers.
//
// A whole request is written to `out`; a piece of one goes to the workspace, not
// normalised, in fragment order. The epilogue touches no shared memory, so the loaders and the QK warpgroup are already at work on
// the next request.
#pragma once

#include "decode_qk.h"

namespace polymla {

template <class Elem, bool ROPE, bool GATHER>
struct PvWarpgroup {
    // Zeroes V rows [valid, 64) of this half: their bytes may be NaN, and 0 * NaN is NaN.
    static PM_DEV void zero_tail(u32 pair0, u32 pair1, u32 apart, int valid, u32 half) {
        const u32 tid = threadIdx.x % 128;
        for (u32 u = u32(valid) * 32 + tid; u < BLOCK * 32; u += 128) {
            const u32 row = u / 32, unit = u % 32;
            st_shared_v4((unit < 16 ? pair0 + unit / 8 * SUB : pair1 + (unit / 8 - 2) * apart) + swizzle(row, unit % 8), 0, 0, 0,
                         0);
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
        char *high = to + at * 16, *low = to + PARTIAL_LOW_BYTES + at * 8;
#pragma unroll
        for (u32 i = 0; i < CHUNKS / 2; ++i) {
            // One statement, because ptxas would make all chunks' words first, and spill.
            const float* v = &o[i / 8][i % 8 * 8];
            asm volatile(
                "{\n .reg .b32 a, b, c, d;\n"
                " prmt.b32 a, %2, %3, 0x7632;\n prmt.b32 b, %4, %5, 0x7632;\n"
                " prmt.b32 c, %6, %7, 0x7632;\n prmt.b32 d, %8, %9, 0x7632;\n"
                " st.global.v4.b32 [%0], {a, b, c, d};\n"
                " prmt.b32 a, %2, %3, 0x0051;\n prmt.b32 b, %4, %5, 0x0051;\n prmt.b32 a, a, b, 0x5410;\n"
                " prmt.b32 c, %6, %7, 0x0051;\n prmt.b32 d, %8, %9, 0x0051;\n prmt.b32 c, c, d, 0x5410;\n"
                " st.global.v2.b32 [%1], {a, c};\n}\n" ::"l"(high + i * 512), "l"(low + i * 256), "r"(__float_as_uint(v[0])),
                "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])), "r"(__float_as_uint(v[3])), "r"(__float_as_uint(v[4])),
                "r"(__float_as_uint(v[5])), "r"(__float_as_uint(v[6])), "r"(__float_as_uint(v[7]))
                : "memory");
        }
    }

    // Two packed rows of this half. The tma kernels write rows of contiguous, 16-byte aligned columns only: a quad's
    // four words are 16 bytes.
    static PM_DEV void store_rows(const DecodeParams& p, const float (&o)[2][64], int req, int row, u32 half) {
        const u32 t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const RowIndex r(p, row + 8 * k);
            if (!r.valid) return;
            u16* dst = reinterpret_cast<u16*>(p.out) + i64(req) * p.out_stride_b + i64(r.s) * p.out_stride_s +
                       i64(r.h) * p.out_stride_h;
            if (!GATHER) {
                dst += half * 256 + 2 * t;
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    store2<Elem>(dst + 8 * i, o[i / 16][i % 16 * 4 + 2 * k], o[i / 16][i % 16 * 4 + 2 * k + 1]);
            } else {
                dst += (half * 256 + 2 * t) * p.out_stride_d;
#pragma unroll
                for (int i = 0; i < 32; ++i) {
                    const u32 w = pack2<Elem>(o[i / 16][i % 16 * 4 + 2 * k], o[i / 16][i % 16 * 4 + 2 * k + 1]);
                    dst[0] = u16(w);
                    dst[p.out_stride_d] = u16(w >> 16);
                    dst += 8 * p.out_stride_d;
                }
            }
        }
    }

    // A piece, or O / l, in place, then out.
    static PM_DEV void store(const DecodeParams& p, float (&o)[2][64], float inv0, float inv1, int req, int slot, u32 half) {
        const u32 warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
        const int first = int(blockIdx.x * TILE_M + warp * 16);
        if (first >= p.s_q * p.heads_per_kv) return;
        if (slot < 0) scale_rows(o, inv0, inv1);
        fence_regs(o[0]);
        fence_regs(o[1]);
        if (slot >= 0)
            store_partial(p, o, partial_tile(p, slot, blockIdx.y, blockIdx.x), half);
        else
            store_rows(p, o, req, first + int(lane / 4), half);
    }

    // Tells the CTA that loads this side of the stages: the one of that rank in a pair.
    static PM_DEV void arrive_empty(u32 smem, u32 stage, u32 side, u32 rank) {
        const u32 bar = smem + Smem::empty + (side * STAGES + stage) * 8;
        if (rank == cluster_rank())
            mbar_arrive(bar);
        else
            mbar_arrive_cluster(map_to_rank(bar, rank));
    }

    static PM_DEV void run(const DecodeParams& p, u32 smem, u32 half) {
        const u32 warp = threadIdx.x / 32 % 4;
        const u32 last_rank = cluster_size() - 1;
        float o[2][64];     // columns 0..128 and 128..256 of this half
        u32 stage = 0, item = 0;
#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            int left = ld_shared(rec + SEG_END) - ld_shared(rec + SEG_BEGIN);     // blocks to do
            float inv0, inv1;
            int fresh = 0;      // 0 until O holds something
            if (left == 0) {
                inv0 = inv1 = __int_as_float(ld_shared(rec + SEG_BAD) ? 0x7fc00000 : 0);
#pragma unroll
                for (int i = 0; i < 64; ++i) o[0][i] = o[1][i] = 0.0f;
            } else {
                stage = stage == STAGES - 1 ? 0 : stage + 1;    // Q had this one
            }
#pragma unroll 1
            while (left > 0) {
                const u32 buf = item & 1, use = (item >> 1) & 1;
                PM_MARK(1 + half, item, 0);
                mbar_wait(smem + Smem::p_full + buf * 8, use);
                PM_MARK(1 + half, item, 1);
                if (fresh && ld_shared(smem + Smem::rescale + buf * 16 + warp * 4)) {
                    const u32 at = smem + Smem::scale + buf * 64 + warp * 16 + threadIdx.x % 32 / 4;
                    int e0, e1;
                    asm volatile("ld.shared.s8 %0, [%1];" : "=r"(e0) : "r"(at) : "memory");
                    asm volatile("ld.shared.s8 %0, [%1];" : "=r"(e1) : "r"(at + 8) : "memory");
                    scale_rows(o, exp2_fast(float(e0)), exp2_fast(float(e1)));
                }
                // Two pairs of 64-column groups; the last group lies apart.
                const u32 stage_addr = uniform(smem + Smem::kv + stage * STAGE_BYTES);
                const u32 pair0 = stage_addr + half * RIGHT, pair1 = pair0 + 2 * SUB;
                const u32 apart = half ? smem + Smem::tail + buf * SUB - pair1 : SUB;
                // The block itself landed before its Q K^T; that P is here says so.
                if (GATHER) fence_async_shared();
                --left;
                if (left == 0) {
                    const int valid = ld_shared(rec + SEG_LEN) - (ld_shared(rec + SEG_END) - 1) * BLOCK;
                    if (valid < BLOCK) zero_tail(pair0, pair1, apart, valid, half);
                }
                PM_MARK(1 + half, item, 2);
                mbar_wait(smem + Smem::gate + buf * 8, use);
                PM_MARK(1 + half, item, 3);

                const Desc desc_p = desc_k_major(stage_addr + ROPE_TILE);
                const Desc desc_v0 = desc_n_major(pair0, SUB), desc_v1 = desc_n_major(pair1, apart);
                fence_regs(o[0]);
                fence_regs(o[1]);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 4; ++k) pv_step<Elem>(o[1], desc_p + k * 2, desc_v1 + k * (2048 >> 4), k ? 1 : fresh);
                wgmma_commit();
#pragma unroll
                for (int k = 0; k < 4; ++k) pv_step<Elem>(o[0], desc_p + k * 2, desc_v0 + k * (2048 >> 4), k ? 1 : fresh);
                wgmma_commit();
                PM_MARK(1 + half, item, 4);
                // The late tile is in the pair that went first: give it back at half time.
                if (half) wgmma_wait<1>();
                __syncwarp();
                if (threadIdx.x % 32 == 0) mbar_arrive(smem + Smem::empty_tail + buf * 8);
                wgmma_wait<0>();
                PM_MARK(1 + half, item, 5);
                fence_regs(o[0]);
                fence_regs(o[1]);
                fresh = 1;
                if (left == 0) {
                    const u32 at = smem + Smem::inv + (warp * 16 + threadIdx.x % 32 / 4) * 4;
                    inv0 = ld_shared_f(at);
                    inv1 = ld_shared_f(at + 32);
                }
                __syncwarp();
                if (threadIdx.x % 32 == 0) {
                    // Both halves read P, which lies on the right side.
                    if (half == 0) arrive_empty(smem, stage, 0, 0);
                    arrive_empty(smem, stage, 1, last_rank);
                }
                PM_MARK(1 + half, item, 7);
                stage = stage == STAGES - 1 ? 0 : stage + 1;
                ++item;
            }
            const int req = ld_shared(rec + SEG_REQ), slot = ld_shared(rec + SEG_SLOT);
            leave_segment(rec);
            if (threadIdx.x % 32 == 0) add_release(smem + Smem::seg_free, 1);
            store(p, o, inv0, inv1, req, slot, half);
            PM_MARK(1 + half, item - 1, 8);
        }
    }
};

}  // namespace polymla
