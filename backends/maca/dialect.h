// The MACA dialect (MetaX): mxcc and mcrtc, which follow CUDA C++; waves of 64. Plain FMA: the matrix unit's register layout
// (__builtin_mxc_mma_16x16x16) is not public, so it stays out until someone can check it.
//
// Unconfirmed: the spelling of the shuffle.
#pragma once

#define PM_WARP 64
#define PM_SHFL_XOR(x, lanes) __shfl_xor(x, lanes, 32)

#include "words.h"
