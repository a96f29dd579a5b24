// Dense MLA decoding, split over KV: the main kernel.
//
// Tile      64 packed query rows (s_q x heads of one kv head) x 64 tokens, O 64 x 512 f32.
// Roles     warps 0-3   Q K^T and softmax, most of Q in registers  decode_qk.h
//           warps 4-7   P V, O columns   0..256                    decode_pv.h
//           warps 8-11  P V, O columns 256..512                    decode_pv.h
//           warps 12-14 loads, TMA or cp.async                     decode_load.h
//           warp 15     one thread walks the schedule              decode_walk.h
// Registers 512 threads start with 128 each; 168 / 160 / 160 / 24 after reallocation.
// Shared    three stages of 64 KiB (448 latent columns and the rope columns of a block), two
//           tiles of 8 KiB for the last 64 columns, a quarter of Q: 227 KiB.
// Pipeline  the tensor cores alternate between Q K^T(j+1) and P V(j); the softmax of
//           block j+1 runs under P V(j), and P takes the place of the rope columns.
// Clusters  two M tiles of one request run as a pair and load half of the stages each, for both.
//
//   tensor   | Q K^T j+1   | P V j       | Q K^T j+2   | P V j+1     |
//   QK warps | issue, wait | softmax j+1 | issue, wait | softmax j+2 |
//   TMA      | ... load j+2              | load j+3 (the stage of j)  ...
//
// Grid (m_tiles, h_kv, num_parts), one CTA an SM, persistent over its part of the
// schedule.
#include "decode_few.h"

namespace polymla {

// Has one line of the parameters brought into the constant cache. A miss later, behind the first burst of
// KV loads, costs two microseconds; there were several.
PM_DEV void touch(const DecodeParams& p, u32 warp) {
#ifndef POLYMLA_EMULATED
    switch (warp % 6) {
        case 0: asm volatile("" ::"l"(p.q_nope_stride_b)); break;
        case 1: asm volatile("" ::"l"(p.ckv)); break;
        case 2: asm volatile("" ::"l"(p.block_table)); break;
        case 3: asm volatile("" ::"l"(p.out_stride_s)); break;
        case 4: asm volatile("" ::"l"(p.partial_out), "r"(p.s_q)); break;
        case 5: asm volatile("" ::"f"(p.scale_log2)); break;
    }
#endif
}

// Arrivals of the barriers from Smem::full on, a byte each, eight in a word.
PM_DEV constexpr u64 in_bytes(u64 a, u64 b, u64 c, u64 d, u64 e, u64 f, u64 g, u64 h) {
    return a | b << 8 | c << 16 | d << 24 | e << 32 | f << 40 | g << 48 | h << 56;
}

// Two barriers a warp: one thread for all of them would take four hundred cycles.
template <bool GATHER>
PM_DEV void init_barriers(u32 smem, u32 warp, bool paired) {
    constexpr u64 LOAD = GATHER ? 32 : 1;
    static_assert(Smem::inv_empty == Smem::full + 23 * 8 && STAGES == 3 && SEGMENTS == 4, "24 barriers, and 8 in records");
    const u64 words[3] = {paired ? in_bytes(LOAD, LOAD, LOAD, LOAD, LOAD, LOAD, 8, 8) : in_bytes(LOAD, LOAD, LOAD, LOAD, LOAD, LOAD, 4, 4),
                          paired ? in_bytes(8, 16, 16, 16, LOAD, LOAD, 8, 8) : in_bytes(4, 8, 8, 8, LOAD, LOAD, 8, 8),
                          in_bytes(LOAD, 4, 4, 4, 1, 1, 4, 8)};
    const u32 i = warp % 8;
    if (threadIdx.x % 32 == 0) {
        mbar_init(smem + Smem::full + warp * 8, arrivals(u32((warp < 8 ? words[0] : words[1]) >> 8 * i) & 255));
        if (warp < 8)
            mbar_init(smem + Smem::full + (16 + i) * 8, arrivals(u32(words[2] >> 8 * i) & 255));
        else
            mbar_init(segment_record(smem, i / 2) + (i % 2 ? SEG_EMPTY : SEG_FULL), arrivals(i % 2 ? SEG_READERS : 1));
        mbar_init_fence();
    }
}

enum Form { TMA, GATHERED, FEW_ROWS };

template <class Elem, bool ROPE, Form FORM>
PM_DEV void decode(const DecodeParams& p, const TensorMap* map_ckv, const TensorMap* map_kpe, const TensorMap* map_q,
                   const TensorMap* map_q_pe) {
    constexpr bool GATHER = FORM == GATHERED;
    extern __shared__ __align__(1024) char smem_raw[];
    const u32 smem = smem_addr(smem_raw);
    const u32 warp = uniform(threadIdx.x / 32);
    const bool paired = cluster_size() == 2;

    PM_TIME(0);
    PM_MARK(0, 0, 10);
    // What comes first in the chain of a segment's loads goes first of all.
    const u32 lane = threadIdx.x % 32;
    PartMeta meta = {};
    int ahead = 0;      // length of request `lane`
    if (warp >= 14) {
        pdl_wait();
        meta = p.parts[blockIdx.z];
        if (warp == 15 && lane < u32(p.b)) ahead = p.cache_seqlens[lane];
    }
    init_barriers<GATHER>(smem, warp, paired);
    if (!GATHER && threadIdx.x == 32) {
        tma_prefetch_map(map_ckv);
        tma_prefetch_map(map_q);
        if (ROPE) {
            tma_prefetch_map(map_kpe);
            tma_prefetch_map(map_q_pe);
        }
    }
    touch(p, warp);
    if (paired)
        cluster_sync();     // the peer's barriers are there before anyone arrives on them
    else
        __syncthreads();
    pdl_wait();
    pdl_launch_dependents();
    PM_MARK(0, 0, 12);

    if (FORM == FEW_ROWS && warp < 4) {
        FewQk<Elem, ROPE>::run(p, smem);
    } else if (FORM == FEW_ROWS && warp < 12) {
        FewPv<Elem, ROPE>::run(p, smem, warp / 4 - 1);
    } else if (warp < 4) {
        reg_inc<168>();
        QkWarpgroup<Elem, ROPE, GATHER>::run(p, smem);
    } else if (warp < 12) {
        reg_inc<160>();
        PvWarpgroup<Elem, ROPE, GATHER>::run(p, smem, warp / 4 - 1);
    } else {
        if (FORM != FEW_ROWS) reg_dec<24>();
        if (warp == 14) prefetch_table(p, meta);
        // Lengths are a part's second trip to memory; bring the first ones closer during its first. Then what the merge reads.
        if (warp == 13) {
            if (lane * 32 < u32(p.b)) prefetch_l2(p.cache_seqlens + lane * 32);
            if (lane == 0) prefetch_l2(p.owners);
        }
        if (warp == 15) {
            ahead = __shfl_sync(0xffffffffu, ahead, meta.begin_req);
            if (lane == 0) walk(p, smem, meta, ahead);
        } else if (GATHER) {
            if (warp == 14)
                GatherLoader<ROPE>::run_late(p, smem);
            else
                GatherLoader<ROPE>::run_side(p, smem, warp - 12);
        } else if (warp == 14) {
            LateLoader<ROPE, FORM == FEW_ROWS>::run(p, map_ckv, map_q, map_q_pe, smem);
        } else if (FORM == TMA && paired) {
            if (warp == 12)
                SideLoader<ROPE, 0, true, false>::run(p, map_ckv, map_kpe, map_q, smem);
            else
                SideLoader<ROPE, 1, true, false>::run(p, map_ckv, map_kpe, map_q, smem);
        } else {
            if (warp == 12)
                SideLoader<ROPE, 0, false, FORM == FEW_ROWS>::run(p, map_ckv, map_kpe, map_q, smem);
            else
                SideLoader<ROPE, 1, false, FORM == FEW_ROWS>::run(p, map_ckv, map_kpe, map_q, smem);
        }
    }
    PM_TIME(1);
    if (paired) {
        __syncwarp();
        cluster_sync();     // the peer may still arrive here
    }
}

}  // namespace polymla

