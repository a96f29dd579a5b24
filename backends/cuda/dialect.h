// The CUDA dialect: nvcc and NVRTC, sm_75 and later, no toolkit header needed. sm_80 and later use mma.sync, ldmatrix and
// cp.async (tile_mma.h); what is older, or built with POLYMLA_FMA, multiplies by plain FMA.
//
// backends/portable/common.h says what each of these names has to do.
#pragma once

#define PM_DEV __device__ __forceinline__
#define PM_GLOBAL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define PM_SHARED_DYNAMIC(name) extern __shared__ __align__(128) char name[]
#define PM_WARP 32

#include "params.h"

namespace polymla {

PM_DEV int pm_thread() { return int(threadIdx.x); }
PM_DEV int pm_block() { return int(blockIdx.x); }
PM_DEV void pm_sync() { __syncthreads(); }
PM_DEV float pm_shfl_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
PM_DEV void pm_atomic_min(int* at, int value) { atomicMin(at, value); }

PM_DEV float pm_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PM_DEV float pm_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

PM_DEV float pm_f16_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
PM_DEV u16 pm_float_to_f16(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

#if __CUDA_ARCH__ >= 800
PM_DEV u32 pm_pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

PM_DEV float pm_max(float a, float b) {
    float r;
    asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// Brings the line of an address that may be read into L2.
PM_DEV void pm_prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

PM_DEV u32 pm_shared(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// 16 bytes, or zeros where `valid` is false; then `src` is not read.
PM_DEV void pm_copy16(char* dst, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(pm_shared(dst)), "l"(src),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
PM_DEV void pm_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
PM_DEV void pm_copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

PM_DEV void pm_ldmatrix_x4(u32 (&r)[4], const char* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(pm_shared(at))
                 : "memory");
}
PM_DEV void pm_ldmatrix_x4_trans(u32 (&r)[4], const char* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(pm_shared(at))
                 : "memory");
}

// ---- for the kernel with roles ----
// What a thread has from here on, by whole groups of four warps; others wait for what these give.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL)
template <int N>
PM_DEV void pm_take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
PM_DEV void pm_leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
#else
template <int N>
PM_DEV void pm_take_registers() {}
template <int N>
PM_DEV void pm_leave_registers() {}
#endif
// A value that is worked out here, ahead of what waits, and not where it is used.
PM_DEV i64 pm_settled(i64 x) {
    asm volatile("" : "+l"(x));
    return x;
}
// As pm_thread, and worked out where it stands: what is made of it is not kept in registers from loop to loop.
PM_DEV int pm_thread_again() {
    int i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    return i;
}
template <class T>
PM_DEV T pm_shfl(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
PM_DEV float pm_fma(float a, float b, float c) {
    float r;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    return r;
}
// The inverse of pm_ldmatrix_x4; sm_90 and later.
PM_DEV void pm_stmatrix_x4(char* at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(pm_shared(at)), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
// Four bytes of the eight of x and y, x the lower ones, by the digits of the selector.
PM_DEV u32 pm_bytes(u32 x, u32 y, u32 selector) { return __byte_perm(x, y, selector); }
// A barrier in shared memory of 8 bytes, whose phases complete by `arrivals` arrivals each.
PM_DEV void pm_mbar_init(char* at, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(pm_shared(at)), "r"(arrivals) : "memory");
}
PM_DEV void pm_mbar_arrive(char* at) {
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(pm_shared(at)) : "memory");
}
// Arrives once this thread's copies so far have landed.
PM_DEV void pm_copy_arrive(char* at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(pm_shared(at)) : "memory");
}
// Whole rows, which the copy engine brings: sm_90 and later. Arrives on a barrier, whose phase then also waits for so many bytes.
PM_DEV void pm_mbar_arrive_expect(char* at, int bytes) {
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(pm_shared(at)), "r"(bytes)
                 : "memory");
}
// A multiple of 16 bytes between multiples of 16, which count for the barrier once they are there.
PM_DEV void pm_bulk_copy(char* dst, const void* src, int bytes, char* at) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(pm_shared(dst)),
                 "l"(src), "r"(bytes), "r"(pm_shared(at))
                 : "memory");
}
PM_DEV void pm_bulk_prefetch(const void* src, int bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}
// Shows the copy engine the barriers that this thread made, or orders it behind what this thread wrote.
PM_DEV void pm_mbar_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PM_DEV void pm_fence_bulk() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Waits for the end of the phase of this parity.
PM_DEV void pm_mbar_wait(char* at, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define PM_MBAR_TEST "mbarrier.try_wait.parity.shared.b64"
#else
#define PM_MBAR_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
    u32 done = 0;
    while (!done)
        asm volatile("{\n .reg .pred over;\n " PM_MBAR_TEST " over, [%1], %2;\n selp.u32 %0, 1, 0, over;\n}"
                     : "=r"(done)
                     : "r"(pm_shared(at)), "r"(parity)
                     : "memory");
}

struct Bf16;
struct F16;

// c[0..4] += a b, on one m16n8k16 instruction.
template <class Elem>
PM_DEV void pm_mma_16816(float* c, const u32 (&a)[4], const u32* b);
template <>
PM_DEV void pm_mma_16816<Bf16>(float* c, const u32 (&a)[4], const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
PM_DEV void pm_mma_16816<F16>(float* c, const u32 (&a)[4], const u32* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Programmatic dependent launch: no-ops where a kernel was launched without it.
#if __CUDA_ARCH__ >= 900
PM_DEV void pm_grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
PM_DEV void pm_grid_release() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#elif __CUDA_ARCH__ >= 800
PM_DEV void pm_grid_wait() {}
PM_DEV void pm_grid_release() {}
#endif

}  // namespace polymla

#if __CUDA_ARCH__ < 800
#include "plain.h"
#endif

#if __CUDA_ARCH__ >= 800 && !defined(POLYMLA_FMA)
#include "tile_mma.h"
#define PM_TILE MmaTile
#define PM_ROLES 1       // barriers in shared memory, and copies that arrive on them
#define PM_PIECES 1      // partial results as pieces.h has them
#else
#include "tile_fma.h"
#define PM_TILE FmaTile
#endif
