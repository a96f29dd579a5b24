// What a dialect without instructions for it says: bf16 from its definition, copies through registers, nothing between kernels.
// A dialect includes it after PM_DEV.
//
// common.h says what each of these names has to do.
#pragma once

#include "params.h"

namespace polymla {

// To nearest, ties to even; NaN stays NaN.
PM_DEV u32 pm_round_bf16(float x) {
    FloatBits v;
    v.f = x;
    return x != x ? (v.u >> 16) | 0x40u : (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
}
PM_DEV u32 pm_pack_bf16(float lo, float hi) { return pm_round_bf16(lo) | (pm_round_bf16(hi) << 16); }

// 16 bytes, or zeros where `valid` is false; then `src` is not read. Through registers: complete when the next barrier is.
struct alignas(16) CopyUnit {
    u32 w[4];
};
PM_DEV void pm_copy16(char* dst, const void* src, bool valid) {
    CopyUnit x = {{0, 0, 0, 0}};
    if (valid) x = *static_cast<const CopyUnit*>(src);
    *reinterpret_cast<CopyUnit*>(dst) = x;
}
PM_DEV void pm_copy_commit() {}
template <int N>
PM_DEV void pm_copy_wait() {}

PM_DEV float pm_max(float a, float b) { return a > b ? a : b; }
PM_DEV void pm_prefetch(const void*) {}
PM_DEV void pm_grid_wait() {}
PM_DEV void pm_grid_release() {}

}  // namespace polymla
