// Merging the pieces of split requests.
//
// Tile      the fragment of 32, 16 or 8 lanes (tile.h) of every piece: eight values a lane, 16 columns of 16, 8 or 4 rows.
// Roles     G lanes share the pieces of a fragment: up to 16 warps, then up to four groups of each warp's lanes. G grows
//           as there is less to merge, so that all SMs have work and all loads of the call are in flight at once.
// Pipeline  launched as a programmatic dependent of the main kernel. Up to six pieces a lane are copied to shared memory
//           (cp.async) at once, in two halves; each lane adds up its own, relative to their largest maximum, then sums meet by
//           shuffles, and those of warps in a tree. The order of summation is fixed.
//
// The time is the number of instructions: 33 cycles for eight that run for the first time, and one a cycle and scheduler for
// all warps together. Hence few warps, rolled loops, and nothing computed twice.
//
// Grid: two CTAs of 512 threads an SM; they share the work evenly.
#include "tile.h"

namespace polymla {

constexpr int COMBINE_WARPS = 16;
constexpr int AT_ONCE = 6;          // pieces that a lane has in flight
constexpr u32 LOG_GROUPS = 2;       // most groups of lanes in a warp
constexpr u32 LOG_WARPS = 4;
constexpr u32 FIXED_LOG_SHARE = 2;  // of G in batch-invariant mode, where the order must not depend on the batch
constexpr u32 BAR_TREE = 1;

struct CombineSmem {
    uint4 first[COMBINE_WARPS][AT_ONCE][32];
    uint2 rest[COMBINE_WARPS][AT_ONCE][32];
    float4 rows[COMBINE_WARPS][AT_ONCE][8];     // one a quad of lanes
};

static_assert(sizeof(CombineSmem) == 86016, "the host asks for as much");

// 2^d of an integer d <= 0, 0 from -127 on.
PM_DEV float power_of_two(float d) {
    // 1.5 * 2^23 makes an integer of the sum's low bits, 127 an exponent.
    return __uint_as_float(__float_as_uint(fmaxf(d, -127.0f) + 12583039.0f) << 23);
}

// Eight values in two rows, as weighted sums, and the sums of the weights, both relative to 2^max. Maxima are integers, so that
// no factor is rounded, however large the logits.
struct Sums {
    float o[8], max[2], weights[2];

    // Makes them relative to another maximum, not smaller.
    PM_DEV void raise(float max0, float max1) {
        const float to[2] = {max0, max1};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float f = power_of_two(max[k] - to[k]);
            max[k] = to[k];
            weights[k] *= f;
#pragma unroll
            for (int i = 2 * k; i < 8; i += i % 2 ? 3 : 1) o[i] *= f;
        }
    }
    // Adds others, whose maxima are not larger.
    PM_DEV void add(const float (&v)[8], const float4& rows) {
        const float others_max[2] = {rows.x, rows.z}, others_weights[2] = {rows.y, rows.w};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float f = power_of_two(others_max[k] - max[k]);
            weights[k] += others_weights[k] * f;
#pragma unroll
            for (int i = 2 * k; i < 8; i += i % 2 ? 3 : 1) o[i] += v[i] * f;
        }
    }
    PM_DEV void merge(const float (&v)[8], const float4& rows) {
        raise(fmaxf(max[0], rows.x), fmaxf(max[1], rows.z));
        add(v, rows);
    }
    PM_DEV float4 rows() const { return make_float4(max[0], weights[0], max[1], weights[1]); }
};

// Where row `row` of the packed ones lies in a tensor of these strides.
PM_DEV i64 row_offset(const DecodeParams& p, int req, int kv_head, int row, i64 stride_b, i64 stride_h, i64 stride_s) {
    const int s = query_of(p, row);
    return i64(req) * stride_b + i64(kv_head * p.heads_per_kv + row - s * p.heads_per_kv) * stride_h + i64(s) * stride_s;
}

