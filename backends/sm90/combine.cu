// Merging the pieces of split requests.
//
// Tile      a chunk: 16 packed rows and 16 columns of every piece, eight values a lane (tile.h).
// Roles     a CTA's 32 warps take 32 / G chunks of one row group; G warps share the pieces of a chunk. G grows as
//           there is less to merge, so that all loads of the call are in flight at once.
// Pipeline  launched as a programmatic dependent of the main kernel. Each warp has up to six pieces copied to shared memory
//           (cp.async), turns what there is about one row into weights meanwhile, and adds up. The order of summation is fixed.
//
// What runs once is bound by fetching instructions, some 33 cycles for eight of them: loops are rolled wherever their
// loads are in flight already.
//
// Grid: a CTA of 1024 threads an SM; they share the work evenly.
#include "tile.h"

namespace polymla {

constexpr int COMBINE_WARPS = 32;
constexpr int COMBINE_THREADS = COMBINE_WARPS * 32;
constexpr int AT_ONCE = 6;          // pieces that a warp has in flight
constexpr int ROUND = 160;          // pieces weighed at once; with 132 SMs no request has more
constexpr u32 FIXED_LOG_SHARE = 2;  // of G in batch-invariant mode, where the order must not depend on the batch

struct CombineSmem {
    uint4 high[COMBINE_WARPS][AT_ONCE][32];
    uint2 low[COMBINE_WARPS][AT_ONCE][32];
    float rows[ROUND][PARTIAL_GROUP + 4];       // by piece; weights take the place of the maxima. Padded: a warp reads a column.
};

static_assert(sizeof(CombineSmem) == 180736, "the host asks for as much");

struct Pieces {
    int req, count;
    int first, next, step;      // slots: `first`, then `next`, `next` + `step`, ...
    PM_DEV int slot(int piece) const { return piece == 0 ? first : next + (piece - 1) * step; }
};

// Adds a lane's eight values of a piece, weighted by row. The lowest byte of each is some other's: less than was dropped.
PM_DEV void add_piece(float (&acc)[8], const uint4& high, const uint2& low, float w0, float w1) {
    const u32 h[4] = {high.x, high.y, high.z, high.w}, l[2] = {low.x, low.y};
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u32 selector = (i % 2 ? 0x3200 : 0x1000) | (4 + i % 4) << 4 | (4 + i % 4);
        acc[i] += __uint_as_float(__byte_perm(h[i / 2], l[i / 4], selector)) * (i & 2 ? w1 : w0);
    }
}

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
    const int count = fixed ? p.b : __shfl_sync(0xffffffffu, listed.req, 0);
    // 32 bits do: an item is 128 elements of out or more.
    const u32 rows = p.s_q * p.heads_per_kv, row_groups = (rows + 15) / 16;
    const u32 units = u32(count) * p.h_kv * row_groups;
    static_assert(COMBINE_WARPS == 32 && CHUNKS == 32, "a unit takes `share` items");
    u32 log_share = 0;
    if (fixed)
        log_share = FIXED_LOG_SHARE;
    else
        while (log_share < 5 && (units << log_share) * 2 <= gridDim.x) ++log_share;
    const u32 share = 1u << log_share;                  // G
    const u32 together = COMBINE_WARPS >> log_share;    // chunks of a CTA
    const u32 first_piece = warp >> (5 - log_share);
    const i64 tile_step = i64(p.h_kv) * p.m_tiles;      // tiles of a slot
    PM_MERGE(1);
    bool waited = false;

