// The MACA dialect (MetaX): mxcc and mcrtc, which follow CUDA C++; waves of 64. Plain FMA, or with POLYMLA_MXC_MMA the matrix
// unit, __builtin_mxc_mma_16x16x16{f16,bf16}: off until someone with the compiler has run the golden files with it.
//
// Public MACA programs (vLLM-metax and mcTlass of MetaX-MACA have the builtin) fill its operands by hand: lane l has row (or
// column) l % 16 of A and B and the four k from 4 (l / 16) on, and of C column l % 16 and the four rows from 4 (l / 16) on.
// That is MFMA's layout, so the tile is MFMA's, which the fiber harness runs. Unconfirmed: that two 32-bit words are taken
// for four halves; the spelling of the shuffle.
#pragma once

#define PM_WARP 64
#define PM_SHFL_XOR(x, lanes) __shfl_xor(x, lanes, 32)

#ifdef POLYMLA_MXC_MMA
#define PM_OWN_TILE
#endif
#include "words.h"

#ifdef POLYMLA_MXC_MMA
#include "common.h"

namespace polymla {

typedef u32 MxcHalves __attribute__((vector_size(8)));
typedef float MxcFloats __attribute__((vector_size(16)));

// c += a b on one wave.
template <class Elem>
PM_DEV void pm_mfma_16x16x16(float (&c)[4], const Words2& a, const Words2& b);
#define PM_MXC_MMA(ELEM, BUILTIN)                                                                  \
    template <>                                                                                    \
    PM_DEV void pm_mfma_16x16x16<ELEM>(float (&c)[4], const Words2& a, const Words2& b) {          \
        const MxcHalves x = {a.w[0], a.w[1]}, y = {b.w[0], b.w[1]};                                \
        const MxcFloats before = {c[0], c[1], c[2], c[3]}, after = BUILTIN(x, y, before);          \
        for (int i = 0; i < 4; ++i) c[i] = after[i];                                               \
    }
PM_MXC_MMA(Bf16, __builtin_mxc_mma_16x16x16bf16)
PM_MXC_MMA(F16, __builtin_mxc_mma_16x16x16f16)
#undef PM_MXC_MMA

}  // namespace polymla

#include "tile_mfma.h"
#define PM_TILE MfmaTile
#endif
