// The CoreX dialect (Iluvatar): its clang compiles CUDA C++ for ivcore; warps of 64. Plain FMA: the TCU's register layout is
// not public.
//
// Unconfirmed: the spelling of the shuffle.
#pragma once

#define PM_WARP 64
#define PM_SHFL_XOR(x, lanes) __shfl_xor(x, lanes, 32)

#include "words.h"
