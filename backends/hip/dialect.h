// The HIP dialect: clang for AMD targets with or without ROCm's headers (-nogpuinc), hipcc, hiprtc, and compilers that
// follow them (DTK). MFMA from gfx90a on; MMAC of Hygon's gfx926 and later behind POLYMLA_MMAC, which nobody has
// compiled yet; plain FMA elsewhere.
//
// backends/portable/common.h says what each of these names has to do.
#pragma once

#define PM_DEV __attribute__((device)) inline __attribute__((always_inline))
#define PM_GLOBAL(threads)                                                                                 \
    extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(threads, threads))) void
// The size in the launch is what counts; a declared size would be added to it.
#define PM_SHARED_DYNAMIC(name) extern __attribute__((shared)) __attribute__((aligned(128))) char name[]
#define PM_WARP 64

#include "plain.h"

namespace polymla {

PM_DEV int pm_thread() { return int(__builtin_amdgcn_workitem_id_x()); }
PM_DEV int pm_block() { return int(__builtin_amdgcn_workgroup_id_x()); }
PM_DEV void pm_sync() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// Lane numbers of a wave; groups of 32 never reach across, since `lanes` < 32.
PM_DEV float pm_shfl_xor(float x, int lanes) {
    union {
        float f;
        int i;
    } v;
    v.f = x;
    v.i = __builtin_amdgcn_ds_bpermute(((pm_thread() ^ lanes) & 63) * 4, v.i);
    return v.f;
}
PM_DEV void pm_atomic_min(int* at, int value) { (void)__atomic_fetch_min(at, value, __ATOMIC_RELAXED); }

PM_DEV float pm_exp2(float x) { return __builtin_exp2f(x); }
PM_DEV float pm_log2(float x) { return __builtin_log2f(x); }

PM_DEV float pm_f16_to_float(u16 x) {
    union {
        u16 u;
        _Float16 h;
    } v;
    v.u = x;
    return float(v.h);
}
PM_DEV u16 pm_float_to_f16(float x) {
    union {
        u16 u;
        _Float16 h;
    } v;
    v.h = _Float16(x);
    return v.u;
}

}  // namespace polymla

#if !defined(POLYMLA_FMA) && (defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx941__) || \
                              defined(__gfx942__) || defined(__gfx950__))
#define PM_HAS_MFMA 1
#endif

#if defined(PM_HAS_MFMA) || defined(POLYMLA_MMAC)
#include "common.h"

namespace polymla {

typedef float Vec4f __attribute__((ext_vector_type(4)));
typedef short Vec4s __attribute__((ext_vector_type(4)));
typedef _Float16 Vec4h __attribute__((ext_vector_type(4)));

union MfmaOperand {
    Words2 w;
    Vec4s s;
    Vec4h h;
};

// c += a b on one wave. MMAC (v_mmac_f32_16x16x16) is taken to have MFMA's register layout: whoever compiles it first has
// to check that against the golden files.
template <class Elem>
PM_DEV void pm_mfma_16x16x16(float (&c)[4], const Words2& a, const Words2& b);
template <>
PM_DEV void pm_mfma_16x16x16<Bf16>(float (&c)[4], const Words2& a, const Words2& b) {
    MfmaOperand x, y;
    x.w = a;
    y.w = b;
    Vec4f d = {c[0], c[1], c[2], c[3]};
#if defined(POLYMLA_MMAC)
    d = __builtin_hcu_mmac_f32_16x16x16_bf16(x.s, y.s, d);
#else
    d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x.s, y.s, d, 0, 0, 0);
#endif
    for (int i = 0; i < 4; ++i) c[i] = d[i];
}
template <>
PM_DEV void pm_mfma_16x16x16<F16>(float (&c)[4], const Words2& a, const Words2& b) {
    MfmaOperand x, y;
    x.w = a;
    y.w = b;
    Vec4f d = {c[0], c[1], c[2], c[3]};
#if defined(POLYMLA_MMAC)
    d = __builtin_hcu_mmac_f32_16x16x16_f16(x.h, y.h, d);
#else
    d = __builtin_amdgcn_mfma_f32_16x16x16f16(x.h, y.h, d, 0, 0, 0);
#endif
    for (int i = 0; i < 4; ++i) c[i] = d[i];
}

}  // namespace polymla

#include "tile_mfma.h"
#define PM_TILE MfmaTile
#else
#include "tile_fma.h"
#define PM_TILE FmaTile
#endif