#pragma unroll 1
    for (u32 item = blockIdx.x; item < units << log_share; item += gridDim.x) {
        const u32 unit = item >> log_share, first_item = unit << log_share;
        const u32 chunk = (item - first_item) * together + (warp & (together - 1));
        const u32 rest = unit / row_groups, row_group = unit - rest * row_groups;
        const u32 index = p.h_kv == 1 ? rest : rest / p.h_kv, kv_head = rest - index * p.h_kv;
        Pieces pieces;
        if (fixed) {
            const int first = p.num_splits[index];
            pieces = Pieces{int(index), p.num_splits[index + 1] - first, first, first + 1, 1};
        } else {
            int req = __shfl_sync(0xffffffffu, listed.req, index + 1);
            u32 where = __shfl_sync(0xffffffffu, listed.slot | u32(listed.pieces) << 16, index + 1);
            if (index >= 31) {
                const Owner owner = p.owners[1 + index];
                req = owner.req;
                where = owner.slot | u32(owner.pieces) << 16;
            }
            pieces = Pieces{req, int(where >> 16), int(where & 0xffff), int(where & 0xffff | 1) + 1, 2};
        }
        if (pieces.count <= 1) continue;
        // Of slot 0: this lane's values, and what there is about the rows.
        const u32 tile = kv_head * p.m_tiles + row_group / 4, at = (row_group % 4 * CHUNKS + chunk) * 32 + lane;
        const char* data = reinterpret_cast<const char*>(p.partial_out) + i64(tile) * PARTIAL_BYTES;
        const char *high = data + at * 16, *low = data + PARTIAL_LOW_BYTES + at * 8 + lane * 8;
        const float* row_data = p.partial_rows + i64(tile) * PARTIAL_ROWS + row_group % 4 * PARTIAL_GROUP;
        // Pieces base, base + share, ... below `end`, at most AT_ONCE, into this warp's place.
        auto copy_data = [&](int base, int end) {
            u32 to_high = smem_addr(&smem.high[warp][0][lane]), to_low = smem_addr(&smem.low[warp][0][2 * (lane % 16)]);
            end = min(end, base + int(share) * AT_ONCE);
#pragma unroll 1
            for (int piece = base; piece < end; piece += share, to_high += 512, to_low += 256) {
                const i64 slot = pieces.slot(piece) * (tile_step * PARTIAL_BYTES);
                cp_async16(to_high, high + slot);
                if (lane < 16) cp_async16(to_low, low + slot);      // for two lanes
            }
            cp_async_commit();
        };
        // Sixteen threads a piece, of which twelve copy; eight where there are no exact sums.
        const u32 part = threadIdx.x % 16;
        const bool copies = part < PARTIAL_GROUP / 4 && (Elem::TWO_SUMS || part >= PARTIAL_MAX / 4);
        auto copy_rows = [&](int round, int end) {
#pragma unroll 1
            for (int piece = round + int(threadIdx.x / 16); piece < end && copies; piece += COMBINE_THREADS / 16)
                cp_async16(smem_addr(&smem.rows[piece - round][part * 4]),
                           row_data + part * 4 + pieces.slot(piece) * (tile_step * PARTIAL_ROWS));
            cp_async_commit();
        };
        if (!waited) pdl_wait();
        waited = true;
        PM_MERGE(2);
        const bool one_round = pieces.count <= ROUND;

        // One row a warp, of the first sixteen, and a piece a lane. Maxima are integers, so that no weight is rounded, however
        // large the logits. fmaxf passes NaN over, the sums do not.
        const bool weighs = warp < 16;
        float m = -1e30f, sum = 0.0f, exact = 0.0f;
#pragma unroll 1
        for (int round = 0; round < pieces.count; round += ROUND) {
            const int n = min(ROUND, pieces.count - round);
            copy_rows(round, round + n);
            copy_data(first_piece, one_round ? n : 0);
            cp_async_wait<1>();
            __syncthreads();
            if (weighs) {
                float top = m;
#pragma unroll 1
                for (int i = lane; i < n; i += 32) top = fmaxf(top, smem.rows[i][PARTIAL_MAX + warp]);
#pragma unroll
                for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
                const float f = exp2_fast(m - top);
                sum *= f;
                exact *= f;
                m = top;
#pragma unroll 1
                for (int i = lane; i < n; i += 32) {
                    const float w = exp2_fast(smem.rows[i][PARTIAL_MAX + warp] - m);
                    sum += smem.rows[i][PARTIAL_SUM + warp] * w;
                    if (Elem::TWO_SUMS) exact += smem.rows[i][PARTIAL_EXACT + warp] * w;
                }
            }
            if (!one_round) __syncthreads();
        }
        if (weighs) {
#pragma unroll
            for (int d = 16; d > 0; d /= 2) {
                sum += __shfl_xor_sync(0xffffffffu, sum, d);
                if (Elem::TWO_SUMS) exact += __shfl_xor_sync(0xffffffffu, exact, d);
            }
            if (!Elem::TWO_SUMS) exact = sum;
            const u32 packed = row_group * 16 + warp;
            if (item == first_item && lane == 0 && packed < rows)
                p.lse[row_offset(p, pieces.req, kv_head, packed, p.lse_stride_b, p.lse_stride_h, p.lse_stride_s)] =
                    exact == 0.0f ? __int_as_float(0x7f800000) : (log2_fast(exact) + m) * 0.6931471805599453f;
        }
        const float inv = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);

        float acc[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] = 0.0f;
