// The QK warpgroup: S = Q K^T, online softmax, P to shared memory.
//
// Q (64 x 576) stays for a whole segment, three quarters of it in registers (108 a thread). The running
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

constexpr float RESCALE_STEP = 8.0f;   // lazy maximum: P <= 2^8 where it was looked at
constexpr float HEADROOM = 2.0f;       // the largest weight is 4 to 8: f16 has no bits to lose where it becomes subnormal
constexpr float SUM_LIMIT = 4096.0f;    // else a lane's sixteen weights of a row add up to no more than this

template <class Elem, bool ROPE, bool GATHER>
struct QkWarpgroup {
    // Takes Q, which lies in the stage as if it were a block, into A fragments. Columns 432..448 go to a place of their own
    // in shared memory, and the rope columns and the last 64 of the others lie in theirs already.
    static PM_DEV void take_q(u32 (&q)[27][4], u32 smem, const Ring& kv, int rows) {
        const u32 tid = opaque(threadIdx.x), lane = tid % 32, warp = tid / 32;
        const u32 row = warp * 16 + lane % 16, stage = smem + Smem::kv + kv.stage() * STAGE_BYTES;
        mbar_wait(smem + Smem::full + kv.stage() * 8, kv.parity());
        mbar_wait(smem + Smem::full + (STAGES + kv.stage()) * 8, kv.parity());
        PM_MARK(6, 0, 0);
        // Rows past the last are zero: multiplying zeros costs less power, and power is clock.
        const bool none = int(warp) * 16 >= rows;
        if (none) {
#pragma unroll
            for (u32 k = 0; k < 27; ++k) q[k][0] = q[k][1] = q[k][2] = q[k][3] = 0;
        } else {
            // The last fragment first: q[0] is free for it.
            ldmatrix_x4(q[0], stage + 6 * SUB + swizzle(row, 6 + lane / 16));
        }
        stmatrix_x4(smem + Smem::q_last + warp * 512 + lane / 8 % 2 * 256 + lane / 16 * 128 + lane % 8 * 16, q[0][0], q[0][1],
                    q[0][2], q[0][3]);
        if (!none) {
#pragma unroll
            for (u32 k = 0; k < 27; ++k) ldmatrix_x4(q[k], stage + k / 4 * SUB + swizzle(row, k % 4 * 2 + lane / 16));
        }
        PM_MARK(6, 0, 1);
        fence_async_shared();
        __syncwarp();
        if (arrives(lane)) {
            // The stage goes back in place of the PV warpgroups, which have no use for Q.
            const u32 empty = smem + Smem::empty + kv.stage() * 8;
            mbar_arrive_cluster(map_to_rank(empty, 0));
            const u32 right = map_to_rank(empty + STAGES * 8, cluster_size() - 1);
            mbar_arrive_cluster(right);
            mbar_arrive_cluster(right);     // it counts both halves
        }
        PM_MARK(6, 0, 2);
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
        top = floorf(top) - HEADROOM;
        const int e = int(fmaxf(m - top, -127.0f));      // 2^-127 flushes to 0
        l *= exp2_fast(float(e));
        m = top;
        return e;
    }

    // P is in shared memory: tell the PV warpgroups, and open the gate unless that is left to the next block's Q K^T.
    static PM_DEV void hand_over(u32 smem, u32 buf, bool open) {
        fence_async_shared();
        __syncwarp();
        if (arrives(threadIdx.x % 32)) mbar_arrive(smem + Smem::p_full + buf * 8);
        if (open && threadIdx.x == 0) mbar_arrive(smem + Smem::gate + buf * 8);
    }

    // lse of this lane's two rows, or of a piece what the merge needs. The sums are 0 where no key was seen and NaN for an invalid
    // request.
    static PM_DEV void store_rows(const DecodeParams& p, const float (&m)[2], const float (&l)[2], int req, int slot) {
        const u32 tid = opaque(threadIdx.x);
        if (tid % 4 != 0) return;
        if (slot >= 0) {
            const i64 tile = partial_tile(p, slot, int(opaque(blockIdx.y)), int(opaque(blockIdx.x)));
            *reinterpret_cast<float4*>(p.partial_rows + tile * PARTIAL_ROWS + tid) = make_float4(m[0], l[0], m[1], l[1]);
            return;
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int row = int(tid / 32 * 16 + tid % 32 / 4) + 8 * k;
            const RowIndex r(p, int(opaque(blockIdx.x)) * TILE_M + row);
            if (r.valid)
                p.lse[i64(req) * p.lse_stride_b + i64(r.h) * p.lse_stride_h + i64(r.s) * p.lse_stride_s] =
                    l[k] == 0.0f ? __int_as_float(0x7f800000) : (log2_fast(l[k]) + m[k]) * LN2;
        }
    }

    // Whether both sides of a stage are there; the whole warp agrees.
    static PM_DEV bool has_landed(u32 smem, const Ring& kv) {
        const u32 full = smem + Smem::full + kv.stage() * 8;
        return __all_sync(0xffffffffu, mbar_test(full, kv.parity()) && mbar_test(full + STAGES * 8, kv.parity()));
    }

