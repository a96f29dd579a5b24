// Thin wrappers over the PTX that the sm90 kernels use: mbarrier, TMA, wgmma,
// ldmatrix/stmatrix, cp.async, register reallocation and programmatic
// dependent launch. No toolkit header is needed, so nvcc and NVRTC compile it alike.
#pragma once

#include "params.h"

namespace polymla {
struct Bf16 {};
struct F16 {};
}  // namespace polymla

#ifdef POLYMLA_EMULATED     // the same on a CPU: tests/sm90
#include POLYMLA_EMULATED
#else

namespace polymla {

#define PM_DEV __device__ __forceinline__

PM_DEV u32 smem_addr(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

PM_DEV float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Time stamps for the timeline in docs/sm90-decode.md: one CTA, one thread a warpgroup.
#ifdef POLYMLA_PROFILE
constexpr u32 MARKED = 256;     // blocks
__device__ u32 polymla_marks[7][MARKED][16];
__device__ u64 polymla_times[1024][2];
__device__ u64 polymla_merge_times[1024][6];
PM_DEV void mark_merge(u32 which) {
    if (threadIdx.x == 0) asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(polymla_merge_times[blockIdx.x][which])::"memory");
}
#define PM_MERGE(which) mark_merge(which)
PM_DEV void mark_time(u32 which) {
    if (threadIdx.x == 128 && blockIdx.x == 0 && blockIdx.y == 0)
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(polymla_times[blockIdx.z][which])::"memory");
}
#define PM_TIME(which) mark_time(which)
PM_DEV void mark(u32 group, u32 item, u32 event) {
    if (threadIdx.x % (threadIdx.x < 384 ? 128 : 32) == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 3 && item < MARKED) {
        u32 t;
        asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
        polymla_marks[group][item][event] = t;
    }
}
// Few of them: each takes registers, and a spill shows up as microseconds.
#define PM_MARK(group, item, event)                                                              \
    if ((group) == 6 || ((group) == 0 && (0xfca1u >> (event) & 1)) || ((group) == 1 && (0x12au >> (event) & 1))) mark(group, item, event)
#else
#define PM_MARK(group, item, event)
#define PM_TIME(which)
#define PM_MERGE(which)
#endif

PM_DEV float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same value, but nothing derived from it is worth keeping: addresses computed from it are computed
// again where they are used, instead of living (or being spilled) across the main loop.
PM_DEV u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// A value that is the same in the whole warp, and that the compiler then knows to be: what is derived from it costs uniform
// instructions, one where there were three.
PM_DEV u32 uniform(u32 x) { return __shfl_sync(0xffffffffu, x, 0); }

// ---- mbarrier -------------------------------------------------------------

PM_DEV void mbar_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

PM_DEV void mbar_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

PM_DEV void mbar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

PM_DEV void mbar_expect_tx(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

PM_DEV bool mbar_test(u32 bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    return done != 0;
}

// Blocks until the phase of `parity` is complete. With POLYMLA_SPIN_LIMIT set
// (test builds) a wait that can never end traps instead of hanging the device.
PM_DEV void mbar_wait(u32 bar, u32 parity) {
#ifdef POLYMLA_SPIN_LIMIT
    for (u32 spins = 0;; ++spins) {
#else
    for (;;) {
#endif
        u32 done;
        asm volatile(
            "{\n .reg .pred p;\n"
            " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            " selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
        if (done) return;
#ifdef POLYMLA_SPIN_LIMIT
        if (spins > POLYMLA_SPIN_LIMIT) __trap();
#endif
    }
}

// The same address in the shared memory of CTA `rank` of the cluster.
PM_DEV u32 map_to_rank(u32 addr, u32 rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
    return r;
}

// Arrives on a barrier of any CTA of the cluster, by an address from map_to_rank. Nothing written is handed over by it,
// only permission to overwrite what was read: a release at cluster scope would cost a fence of a thousand cycles.
PM_DEV void mbar_arrive_cluster(u32 addr) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(addr) : "memory");
}

// ---- clusters -----------------------------------

PM_DEV u32 cluster_size() {
    u32 n;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
}
PM_DEV u32 cluster_rank() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
PM_DEV void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- proxies, named barriers, launch control ----------------------

// Orders this thread's ordinary shared-memory writes before later reads by wgmma or TMA.
PM_DEV void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

PM_DEV void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// As named_barrier, and whether any thread came with `value` set.
PM_DEV bool barrier_or(u32 id, u32 threads, bool value) {
    u32 any;
    asm volatile(
        "{\n .reg .pred p, q;\n setp.ne.u32 p, %3, 0;\n barrier.cta.red.or.aligned.pred q, %1, %2, p;\n"
        " selp.u32 %0, 1, 0, q;\n}\n"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(u32(value))
        : "memory");
    return any != 0;
}

PM_DEV void pdl_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
PM_DEV void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <int N>
PM_DEV void reg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
PM_DEV void reg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// One lane of a converged warp; the compiler then knows that a single thread runs.
PM_DEV bool elect_one() {
    u32 yes;
    asm volatile(
        "{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}\n" : "=r"(yes));
    return yes != 0;
}

// ---- TMA ----------------------------------------------------------------------

PM_DEV void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What createpolicy.fractional.L2::evict_first with fraction 1.0 returns, for what a pair of CTAs reads once: 3% at h 128.
// Memory-bound calls are 2% faster without.
constexpr u64 EVICT_FIRST = 0x12F0000000000000ull;

// One box of a 4-D map (kpe, q_pe) to shared memory.
PM_DEV void tma_load_4d(u32 dst, const TensorMap* map, u32 bar, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

PM_DEV void tma_multicast_4d(u32 dst, const TensorMap* map, u32 bar, int c1, int c2, int c3, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(0), "r"(c1), "r"(c2), "r"(c3), "h"(mask), "l"(EVICT_FIRST)
        : "memory");
}

// One box of a 5-D map (ckv, q_nope) to shared memory.
PM_DEV void tma_load_5d(u32 dst, const TensorMap* map, u32 bar, int c1, int group, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(0), "r"(c1), "r"(group), "r"(c3), "r"(c4)
        : "memory");
}

