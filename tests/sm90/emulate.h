// What ptx.h and wgmma.h wrap, on a CPU: every GPU thread is a fiber (emulate.cpp), shared memory is an array, and what a warp or a
// warpgroup does together is done by the last of its threads to arrive.
//
// Strict, so that a kernel that passes does not depend on luck: fibers run in random order; a box of TMA lands some time after it was asked
// for and its place is poison until then; a matrix product happens when the warpgroup has issued it or, half of the time, when it is waited
// for; a barrier of the wrong arrivals, a wait that never ends, and an access outside shared memory end the process.
#pragma once

#include <cmath>
#include <cstring>
#include <algorithm>

#define PM_DEV inline
#define __device__
#define __global__
#define __forceinline__
#define __shared__ thread_local     // static in a function, and yet right behind `extern`
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim { unsigned x, y, z; };

namespace emulated {
using polymla::i64;
using polymla::u16;
using polymla::u32;
using polymla::u64;

const dim& thread_index();
const dim& block_index();
const dim& grid();
u32 cluster_ctas();
u32 rank();
// `bytes` of this CTA's shared memory at `addr`, or of another CTA's of the cluster.
char* shared(u32 addr, u32 bytes);
u32 address_of(const void* p);
void init(u32 bar, u32 count);
void arrive(u32 bar, u32 expect);      // map_to_rank's addresses, too
bool complete(u32 bar, u32 parity);
void wait(u32 bar, u32 parity);
void barrier(u32 id, u32 threads);
bool barrier_or(u32 id, u32 threads, bool value);
void cluster_barrier();
// Every lane's record of the warp, after all 32 have come; `bytes` up to 32 each. The result is good until the lane's next call.
const void* exchange(const void* mine, u32 bytes);
void load_box(u32 dst, const polymla::TensorMap* map, u32 bar, int c1, int c2, int c3, int c4, u32 mask);
// One matrix product of the warpgroup: m64 nN k16, D = [64][N] over its threads' registers.
struct Product {
    float* d;
    int n, accumulate, f16, a_transposed, b_transposed;
    u32 a_low, a_high, b_low, b_high;       // descriptors; A from registers where a_high is 0
    u32 a[4];
};
void issue(const Product& product);
void products_done();

inline float float_of(u32 x) { float f; std::memcpy(&f, &x, 4); return f; }
inline u32 bits_of(float x) { u32 u; std::memcpy(&u, &x, 4); return u; }
inline u16 to_bf16(float x) {
    const u32 u = bits_of(x);
    return u16((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline u16 to_f16(float x) { _Float16 h = _Float16(x); u16 u; std::memcpy(&u, &h, 2); return u; }
inline float from_f16(u16 x) { _Float16 h; std::memcpy(&h, &x, 2); return float(h); }
// As the hardware flushes.
inline float ftz(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define gridDim (emulated::grid())

using std::max;
using std::min;
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
template <class T> inline T __ldg(const T* p) { return *p; }
inline float __int_as_float(int x) { return emulated::float_of(unsigned(x)); }
inline float __uint_as_float(unsigned x) { return emulated::float_of(x); }
inline unsigned __float_as_uint(float x) { return emulated::bits_of(x); }
inline int __float_as_int(float x) { return int(emulated::bits_of(x)); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) r |= unsigned(bytes >> (s >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}
template <class T> inline T lane_of(T v, int from) { return static_cast<const T*>(emulated::exchange(&v, sizeof v))[from]; }
template <class T> inline T __shfl_sync(unsigned, T v, int from) { return lane_of(v, from & 31); }
template <class T> inline T __shfl_xor_sync(unsigned, T v, int apart) { return lane_of(v, int(threadIdx.x % 32) ^ apart); }
template <class T> inline T __shfl_up_sync(unsigned, T v, int by) {
    const int lane = int(threadIdx.x % 32);
    return lane_of(v, lane >= by ? lane - by : lane);
}
inline bool __any_sync(unsigned, bool v) {
    const bool* all = static_cast<const bool*>(emulated::exchange(&v, 1));
    return std::any_of(all, all + 32, [](bool x) { return x; });
}
inline bool __all_sync(unsigned, bool v) {
    const bool* all = static_cast<const bool*>(emulated::exchange(&v, 1));
    return std::all_of(all, all + 32, [](bool x) { return x; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned v) {
    const unsigned* all = static_cast<const unsigned*>(emulated::exchange(&v, 4));
    return *std::min_element(all, all + 32);
}
inline void __syncwarp() { char none = 0; emulated::exchange(&none, 1); }
inline void __syncthreads() { emulated::barrier(0, 0); }
template <class T> inline T atomicMax(T* at, T v) { const T old = *at; *at = std::max(old, v); return old; }
inline int atomicMin(int* at, int v) { const int old = *at; *at = std::min(old, v); return old; }

namespace polymla {

PM_DEV u32 smem_addr(const void* p) { return emulated::address_of(p); }
PM_DEV float exp2_fast(float x) { return emulated::ftz(std::exp2(emulated::ftz(x))); }
PM_DEV float log2_fast(float x) { return std::log2(x); }
#define PM_MARK(group, item, event)
#define PM_TIME(which)
#define PM_MERGE(which)
PM_DEV u32 opaque(u32 x) { return x; }
PM_DEV u32 uniform(u32 x) { return __shfl_sync(0xffffffffu, x, 0); }

PM_DEV void mbar_init(u32 bar, u32 count) { emulated::init(bar, count); }
PM_DEV void mbar_init_fence() {}
PM_DEV void mbar_arrive(u32 bar) { emulated::arrive(bar, 0); }
PM_DEV void mbar_expect_tx(u32 bar, u32 bytes) { emulated::arrive(bar, bytes); }
PM_DEV bool mbar_test(u32 bar, u32 parity) { return emulated::complete(bar, parity); }
PM_DEV void mbar_wait(u32 bar, u32 parity) { emulated::wait(bar, parity); }
PM_DEV u32 map_to_rank(u32 addr, u32 rank) { return addr | (rank + 1) << 24; }
PM_DEV void mbar_arrive_cluster(u32 addr) { emulated::arrive(addr, 0); }
PM_DEV u32 cluster_size() { return emulated::cluster_ctas(); }
PM_DEV u32 cluster_rank() { return emulated::rank(); }
PM_DEV void cluster_sync() { emulated::cluster_barrier(); }

PM_DEV void fence_async_shared() {}
PM_DEV void named_barrier(u32 id, u32 threads) { emulated::barrier(id, threads); }
PM_DEV bool barrier_or(u32 id, u32 threads, bool value) { return emulated::barrier_or(id, threads, value); }
PM_DEV void pdl_launch_dependents() {}
PM_DEV void pdl_wait() {}
template <int N> PM_DEV void reg_inc() {}
template <int N> PM_DEV void reg_dec() {}
PM_DEV bool elect_one() { __syncwarp(); return threadIdx.x % 32 == 0; }

PM_DEV void tma_prefetch_map(const TensorMap*) {}
PM_DEV void tma_load_4d(u32 dst, const TensorMap* map, u32 bar, int c1, int c2, int c3) {
    emulated::load_box(dst, map, bar, c1, c2, c3, 0, 0);
}
PM_DEV void tma_multicast_4d(u32 dst, const TensorMap* map, u32 bar, int c1, int c2, int c3, u16 mask) {
    emulated::load_box(dst, map, bar, c1, c2, c3, 0, mask);
}
PM_DEV void tma_load_5d(u32 dst, const TensorMap* map, u32 bar, int c1, int group, int c3, int c4) {
    emulated::load_box(dst, map, bar, c1, group, c3, c4, 0);
}
PM_DEV void tma_multicast_5d(u32 dst, const TensorMap* map, u32 bar, int c1, int group, int c3, int c4, u16 mask) {
    emulated::load_box(dst, map, bar, c1, group, c3, c4, mask);
}
// Reads, so that a checker of memory sees an address that must not be read.
PM_DEV void prefetch_l1(const void* p) { (void)*static_cast<const volatile char*>(p); }
PM_DEV void prefetch_l2(const void* p) { (void)*static_cast<const volatile char*>(p); }
PM_DEV void cp_async16(u32 dst, const void* src) { std::memcpy(emulated::shared(dst, 16), src, 16); }
PM_DEV void cp_async_commit() {}
template <int N> PM_DEV void cp_async_wait() {}
PM_DEV void cp_async_arrive(u32 bar) { emulated::arrive(bar, 0); }

PM_DEV void ldmatrix_x4(u32 (&r)[4], u32 addr) {
    const u32* from = static_cast<const u32*>(emulated::exchange(&addr, 4));
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (u32 i = 0; i < 4; ++i) std::memcpy(&r[i], emulated::shared(from[8 * i + g] + 4 * t, 4), 4);
}
PM_DEV void stmatrix_x4(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    const u32* to = static_cast<const u32*>(emulated::exchange(&addr, 4));
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, words[4] = {a, b, c, d};
    for (u32 i = 0; i < 4; ++i) std::memcpy(emulated::shared(to[8 * i + g] + 4 * t, 4), &words[i], 4);
}
PM_DEV void stmatrix_x4_trans(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    const u32* to = static_cast<const u32*>(emulated::exchange(&addr, 4));
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, words[4] = {a, b, c, d};
    for (u32 i = 0; i < 4; ++i)
        for (u32 k = 0; k < 2; ++k) {
            const u16 v = u16(words[i] >> 16 * k);
            std::memcpy(emulated::shared(to[8 * i + 2 * t + k] + 2 * g, 2), &v, 2);
        }
}
template <class T> PM_DEV T ld_shared_as(u32 addr) { T v; std::memcpy(&v, emulated::shared(addr, sizeof v), sizeof v); return v; }
template <class T> PM_DEV void st_shared_as(u32 addr, T v) { std::memcpy(emulated::shared(addr, sizeof v), &v, sizeof v); }
PM_DEV uint4 ld_shared_v4(u32 addr) { return ld_shared_as<uint4>(addr); }
PM_DEV void st_global_v4(void* addr, const uint4& v) { std::memcpy(addr, &v, 16); }
PM_DEV void st_shared_v4(u32 addr, u32 a, u32 b, u32 c, u32 d) { st_shared_as(addr, uint4{a, b, c, d}); }
PM_DEV int ld_shared(u32 addr) { return ld_shared_as<int>(addr); }
PM_DEV float ld_shared_f(u32 addr) { return ld_shared_as<float>(addr); }
PM_DEV float2 ld_shared_f2(u32 addr) { return ld_shared_as<float2>(addr); }
PM_DEV void st_shared(u32 addr, int v) { st_shared_as(addr, v); }
PM_DEV void st_shared_f(u32 addr, float v) { st_shared_as(addr, v); }
PM_DEV int ld_shared_i8(u32 addr) { return ld_shared_as<signed char>(addr); }
PM_DEV void st_shared_i8(u32 addr, int v) { st_shared_as(addr, static_cast<signed char>(v)); }

template <class Elem> PM_DEV u32 pack2(float lo, float hi);
template <> PM_DEV u32 pack2<Bf16>(float lo, float hi) { return emulated::to_bf16(lo) | u32(emulated::to_bf16(hi)) << 16; }
template <> PM_DEV u32 pack2<F16>(float lo, float hi) { return emulated::to_f16(lo) | u32(emulated::to_f16(hi)) << 16; }
template <class Elem>
PM_DEV void stmatrix_packed(u32 addr, const float* v) {
    stmatrix_x4(addr, pack2<Elem>(v[0], v[1]), pack2<Elem>(v[2], v[3]), pack2<Elem>(v[4], v[5]), pack2<Elem>(v[6], v[7]));
}
PM_DEV void partial_store(char* first, char* rest, const float* v) {
    u32 w[8];
    std::memcpy(w, v, 32);
    const u32 a[6] = {__byte_perm(w[0], w[5], 0x3215), __byte_perm(w[1], w[5], 0x3216), __byte_perm(w[4], w[5], 0x3217),
                      __byte_perm(w[2], w[7], 0x3215), __byte_perm(w[3], w[7], 0x3216), __byte_perm(w[6], w[7], 0x3217)};
    std::memcpy(first, a, 16);
    std::memcpy(rest, a + 4, 8);
}

PM_DEV void wgmma_fence() {}
PM_DEV void wgmma_commit() {}
template <int N> PM_DEV void wgmma_wait() { emulated::products_done(); }
template <int N> PM_DEV void fence_regs(float (&)[N]) {}

struct Desc;
template <class Elem> constexpr int is_f16 = 0;
template <> constexpr int is_f16<F16> = 1;

}  // namespace polymla
