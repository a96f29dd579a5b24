// The MUSA dialect (Moore Threads): mcc and libmtrtc, which follow CUDA C++. Plain FMA; SQMMA is for later.
//
// The warp has 128 lanes on mp_21 and mp_22 and 32 on mp_31; the compile command says which (PM_WARP). Unconfirmed: that
// the shuffle works within 32 lanes where a warp has 128.
#pragma once

#if PM_WARP != 128 && PM_WARP != 32
#error "PM_WARP must be 128 (mp_21, mp_22) or 32 (mp_31)"
#endif
#define PM_SHFL_XOR(x, lanes) __shfl_xor_sync(0xffffffffu, x, lanes, 32)

#include "words.h"