// The same into every CTA of the cluster named in `mask`, at the same offset; each one's barrier counts its bytes.
PM_DEV void tma_multicast_5d(u32 dst, const TensorMap* map, u32 bar, int c1, int group, int c3, int c4, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8, %9;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(0), "r"(c1), "r"(group), "r"(c3), "r"(c4), "h"(mask), "l"(EVICT_FIRST)
        : "memory");
}

PM_DEV void prefetch_l1(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
PM_DEV void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- cp.async -------------------------------------------------------------------

PM_DEV void cp_async16(u32 dst, const void* src) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
PM_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but this thread's last N groups.
template <int N>
PM_DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// Arrives once on the barrier when all of this thread's earlier cp.async have landed.
PM_DEV void cp_async_arrive(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- matrix fragments through shared memory ---------------------------------------

PM_DEV void ldmatrix_x4(u32 (&r)[4], u32 addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}

PM_DEV void stmatrix_x4(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Each 8 x 8 block transposed.
PM_DEV void stmatrix_x4_trans(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

PM_DEV uint4 ld_shared_v4(u32 addr) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr) : "memory");
    return v;
}

PM_DEV void st_global_v4(void* addr, const uint4& v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(addr), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

PM_DEV void st_shared_v4(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- 16-bit conversions --------------------------------------------------------------
template <class Elem>
PM_DEV u32 pack2(float lo, float hi);
template <>
PM_DEV u32 pack2<Bf16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
template <>
PM_DEV u32 pack2<F16>(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// Packing and storing in one statement each, because ptxas would pack all accumulators first, and spill: two neighbouring 8 x 8
// blocks of 16 rows to shared memory.
template <class Elem>
PM_DEV void stmatrix_packed(u32 addr, const float* v);
#define PM_STORE_PACKED(ELEM, CVT)                                                                                          \
    template <>                                                                                                            \
    PM_DEV void stmatrix_packed<ELEM>(u32 addr, const float* v) {                                                          \
        asm volatile("{\n .reg .b32 a, b, c, d;\n " CVT " a, %2, %1;\n " CVT " b, %4, %3;\n " CVT " c, %6, %5;\n " CVT        \
                     " d, %8, %7;\n stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {a, b, c, d};\n}\n" ::"r"(addr),        \
                     "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7])                 \
                     : "memory");                                                                                          \
    }
PM_STORE_PACKED(Bf16, "cvt.rn.bf16x2.f32")
PM_STORE_PACKED(F16, "cvt.rn.f16x2.f32")
#undef PM_STORE_PACKED

// Shared-memory loads and stores by 32-bit address.
PM_DEV int ld_shared(u32 addr) {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}
PM_DEV float ld_shared_f(u32 addr) { return __int_as_float(ld_shared(addr)); }
PM_DEV float2 ld_shared_f2(u32 addr) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(addr) : "memory");
    return v;
}
PM_DEV void st_shared(u32 addr, int v) { asm volatile("st.shared.s32 [%0], %1;" ::"r"(addr), "r"(v) : "memory"); }
PM_DEV void st_shared_f(u32 addr, float v) { st_shared(addr, __float_as_int(v)); }
PM_DEV int ld_shared_i8(u32 addr) {
    int v;
    asm volatile("ld.shared.s8 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
    return v;
}
PM_DEV void st_shared_i8(u32 addr, int v) { asm volatile("st.shared.s8 [%0], %1;" ::"r"(addr), "r"(v) : "memory"); }

// Eight values of a piece, packed and stored (tile.h): 16 bytes and 8.
PM_DEV void partial_store(char* first, char* rest, const float* v) {
    // One statement, because ptxas would make all chunks' words first, and spill.
    asm volatile(
        "{\n .reg .b32 a, b, c, d, e, f;\n"
        " prmt.b32 a, %2, %7, 0x3215;\n prmt.b32 b, %3, %7, 0x3216;\n prmt.b32 c, %6, %7, 0x3217;\n"
        " prmt.b32 d, %4, %9, 0x3215;\n prmt.b32 e, %5, %9, 0x3216;\n prmt.b32 f, %8, %9, 0x3217;\n"
        " st.global.v4.b32 [%0], {a, b, c, d};\n"
        " st.global.v2.b32 [%1], {e, f};\n}\n" ::"l"(first), "l"(rest), "r"(__float_as_uint(v[0])),
        "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])), "r"(__float_as_uint(v[3])), "r"(__float_as_uint(v[4])),
        "r"(__float_as_uint(v[5])), "r"(__float_as_uint(v[6])), "r"(__float_as_uint(v[7]))
        : "memory");
}

// ---- wgmma -------------------------------------------------------------------------

PM_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PM_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
PM_DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Pins accumulator registers: the compiler may not move their uses across this point.
template <int N>
PM_DEV void fence_regs(float (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

}  // namespace polymla

#endif
