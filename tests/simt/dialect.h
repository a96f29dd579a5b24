// The dialect of the fiber harness: plain C++, at the warp width and with the tiles that the build names.
//
//   PM_WARP            32, 64 or 128
//   SIMT_TILE_MMA      tiles of mma.sync with ldmatrix and asynchronous copies (warp 32)
//   SIMT_TILE_MFMA     tiles of MFMA (warp 64)
//   neither            plain FMA
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt.h"

#define PM_DEV inline
#define PM_GLOBAL(threads) extern "C" void
#define PM_SHARED_DYNAMIC(name) char* name = simt::shared()

#include "params.h"

#define pm_sync() simt::barrier(__FILE__, __LINE__)

namespace polymla {

PM_DEV int pm_thread() { return simt::thread(); }
PM_DEV int pm_block() { return simt::block(); }
PM_DEV void pm_grid_wait() {}
PM_DEV void pm_grid_release() {}
PM_DEV float pm_exp2(float x) { return std::exp2(x); }
PM_DEV float pm_log2(float x) { return std::log2(x); }
PM_DEV float pm_max(float a, float b) { return std::fmax(a, b); }
PM_DEV void pm_atomic_min(int* at, int value) { *at = value < *at ? value : *at; }

struct ShuffleLane {
    float x;
    int lanes;
};
PM_DEV void shuffle_xor(void** records) {
    float y[32];
    for (int i = 0; i < 32; ++i) {
        const ShuffleLane& r = *static_cast<ShuffleLane*>(records[i]);
        y[i] = static_cast<ShuffleLane*>(records[i ^ r.lanes])->x;
    }
    for (int i = 0; i < 32; ++i) static_cast<ShuffleLane*>(records[i])->x = y[i];
}
PM_DEV float pm_shfl_xor_at(float x, int lanes, const char* file, int line) {
    ShuffleLane mine = {x, lanes};
    simt::collective(32, shuffle_xor, &mine, file, line);
    return mine.x;
}
#define pm_shfl_xor(x, lanes) pm_shfl_xor_at(x, lanes, __FILE__, __LINE__)

// ---- conversions, from the definitions of the formats -----------------------------------------
PM_DEV float bits_to_float(u32 u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
PM_DEV u32 float_to_bits(float f) {
    u32 u;
    std::memcpy(&u, &f, 4);
    return u;
}
PM_DEV float pm_f16_to_float(u16 x) {
    const int exponent = (x >> 10) & 31, mantissa = x & 1023;
    float v;
    if (exponent == 31)
        v = mantissa ? bits_to_float(0x7fc00000u) : bits_to_float(0x7f800000u);
    else
        v = exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return x & 0x8000 ? -v : v;
}
PM_DEV u16 pm_float_to_f16(float x) {
    const u16 sign = u16(float_to_bits(x) >> 16 & 0x8000u);
    const float a = std::fabs(x);
    if (a != a) return u16(sign | 0x7e00);
    if (a >= 65520.0f) return u16(sign | 0x7c00);
    int e = 0;
    if (a >= 6.103515625e-5f) {
        std::frexp(a, &e);          // a = m 2^e, m in [0.5, 1): 11 bits of mantissa from 2^(e - 11) up
        e -= 11;
    } else {
        e = -24;
    }
    const int units = int(std::nearbyint(std::ldexp(a, -e)));     // ties to even, as the format rounds
    return u16(sign | (e == -24 && units < 1024 ? units : ((e + 24) << 10) + units));
}
PM_DEV u32 round_bf16(float x) {
    const u32 u = float_to_bits(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
PM_DEV u32 pm_pack_bf16(float lo, float hi) { return round_bf16(lo) | (round_bf16(hi) << 16); }

struct Bf16;
struct F16;
template <class Elem>
PM_DEV float widen(u16 x);
template <>
PM_DEV float widen<Bf16>(u16 x) {
    return bits_to_float(u32(x) << 16);
}
template <>
PM_DEV float widen<F16>(u16 x) {
    return pm_f16_to_float(x);
}

// Reads, so that a checker of memory sees an address that must not be read.
PM_DEV void pm_prefetch(const void* at) { (void)*static_cast<const volatile char*>(at); }

}  // namespace polymla

#if defined(SIMT_TILE_MMA)
#include "emulate_mma.h"
#include "tile_mma.h"
#define PM_TILE MmaTile
#else
namespace polymla {
PM_DEV void pm_copy16(char* dst, const void* src, bool valid) {
    if (valid)
        std::memcpy(dst, src, 16);
    else
        std::memset(dst, 0, 16);
}
PM_DEV void pm_copy_commit() {}
template <int N>
PM_DEV void pm_copy_wait() {}
}  // namespace polymla
#if defined(SIMT_TILE_MFMA)
#include "emulate_mfma.h"
#include "tile_mfma.h"
#define PM_TILE MfmaTile
#else
#include "tile_fma.h"
#define PM_TILE FmaTile
#endif
#endif