template <class Elem>
PM_DEV void combine(const DecodeParams& p) {
    extern __shared__ __align__(1024) char smem_raw[];
    CombineSmem& smem = *reinterpret_cast<CombineSmem*>(smem_raw);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool fixed = p.fixed_split_blocks > 0;

    PM_MERGE(0);
    // The number of split requests and the first 31 of them in one load.
    Owner listed = {};
    if (!fixed && lane <= u32(p.b)) listed = p.owners[lane];
    const u32 count = fixed ? p.b : __shfl_sync(0xffffffffu, listed.req, 0);
    // 32 bits do: an item is 128 elements of out or more.
    // As many row groups as a power of two: a division in code that runs once takes half a microsecond.
    const u32 rows = p.s_q * p.heads_per_kv, log_row_groups = 32 - __clz((rows - 1) / 16);
    const u32 units = count * p.h_kv << log_row_groups;
    // G is the largest power of two that leaves no CTA more than one item, if there is one.
    u32 log_share = FIXED_LOG_SHARE;
    if (!fixed) {
        int doublings = __clz(units) - __clz(gridDim.x);
        if (doublings > 0 && units << doublings > gridDim.x) --doublings;
        log_share = u32(min(max(doublings - 1, 0), int(LOG_GROUPS + LOG_WARPS)));
    }
    static_assert(CHUNKS == 2 * COMBINE_WARPS, "a unit takes 2 G items");
    const u32 log_groups = log_share - min(log_share, LOG_WARPS), log_together = LOG_WARPS + log_groups - log_share;
    const u32 together = 1u << log_together;            // fragments of a CTA
    const u32 width = 32u >> log_groups;                // lanes of a fragment
    const int share = 1 << log_share;                   // G
    const int base = int(warp >> log_together << log_groups), rank = base + int(lane >> (5 - log_groups));      // among those who share
    const u32 tile_step = p.h_kv * p.m_tiles;           // tiles of a slot; a workspace has less than 2^32 of them
    const u32 items = units << (log_share + 1);
    PM_MERGE(1);
    // Opaque, so that they are made before the wait.
    const u32 place_first = opaque(smem_addr(&smem.first[warp][0][lane])), place_rest = opaque(smem_addr(&smem.rest[warp][0][lane]));
    const u32 place_rows = opaque(smem_addr(&smem.rows[warp][0][lane / 4]));
    bool waited = false;

#pragma unroll 1
    for (u32 item = blockIdx.x; item < items; item += gridDim.x) {
        const u32 unit = item >> (log_share + 1), part = item - (unit << (log_share + 1));
        const u32 rest = unit >> log_row_groups, row_group = unit - (rest << log_row_groups);
        if (row_group * 16 >= rows) continue;
        const u32 index = p.h_kv == 1 ? rest : rest / opaque(p.h_kv), kv_head = rest - index * p.h_kv;
        int req, pieces, first, next, step;     // slots: `first`, then `next`, `next` + `step`, ...
        if (fixed) {
            req = int(index), first = p.num_splits[index], next = first + 1, step = 1;
            pieces = p.num_splits[index + 1] - first;
        } else {
            req = __shfl_sync(0xffffffffu, listed.req, index + 1);
            u32 where = __shfl_sync(0xffffffffu, listed.slot | u32(listed.pieces) << 16, index + 1);
            if (index >= 31) {
                const Owner owner = p.owners[1 + index];
                req = owner.req;
                where = owner.slot | u32(owner.pieces) << 16;
            }
            pieces = int(where >> 16), first = int(where & 0xffff), next = (first | 1) + 1, step = 2;
        }
        if (pieces <= 1) continue;
        // This lane's place in a tile, and what it copies: its first 16 bytes, of two lanes the rest, of four what there is about
        // rows. From one of its pieces to the next they are `pace` tiles apart.
        const u32 fragment = part * together + (warp & (together - 1)), at = fragment * width + (lane & (width - 1));
        const u32 tile = (rank ? next + (rank - 1) * step : first) * tile_step + kv_head * p.m_tiles + row_group / 4;
        const u32 to_second = (rank ? share * step : next + (share - 1) * step - first) * tile_step, pace = share * step * tile_step;
        const u32 row_at = row_group % 4 * (CHUNKS * 32) + at;
        const char* from = reinterpret_cast<const char*>(p.partial_out) + u64(tile) * PARTIAL_BYTES + row_at * 16;
        const char* from_rows = reinterpret_cast<const char*>(p.partial_rows) + u64(tile) * (PARTIAL_ROWS * 4) +
                                (row_group % 4 * 8 + at % 32 / 4) * 16;
        u64 ahead = u64(to_second) * PARTIAL_BYTES, ahead_rows = u64(to_second) * (PARTIAL_ROWS * 4);
        if (!waited) pdl_wait();
        waited = true;
        PM_MERGE(2);

        Sums sums = {{0, 0, 0, 0, 0, 0, 0, 0}, {M_INIT, M_INIT}, {0, 0}};
#pragma unroll 1
        for (int begin = 0; base + begin < pieces; begin += share * AT_ONCE) {
            const int end = min(begin + share * AT_ONCE, pieces - base), half = begin + share * (AT_ONCE / 2);
            u32 to_first = place_first, to_rest = place_rest, to_rows = place_rows;
#pragma unroll 1
            for (int i = begin; i < end; i += share) {
                if (i == half) cp_async_commit();
                if (rank + i < pieces) {
                    cp_async16(to_first, from);
                    if (lane % 2 == 0) cp_async16(to_rest, from + PARTIAL_REST - row_at * 8);
                    if (lane % 4 == 0) cp_async16(to_rows, from_rows);
                }
                to_first += 512, to_rest += 256, to_rows += 128;
                from += ahead, from_rows += ahead_rows;
                ahead = u64(pace) * PARTIAL_BYTES, ahead_rows = u64(pace) * (PARTIAL_ROWS * 4);
            }
            cp_async_commit();
            const uint4* words = &smem.first[warp][0][lane];
            const uint2* more = &smem.rest[warp][0][lane];
            const float4* about = &smem.rows[warp][0][lane / 4];
#pragma unroll 1
            for (int from = begin; from < end; from = half) {
                // The second half is on its way while the first is added up.
                const int to = from < half ? min(end, half) : end;
                if (to == half && end > half)
                    cp_async_wait<1>();
                else
                    cp_async_wait<0>();
                __syncwarp();
                PM_MERGE(3);
                float top0 = sums.max[0], top1 = sums.max[1];
#pragma unroll 1
                for (int i = from, k = 0; rank + i < pieces && i < to; i += share, ++k) {
                    top0 = fmaxf(top0, about[8 * k].x);
                    top1 = fmaxf(top1, about[8 * k].z);
                }
                sums.raise(top0, top1);
#pragma unroll 1
                for (int i = from; i < to; i += share, words += 32, more += 32, about += 8) {
                    float v[8];
                    partial_unpack(v, *words, *more);
                    if (rank + i < pieces) sums.add(v, *about);
                }
                if (to == end) break;
            }
            __syncwarp();
        }
#pragma unroll 1
        for (u32 apart = width; apart < 32; apart *= 2) {
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = __shfl_xor_sync(0xffffffffu, sums.o[i], apart);
            const float4 mine = sums.rows();
            sums.merge(v, make_float4(__shfl_xor_sync(0xffffffffu, mine.x, apart), __shfl_xor_sync(0xffffffffu, mine.y, apart),
                                    __shfl_xor_sync(0xffffffffu, mine.z, apart), __shfl_xor_sync(0xffffffffu, mine.w, apart)));
        }
        // Half of the warps leave their sums to the other half, until one a fragment is left.
        const u32 place = warp >> log_together;
#pragma unroll 1
        for (u32 half = COMBINE_WARPS / 2 >> log_together; half > 0; half /= 2) {
            if (place >= half) {
                float4* to = reinterpret_cast<float4*>(smem.first[warp][0]) + lane;
                to[0] = make_float4(sums.o[0], sums.o[1], sums.o[2], sums.o[3]);
                to[32] = make_float4(sums.o[4], sums.o[5], sums.o[6], sums.o[7]);
                to[64] = sums.rows();
            }
            named_barrier(BAR_TREE, 64 * half << log_together);
            if (place >= half) break;
            const float4* from = reinterpret_cast<const float4*>(smem.first[warp + (half << log_together)][0]) + lane;
            const float4 x = from[0], y = from[32];
            const float v[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
            sums.merge(v, from[64]);
        }
        PM_MERGE(4);
        if (item + gridDim.x < items) __syncthreads();   // others have read what they were left
        if (place > 0 || lane >= width) continue;
        const u32 column = at / 32 * 16 + at % 4 * 2;
        // One row after the other by the same code: what runs for the first time is slow.
#pragma unroll 1
        for (u32 packed = row_group * 16 + at % 32 / 4, end = packed + 16; packed < end && packed < rows; packed += 8) {
            const float sum = sums.weights[0], inv = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
            if (column == 0)
                p.lse[row_offset(p, req, kv_head, packed, p.lse_stride_b, p.lse_stride_h, p.lse_stride_s)] =
                    sum == 0.0f ? __int_as_float(0x7f800000) : (log2_fast(sum) + sums.max[0]) * LN2;
            u16* dst = reinterpret_cast<u16*>(p.out) +
                       row_offset(p, req, kv_head, packed, p.out_stride_b, p.out_stride_h, p.out_stride_s) + i64(column) * p.out_stride_d;
            const u32 word[2] = {pack2<Elem>(sums.o[0] * inv, sums.o[1] * inv), pack2<Elem>(sums.o[4] * inv, sums.o[5] * inv)};
            if (p.flags & FLAG_OUT_VEC16) {
                *reinterpret_cast<u32*>(dst) = word[0];
                *reinterpret_cast<u32*>(dst + 8) = word[1];
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    dst[8 * i * p.out_stride_d] = u16(word[i]);
                    dst[(8 * i + 1) * p.out_stride_d] = u16(word[i] >> 16);
                }
            }
            sums.weights[0] = sums.weights[1], sums.max[0] = sums.max[1];
            sums.o[0] = sums.o[2], sums.o[1] = sums.o[3], sums.o[4] = sums.o[6], sums.o[5] = sums.o[7];
        }
    }
    // A kernel that ends before the one it depends on would let the next one in the stream start before that has ended, too.
    if (!waited) pdl_wait();
    PM_MERGE(5);
}

}  // namespace polymla

extern "C" __global__ void __launch_bounds__(512, 2)
    polymla_combine_bf16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::Bf16>(p); }
extern "C" __global__ void __launch_bounds__(512, 2)
    polymla_combine_f16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::F16>(p); }