#define POLYMLA_DECODE(NAME, ELEM, ROPE, FORM)                                                               \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                     \
        NAME(const __grid_constant__ polymla::DecodeParams p, const __grid_constant__ polymla::TensorMap ckv, \
             const __grid_constant__ polymla::TensorMap kpe, const __grid_constant__ polymla::TensorMap q,   \
             const __grid_constant__ polymla::TensorMap q_pe) {                                              \
        polymla::decode<polymla::ELEM, ROPE, FORM>(p, &ckv, &kpe, &q, &q_pe);                              \
    }

// The host compiles one kernel at a time, so that a first start without nvcc compiles only what it needs.
#ifdef POLYMLA_DECODE_NAME
POLYMLA_DECODE(POLYMLA_DECODE_NAME, POLYMLA_DECODE_ELEM, POLYMLA_DECODE_ROPE, polymla::POLYMLA_DECODE_FORM)
#else
POLYMLA_DECODE(polymla_decode_bf16_d576_tma, Bf16, true, polymla::TMA)
POLYMLA_DECODE(polymla_decode_bf16_d576_few, Bf16, true, polymla::FEW_ROWS)
#ifndef POLYMLA_ONE_KERNEL
POLYMLA_DECODE(polymla_decode_bf16_d576_gather, Bf16, true, polymla::GATHERED)
POLYMLA_DECODE(polymla_decode_bf16_d512_tma, Bf16, false, polymla::TMA)
POLYMLA_DECODE(polymla_decode_bf16_d512_gather, Bf16, false, polymla::GATHERED)
POLYMLA_DECODE(polymla_decode_f16_d576_tma, F16, true, polymla::TMA)
POLYMLA_DECODE(polymla_decode_f16_d576_gather, F16, true, polymla::GATHERED)
POLYMLA_DECODE(polymla_decode_f16_d512_tma, F16, false, polymla::TMA)
POLYMLA_DECODE(polymla_decode_f16_d512_gather, F16, false, polymla::GATHERED)
POLYMLA_DECODE(polymla_decode_bf16_d512_few, Bf16, false, polymla::FEW_ROWS)
POLYMLA_DECODE(polymla_decode_f16_d576_few, F16, true, polymla::FEW_ROWS)
POLYMLA_DECODE(polymla_decode_f16_d512_few, F16, false, polymla::FEW_ROWS)
#endif
#endif
