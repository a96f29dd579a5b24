// Dense MLA decoding, split over KV: the main kernel.
//
// Tile      64 packed query rows (s_q x heads of one kv head) x 64 tokens, O 64 x 512 f32.
// Roles     warps 0-3   Q K^T and softmax, Q in registers      decode_qk.h
//           warps 4-7   P V, O columns   0..256                decode_pv.h
//           warps 8-11  P V, O columns 256..512                decode_pv.h
//           Whoever frees a piece of shared memory refills it  decode_load.h
//           warp 0 also walks the schedule                     decode_walk.h
// Registers 384 threads start with 168 each; 184 / 160 / 160 after reallocation.
// Shared    three KV stages of 64 KiB, one rope tile, two P buffers: 226 KiB.
// Pipeline  the tensor cores alternate between Q K^T(j+1) and P V(j); the softmax of
//           block j+1 runs under P V(j).
//
//   tensor   | Q K^T j+1   | P V j       | Q K^T j+2   | P V j+1     |
//   QK warps | issue, wait | softmax j+1 | issue, wait | softmax j+2 |
//   TMA      | ... load j+2              | load j+3 (the stage of j)  ...
//
// Grid (m_tiles, h_kv, num_parts), one CTA an SM, persistent over its part of the
// schedule.
#include "decode_pv.h"

namespace polymla {

template <class Elem, bool ROPE, bool GATHER>
PM_DEV void decode(const DecodeParams& p, const TensorMap* map_ckv, const TensorMap* map_kpe) {
    extern __shared__ __align__(1024) char smem_raw[];
    const u32 smem = smem_addr(smem_raw);
    const u32 warp = threadIdx.x / 32;

    PM_TIME(0);
    PM_MARK(0, 0, 10);
    if (threadIdx.x == 128) {
        if (!GATHER) {
            tma_prefetch_map(map_ckv);
            if (ROPE) tma_prefetch_map(map_kpe);
        }
        for (u32 i = 0; i < STAGES; ++i) {
            mbar_init(smem + Smem::full_l + i * 8, GATHER ? 128 : 1);
            mbar_init(smem + Smem::full_r + i * 8, GATHER ? 128 : 1);
        }
        mbar_init(smem + Smem::full_rope, GATHER ? 128 : 1);
        mbar_init(smem + Smem::done_rope, 4);
        mbar_init(smem + Smem::done_half, 4);
        mbar_init(smem + Smem::done_half + 8, 4);
        for (u32 i = 0; i < P_BUFS; ++i) {
            mbar_init(smem + Smem::p_full + i * 8, 4);
            mbar_init(smem + Smem::p_empty + i * 8, 8);
            mbar_init(smem + Smem::gate + i * 8, 1);
        }
        mbar_init_fence();
    }
    pdl_wait();
    if (warp == 0) {
        walk_start(p, smem);
        for (u32 seg = 0; seg < 3; ++seg) walk_step<Elem>(p, smem, seg);
    } else {
        prefetch_first(p, threadIdx.x - 32);
    }
    PM_MARK(0, 0, 11);
    __syncthreads();
    pdl_launch_dependents();
    PM_MARK(0, 0, 12);

    if (warp < 4) {
        reg_inc<184>();
        QkWarpgroup<Elem, ROPE, GATHER>::run(p, smem);
    } else {
        reg_dec<160>();
        PvWarpgroup<Elem, ROPE, GATHER>::run(p, map_ckv, map_kpe, smem, warp / 4 - 1);
    }
    PM_TIME(1);
}

}  // namespace polymla

#define POLYMLA_DECODE(NAME, ELEM, ROPE, GATHER)                                                             \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                     \
        NAME(const __grid_constant__ polymla::DecodeParams p, const __grid_constant__ polymla::TensorMap ckv, \
             const __grid_constant__ polymla::TensorMap kpe) {                                               \
        polymla::decode<polymla::ELEM, ROPE, GATHER>(p, &ckv, &kpe);                                         \
    }

// The host compiles one kernel at a time, so that a first start without nvcc compiles only what it needs.
#ifdef POLYMLA_DECODE_NAME
POLYMLA_DECODE(POLYMLA_DECODE_NAME, POLYMLA_DECODE_ELEM, POLYMLA_DECODE_ROPE, POLYMLA_DECODE_GATHER)
#else
POLYMLA_DECODE(polymla_decode_bf16_d576_tma, Bf16, true, false)
#ifndef POLYMLA_ONE_KERNEL
POLYMLA_DECODE(polymla_decode_bf16_d576_gather, Bf16, true, true)
POLYMLA_DECODE(polymla_decode_bf16_d512_tma, Bf16, false, false)
POLYMLA_DECODE(polymla_decode_bf16_d512_gather, Bf16, false, true)
POLYMLA_DECODE(polymla_decode_f16_d576_tma, F16, true, false)
POLYMLA_DECODE(polymla_decode_f16_d576_gather, F16, true, true)
POLYMLA_DECODE(polymla_decode_f16_d512_tma, F16, false, false)
POLYMLA_DECODE(polymla_decode_f16_d512_gather, F16, false, true)
#endif
#endif