    static PM_DEV void run(const DecodeParams& p, u32 smem) {
        u32 q[27][4];
        Ring kv;
        // Rows past the last are never loaded: zero once, like the others of this kind in take_q.
        for (int at = p.s_q * p.heads_per_kv - int(blockIdx.x) * TILE_M + int(threadIdx.x / 16); at < TILE_M; at += 8)
            st_shared_v4(smem + (threadIdx.x & 8 ? Smem::q_rope : Smem::q_tail) + at * 128 + threadIdx.x % 8 * 16, 0, 0, 0, 0);
        fence_async_shared();
        u32 item = 0;       // blocks so far

#pragma unroll 1
        for (u32 seg = 0; wait_segment(smem, seg); ++seg) {
            const u32 rec = segment_record(smem, seg);
            PM_MARK(0, 0, 13);
            float m[2] = {M_INIT, M_INIT}, l[2] = {0.0f, 0.0f};
            if (has_blocks(rec)) {
                take_q(q, smem, kv, p.s_q * p.heads_per_kv - int(opaque(blockIdx.x)) * TILE_M);
                mbar_wait(smem + Smem::full_q, seg & 1);
                if (GATHER) fence_async_shared();
                named_barrier(BAR_QK, 128);
                kv.advance();
                PM_MARK(0, 0, 14);
                int left = ld_shared(rec + SEG_END) - ld_shared(rec + SEG_BEGIN);     // blocks to do
                int masked;     // with so many or fewer left, some row of this warp is masked
                {
                    const u32 lane = opaque(threadIdx.x) % 32, row = opaque(threadIdx.x) / 32 * 16 + lane / 4;
                    const int len = ld_shared(rec + SEG_LEN), req = ld_shared(rec + SEG_REQ), at = blockIdx.x * TILE_M + int(row);
                    const int limit0 = row_limit(p, req, len, at), limit1 = row_limit(p, req, len, at + 8);
                    if (lane % 4 == 0) {
                        st_shared(smem + Smem::limit + row * 4, limit0);
                        st_shared(smem + Smem::limit + row * 4 + 32, limit1);
                    }
                    // Rows past the last hold what was in shared memory: a maximum that nothing exceeds.
                    const int rows = p.s_q * p.heads_per_kv;
                    if (at >= rows) m[0] = __int_as_float(0x7f800000);
                    if (at + 8 >= rows) m[1] = __int_as_float(0x7f800000);
                    masked = ld_shared(rec + SEG_END) - int(__reduce_min_sync(0xffffffffu, u32(min(limit0, limit1)))) / BLOCK;
                    __syncwarp();
                }
                PM_MARK(0, 0, 15);

                bool gated = false;     // the gate of the block before is left to this one's Q K^T
                bool trusted = false;   // the running maximum is taken to serve for this block
#pragma unroll 1
                for (;;) {
                    float s[32];
                    // ---- S = Q K^T
                    PM_MARK(0, item, 0);
                    const u32 stage = smem + Smem::kv + kv.stage() * STAGE_BYTES, full = smem + Smem::full + kv.stage() * 8;
                    const u32 buf = item & 1;
                    const Desc desc = desc_k_major(uniform(stage));
                    if (!gated) {
                        mbar_wait(full, kv.parity());
                        PM_MARK(0, item, 1);
                        mbar_wait(full + STAGES * 8, kv.parity());
                        if (GATHER) fence_async_shared();
                    }
                    PM_MARK(0, item, 2);
                    fence_regs(s);
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 16; ++k)
                        qk_step<Elem>(s, q[k], desc + (k / 4) * (SUB >> 4) + (k % 4) * 2, k != 0);
                    // The PV warpgroups are held at the gate anyway: P of the block before is handed over under these.
                    if (gated) hand_over(smem, buf ^ 1, false);
                    wgmma_fence();
#pragma unroll
                    for (int k = 16; k < 27; ++k)
                        qk_step<Elem>(s, q[k], desc + (k / 4) * (SUB >> 4) + (k % 4) * 2, 1);
                    qk_step_shared<Elem>(s, desc_q_last(smem + Smem::q_last), desc + 6 * (SUB >> 4) + 6);
                    if (ROPE) {
#pragma unroll
                        for (int k = 0; k < 4; ++k)
                            qk_step_shared<Elem>(s, desc_k_major(smem + Smem::q_rope) + k * 2, desc + (ROPE_TILE >> 4) + k * 2);
                    }
                    wgmma_commit();
                    PM_MARK(0, item, 3);
                    kv.advance();
                    bool landed = !GATHER && has_landed(smem, kv);
                    mbar_wait(smem + Smem::full_tail + buf * 8, (item >> 1) & 1);
                    if (GATHER) fence_async_shared();
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        qk_step_shared<Elem>(s, desc_k_major(smem + Smem::q_tail) + k * 2,
                                             desc_k_major(smem + Smem::tail + buf * SUB) + k * 2);
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (gated && threadIdx.x == 0) mbar_arrive(smem + Smem::gate + (buf ^ 1) * 8);
                    gated = false;
                    PM_MARK(0, item, 4);
                    wgmma_wait<0>();
                    fence_regs(s);
                    PM_MARK(0, item, 5);

                    // ---- mask
                    const u32 tid = opaque(threadIdx.x), warp = tid / 32, lane = tid % 32;
                    if (left <= masked) {
                        const u32 at = smem + Smem::limit + (warp * 16 + lane / 4) * 4;
                        const int tok = (ld_shared(segment_record(smem, opaque(seg)) + SEG_END) - left) * BLOCK + int(lane % 4) * 2;
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
                    bool rescale = false;
                    if (!trusted) {
                        const float top0 = fmaxf(max_of<0>(s), max_of<16>(s)) * scale;
                        const float top1 = fmaxf(max_of<2>(s), max_of<18>(s)) * scale;
                        rescale = __any_sync(0xffffffffu, top0 > m[0] + RESCALE_STEP || top1 > m[1] + RESCALE_STEP);
                        if (rescale) {
                            // Exponents: the factor is a power of two, so rescaling is exact.
                            const int e0 = raise(m[0], l[0], top0), e1 = raise(m[1], l[1], top1);
                            if (lane % 4 == 0) {
                                const u32 at = smem + Smem::scale + buf * 64 + warp * 16 + lane / 4;
                                st_shared_i8(at, e0);
                                st_shared_i8(at + 8, e1);
                            }
                        }
                    }
                    if (lane == 0) st_shared_i8(smem + Smem::rescale + buf * 4 + warp, rescale);

                    // ---- P = 2^(scale * S - m), row sums
                    float sum[2] = {0, 0};
#pragma unroll
                    for (int i = 0; i < 32; ++i) s[i] = exp2_fast(fmaf(s[i], scale, -m[(i >> 1) & 1]));
#pragma unroll
                    for (int i = 0; i < 32; ++i) sum[(i >> 1) & 1] += s[i];
                    // All four warps are done with the rope columns, whose place P takes; and with any weight too large the block is
                    // done again, after a look at its maximum.
                    if (barrier_or(BAR_QK, 128, trusted && fmaxf(sum[0], sum[1]) > SUM_LIMIT)) {
                        trusted = false;
                        kv.retreat();
                        continue;
                    }
                    trusted = true;
                    l[0] += sum[0];
                    l[1] += sum[1];
                    const u32 tile = stage + ROPE_TILE + warp * 2048 + swizzle(lane % 16, lane / 16);
#pragma unroll
                    for (int i = 0; i < 8; i += 2)
                        stmatrix_x4(tile ^ i << 4, pack2<Elem>(s[4 * i], s[4 * i + 1]),
                                    pack2<Elem>(s[4 * i + 2], s[4 * i + 3]), pack2<Elem>(s[4 * i + 4], s[4 * i + 5]),
                                    pack2<Elem>(s[4 * i + 6], s[4 * i + 7]));
                    PM_MARK(0, item, 7);
                    ++item;
                    if (--left == 0) {
                        hand_over(smem, buf, true);
                        break;
                    }
                    gated = landed || (!GATHER && has_landed(smem, kv));
                    if (!gated) hand_over(smem, buf, true);
                }
            } else {
                mbar_wait(smem + Smem::full_q, seg & 1);
            }
            // Without blocks nothing else keeps this lane from getting two phases ahead of another's wait above.
            __syncwarp();
            if (arrives(opaque(threadIdx.x) % 32)) mbar_arrive(smem + Smem::done_q);
            l[0] += __shfl_xor_sync(0xffffffffu, l[0], 1);
            l[1] += __shfl_xor_sync(0xffffffffu, l[1], 1);
            l[0] += __shfl_xor_sync(0xffffffffu, l[0], 2);
            l[1] += __shfl_xor_sync(0xffffffffu, l[1], 2);
            const u32 record = segment_record(smem, opaque(seg));
            if (ld_shared(record + SEG_BAD)) l[0] = l[1] = __int_as_float(0x7fc00000);
            // The segment before may still be about to read its factors when this one was a single block.
            mbar_wait(smem + Smem::inv_empty, (seg & 1) ^ 1);
            const u32 tid = opaque(threadIdx.x);
            if (tid % 4 == 0) {
                const u32 at = smem + Smem::inv + (tid / 32 * 16 + tid % 32 / 4) * 4;
                st_shared_f(at, l[0] == 0.0f ? 0.0f : __fdividef(1.0f, l[0]));
                st_shared_f(at + 32, l[1] == 0.0f ? 0.0f : __fdividef(1.0f, l[1]));
            }
            __syncwarp();
            if (arrives(tid % 32)) mbar_arrive(smem + Smem::inv_full);
            const int req = ld_shared(record + SEG_REQ), slot = ld_shared(record + SEG_SLOT);
            leave_segment(record);
            store_rows(p, m, l, req, slot);
        }
    }
};

}  // namespace polymla
