// The words of a dialect in plain CUDA C++, for compilers that follow it and have instructions of their own: no inline
// assembly, no vendor header. Included by backends/{musa,maca,corex}/dialect.h, which define PM_WARP and PM_SHFL_XOR, and
// PM_OWN_TILE where they have a matrix unit's.
//
// common.h says what each of these names has to do.
#pragma once

#define PM_DEV __device__ __forceinline__
#define PM_GLOBAL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define PM_SHARED_DYNAMIC(name) extern __shared__ __attribute__((aligned(128))) char name[]

#include "plain.h"

namespace polymla {

PM_DEV int pm_thread() { return int(threadIdx.x); }
PM_DEV int pm_block() { return int(blockIdx.x); }
PM_DEV void pm_sync() { __syncthreads(); }
PM_DEV float pm_shfl_xor(float x, int lanes) { return PM_SHFL_XOR(x, lanes); }
PM_DEV void pm_atomic_min(int* at, int value) { (void)atomicMin(at, value); }
PM_DEV float pm_exp2(float x) { return exp2f(x); }
PM_DEV float pm_log2(float x) { return log2f(x); }

// ---- conversions, from the formats' definitions: half types differ from vendor to vendor ----------
PM_DEV float pm_f16_to_float(u16 x) {
    const u32 exponent = (x >> 10) & 31u, mantissa = x & 1023u;
    FloatBits v;
    if (exponent == 0)
        v.f = float(int(mantissa)) * 5.9604644775390625e-8f;        // 2^-24
    else
        v.u = exponent == 31 ? 0x7f800000u | (mantissa << 13) : ((exponent + 112u) << 23) | (mantissa << 13);
    v.u |= u32(x & 0x8000u) << 16;
    return v.f;
}
// To nearest, ties to even; too large is infinity, NaN stays NaN.
PM_DEV u16 pm_float_to_f16(float x) {
    FloatBits v;
    v.f = x;
    const u32 sign = (v.u >> 16) & 0x8000u;
    v.u &= 0x7fffffffu;
    if (v.u > 0x7f800000u) return u16(sign | 0x7e00u);
    if (v.u >= 0x47800000u) return u16(sign | 0x7c00u);             // 65536 and more
    if (v.u < 0x38800000u) {                                        // subnormal: 0.5 has its last place at 2^-24
        v.f += 0.5f;
        return u16(sign | (v.u - 0x3f000000u));
    }
    return u16(sign | ((v.u - 0x38000000u + 0xfffu + ((v.u >> 13) & 1u)) >> 13));
}

}  // namespace polymla

#ifndef PM_OWN_TILE
#include "tile_fma.h"
#define PM_TILE FmaTile
#endif