#pragma unroll 1
        for (int round = 0; round < pieces.count; round += ROUND) {
            const int end = min(round + ROUND, pieces.count);
            if (!one_round) {
                copy_rows(round, end);
                copy_data(round + first_piece, end);
                cp_async_wait<1>();
                __syncthreads();
            }
#pragma unroll 1
            for (int i = lane; i < end - round && weighs; i += 32)
                smem.rows[i][PARTIAL_MAX + warp] = exp2_fast(smem.rows[i][PARTIAL_MAX + warp] - m) * inv;
            __syncthreads();
#pragma unroll 1
            for (int begin = round + first_piece; begin < end; begin += share * AT_ONCE) {
                cp_async_wait<0>();
                __syncwarp();
                const int stop = min(end, begin + int(share) * AT_ONCE);
                const uint4* high = &smem.high[warp][0][lane];
                const uint2* low = &smem.low[warp][0][lane];
#pragma unroll 1
                for (int piece = begin; piece < stop; piece += share, high += 32, low += 32) {
                    const float* w = smem.rows[piece - round] + PARTIAL_MAX + lane / 4;
                    add_piece(acc, *high, *low, w[0], w[8]);
                }
                __syncwarp();
                copy_data(begin + share * AT_ONCE, end);
            }
            __syncthreads();    // others are through with the weights, and with the place for sums
        }
        float4* sums = reinterpret_cast<float4*>(smem.high[warp][0]) + lane;
#pragma unroll 1
        for (u32 half = share / 2; half > 0; half /= 2) {
            if (first_piece >= half && first_piece < 2 * half) {
                sums[0] = make_float4(acc[0], acc[1], acc[2], acc[3]);
                sums[32] = make_float4(acc[4], acc[5], acc[6], acc[7]);
            }
            __syncthreads();
            if (first_piece >= half) continue;
            const float4* others = reinterpret_cast<const float4*>(smem.high[warp + half * together][0]) + lane;
            const float4 x = others[0], y = others[32];
            acc[0] += x.x, acc[1] += x.y, acc[2] += x.z, acc[3] += x.w;
            acc[4] += y.x, acc[5] += y.y, acc[6] += y.z, acc[7] += y.w;
        }
        if (share > 1) __syncthreads();
        if (first_piece > 0) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const u32 packed = row_group * 16 + lane / 4 + 8 * k;
            if (packed >= rows) break;
            u16* dst = reinterpret_cast<u16*>(p.out) +
                       row_offset(p, pieces.req, kv_head, packed, p.out_stride_b, p.out_stride_h, p.out_stride_s) +
                       i64(chunk * (16) + lane % 4 * 2) * p.out_stride_d;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 word = pack2<Elem>(acc[4 * i + 2 * k], acc[4 * i + 2 * k + 1]);
                if (p.flags & FLAG_OUT_VEC16) {
                    *reinterpret_cast<u32*>(dst) = word;
                } else {
                    dst[0] = u16(word);
                    dst[p.out_stride_d] = u16(word >> 16);
                }
                dst += 8 * p.out_stride_d;
            }
        }
    }
    PM_MERGE(3);
}

}  // namespace polymla

extern "C" __global__ void __launch_bounds__(1024, 1)
    polymla_combine_bf16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::Bf16>(p); }
extern "C" __global__ void __launch_bounds__(1024, 1)
    polymla_combine_f16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::F16>(p); }
