// The warpgroup matrix instructions that the decode kernel uses.
//
//   qk_step: S[64 x 64] (+)= Q[64 x 16] K[64 x 16]^T, Q from registers, K from shared
//            memory as it lies in the cache (K-major). A from registers keeps the
//            shared-memory traffic at 64 B per clock; with both operands in shared
//            memory an n64 instruction would need all of its 128 B per clock.
//   qk_step_shared: the same with Q from shared memory, for the rope columns.
//   pv_step: O[64 x 128] (+)= P[64 x 16] V[16 x 128], P from shared memory (K-major),
//            V the same bytes as K, read transposed (N-major). n256 would save a quarter of P's
//            reads, but 512 threads start with 128 registers and ptxas refuses it there.
#pragma once

#include "ptx.h"

namespace polymla {

// A matrix descriptor in two words. Steps only move the address, in the lower one: 64-bit sums would cost four more instructions
// each, and instructions that run for the first time are slow to come.
struct Desc {
    u32 low, high;
    PM_DEV Desc operator+(u32 units) const { return Desc{low + units, high}; }
};

template <class Elem>
PM_DEV void qk_step(float (&d)[32], const u32 (&a)[4], Desc k, int accumulate);

template <class Elem>
PM_DEV void qk_step_shared(float (&d)[32], Desc q, Desc k);

template <class Elem>
PM_DEV void pv_step(float (&d)[64], Desc p, Desc v, int accumulate);

// The few-rows kernel: S^T[64 tokens x 16 rows] (+)= K[64 x 16] Q[16 x 16]^T, and O^T[64 columns x 16 rows] += V[16 tokens x 64]^T P^T.
template <class Elem>
PM_DEV void few_qk_step(float (&d)[8], Desc k, Desc q, int accumulate);
template <class Elem>
PM_DEV void few_pv_step(float (&d)[8], Desc v, Desc p);

#ifndef POLYMLA_EMULATED
// One body for both element types; %n are the accumulators, then the operands.
#define PM_WGMMA(ELEM, TYPE)                                                                                      \
    template <>                                                                                                   \
    PM_DEV void qk_step<ELEM>(float (&d)[32], const u32 (&a)[4], Desc k, int accumulate) {                        \
        asm volatile(                                                                                             \
        "{\n .reg .pred p;\n .reg .b64 k;\n setp.ne.b32 p, %38, 0;\n mov.b64 k, {%36, %37};\n"                     \
        " wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                         \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
        "}, {%32, %33, %34, %35}, k, p, 1, 1, 0;\n}\n"                                                          \
        : \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(k.low), "r"(k.high), "r"(accumulate));                              \
    }                                                                                                             \
    template <>                                                                                                   \
    PM_DEV void qk_step_shared<ELEM>(float (&d)[32], Desc q, Desc k) {                                    \
        asm volatile(                                                                                             \
        "{\n .reg .b64 q, k;\n mov.b64 q, {%32, %33};\n mov.b64 k, {%34, %35};\n wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                          \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
        "}, q, k, 1, 1, 1, 0, 0;\n}\n"                                                                           \
        : \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
        : "r"(q.low), "r"(q.high), "r"(k.low), "r"(k.high));                                                                              \
    }                                                                                                             \
    template <>                                                                                                   \
    PM_DEV void pv_step<ELEM>(float (&d)[64], Desc p, Desc v, int accumulate) {                           \
        asm volatile(                                                                                             \
        "{\n .reg .pred p;\n .reg .b64 a, v;\n setp.ne.b32 p, %68, 0;\n mov.b64 a, {%64, %65};\n mov.b64 v, {%66, %67};\n"                                                            \
        " wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                        \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
        "}, a, v, p, 1, 1, 0, 1;\n}\n"                                                                        \
        : \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
        : "r"(p.low), "r"(p.high), "r"(v.low), "r"(v.high), "r"(accumulate));                                                             \
    }
#define PM_WGMMA_FEW(ELEM, TYPE)                                                                                                    \
    template <>                                                                                                                      \
    PM_DEV void few_qk_step<ELEM>(float (&d)[8], Desc k, Desc q, int accumulate) {                                                   \
        asm volatile(                                                                                                                \
            "{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.b32 p, %12, 0;\n mov.b64 a, {%8, %9};\n mov.b64 b, {%10, %11};\n"           \
            " wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7}, a, b, p, 1, 1, 0, 0;\n}\n" \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])                         \
            : "r"(k.low), "r"(k.high), "r"(q.low), "r"(q.high), "r"(accumulate));                                                    \
    }                                                                                                                                \
    template <>                                                                                                                      \
    PM_DEV void few_pv_step<ELEM>(float (&d)[8], Desc v, Desc p) {                                                                   \
        asm volatile(                                                                                                                \
            "{\n .reg .b64 a, b;\n mov.b64 a, {%8, %9};\n mov.b64 b, {%10, %11};\n"                                                  \
            " wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7}, a, b, 1, 1, 1, 1, 0;\n}\n" \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])                         \
            : "r"(v.low), "r"(v.high), "r"(p.low), "r"(p.high));                                                                     \
    }
PM_WGMMA_FEW(Bf16, "bf16")
PM_WGMMA_FEW(F16, "f16")
#undef PM_WGMMA_FEW
PM_WGMMA(Bf16, "bf16")
PM_WGMMA(F16, "f16")
#undef PM_WGMMA
#endif

}  // namespace polymla
