// Merging the pieces of split requests.
//
// Tile      a chunk: 16 packed rows and 512 contiguous bytes of every piece, 16 bytes a lane (tile.h).
// Roles     a CTA's 16 warps take 16 / G chunks of one row group; G warps share the pieces of a chunk. G grows as
//           there is less to merge, so that all loads of the call are in flight at once.
// Pipeline  launched as a programmatic dependent of the main kernel. Each warp has up to eight pieces copied to shared memory
//           (cp.async), turns what there is about one row into weights meanwhile, and adds up. The order of summation is fixed.
//
// What runs once is bound by fetching instructions, some ten cycles each at best: loops are rolled wherever their
// loads are in flight already.
//
// Grid: two CTAs of 512 threads an SM; they share the work evenly.
#include "tile.h"

namespace polymla {

constexpr int COMBINE_WARPS = 16;
constexpr int COMBINE_THREADS = COMBINE_WARPS * 32;
constexpr int AT_ONCE = 8;          // pieces that a warp has in flight
constexpr int ROUND = 160;          // pieces weighed at once; with 132 SMs no request has more
constexpr u32 FIXED_SHARE = 4;      // G in batch-invariant mode, where the order must not depend on the batch

struct CombineSmem {
    uint4 pieces[COMBINE_WARPS][AT_ONCE][32];
    // By piece and row: the exact sum, maximum, sum, and the half's exponent, which becomes the weight. Padded: a warp reads a column.
    float rows[ROUND][4 * 16 + 4];
};

static_assert(sizeof(CombineSmem) == 109056, "the host asks for as much");

struct Pieces {
    int req, count;
    int first, next, step;      // slots: `first`, then `next`, `next` + `step`, ...
    PM_DEV int slot(int piece) const { return piece == 0 ? first : next + (piece - 1) * step; }
};

// Adds one lane's 16 bytes of a piece, weighted by row.
template <class Elem>
PM_DEV void add_piece(float (&acc)[Partial<Elem>::VALUES], const uint4& v, float w0, float w1) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (Partial<Elem>::HALF) {      // words: block, row g | row g + 8 | next block, row g | row g + 8
            float lo, hi;
            unpack2_f16(words[i], lo, hi);
            const float w = i & 1 ? w1 : w0;
            acc[2 * i % Partial<Elem>::VALUES] += lo * w;
            acc[(2 * i + 1) % Partial<Elem>::VALUES] += hi * w;
        } else {
            acc[i] += __uint_as_float(words[i]) * (i & 2 ? w1 : w0);
        }
    }
}

// Where row `row` of the packed ones lies in a tensor of these strides.
PM_DEV i64 row_offset(const DecodeParams& p, int req, int kv_head, int row, i64 stride_b, i64 stride_h, i64 stride_s) {
    const int s = p.heads_magic ? int(__umulhi(u32(row), p.heads_magic)) : row;
    return i64(req) * stride_b + i64(kv_head * p.heads_per_kv + row - s * p.heads_per_kv) * stride_h + i64(s) * stride_s;
}

template <class Elem>
PM_DEV void combine(const DecodeParams& p) {
    typedef Partial<Elem> Format;
    extern __shared__ __align__(1024) char smem_raw[];
    CombineSmem& smem = *reinterpret_cast<CombineSmem*>(smem_raw);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool fixed = p.fixed_split_blocks > 0;

    PM_MERGE(0);
    const int count = fixed ? p.b : p.owners[0].req;
    // 32 bits do: an item is 128 elements of out or more.
    const u32 rows = p.s_q * p.heads_per_kv, row_groups = (rows + 15) / 16;
    const u32 units = u32(count) * p.h_kv * row_groups;
    u32 share = 1;      // G
    if (fixed)
        share = FIXED_SHARE;
    else
        while (share < COMBINE_WARPS && units * Format::CHUNKS * share * 2 <= gridDim.x * COMBINE_WARPS) share *= 2;
    const u32 together = COMBINE_WARPS / share;        // chunks of a CTA
    const u32 per_unit = Format::CHUNKS / together;
    const u32 first_piece = warp / together;
    const int tile_step = p.h_kv * p.m_tiles;
    PM_MERGE(1);
    bool waited = false;

#pragma unroll 1
    for (u32 item = blockIdx.x; item < units * per_unit; item += gridDim.x) {
        const u32 unit = item / per_unit, chunk = (item - unit * per_unit) * together + warp % together;
        const u32 rest = unit / row_groups, row_group = unit - rest * row_groups;
        const u32 index = rest / p.h_kv, kv_head = rest - index * p.h_kv;
        Pieces pieces;
        if (fixed) {
            const int first = p.num_splits[index];
            pieces = Pieces{int(index), p.num_splits[index + 1] - first, first, first + 1, 1};
        } else {
            const Owner owner = p.owners[1 + index];
            pieces = Pieces{owner.req, owner.pieces, owner.slot, (owner.slot | 1) + 1, 2};
        }
        if (pieces.count <= 1) continue;
        // Of slot 0: this lane's 16 bytes, and what there is about the rows.
        const u32 tile = kv_head * p.m_tiles + row_group / 4;
        const uint4* data = reinterpret_cast<const uint4*>(p.partial_out) + i64(tile) * Format::UNITS +
                            (row_group % 4 * Format::CHUNKS + chunk) * 32 + lane;
        const float* row_data = p.partial_rows + i64(tile) * PARTIAL_ROWS + row_group % 4 * PARTIAL_GROUP;
        // Pieces base, base + share, ... below `end`, at most AT_ONCE, into this warp's place. A lane reads what it copied itself.
        uint4* place = smem.pieces[warp][0] + lane;
        auto copy_data = [&](int base, int end) {
            u32 to = smem_addr(place);
            end = min(end, base + int(share) * AT_ONCE);
#pragma unroll 1
            for (int piece = base; piece < end; piece += share, to += 512)
                cp_async16(to, data + i64(pieces.slot(piece)) * tile_step * Format::UNITS);
            cp_async_commit();
        };
        // Sixteen copies a piece: exact sums, maxima, sums, and the exponents of the half that the CTA's chunks all lie in.
        const u32 field = threadIdx.x / 4 % 4, unit_of_field = threadIdx.x % 4;
        const float* source = row_data + field * 16 + unit_of_field * 4 + (field == 3 && chunk >= Format::CHUNKS / 2 ? 16 : 0);
        auto copy_rows = [&](int round, int end) {
#pragma unroll 1
            for (int piece = round + int(threadIdx.x / 16); piece < end; piece += COMBINE_THREADS / 16)
                cp_async16(smem_addr(&smem.rows[piece - round][field * 16 + unit_of_field * 4]),
                           source + i64(pieces.slot(piece)) * tile_step * PARTIAL_ROWS);
            cp_async_commit();
        };
        if (!waited) pdl_wait();
        waited = true;
        PM_MERGE(2);
        const bool one_round = pieces.count <= ROUND;

        // One row a warp, a piece a lane. The exponents are integers, so that no weight is rounded, however large the logits.
        // fmaxf passes NaN over, the sums do not.
        float m = -1e30f, sum = 0.0f, exact = 0.0f;
#pragma unroll 1
        for (int round = 0; round < pieces.count; round += ROUND) {
            const int n = min(ROUND, pieces.count - round);
            copy_rows(round, round + n);
            copy_data(first_piece, one_round ? n : 0);
            cp_async_wait<1>();
            __syncthreads();
            float top = m;
#pragma unroll 1
            for (int i = lane; i < n; i += 32) top = fmaxf(top, smem.rows[i][16 + warp]);
#pragma unroll
            for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
            const float f = exp2_fast(m - top);
            sum *= f;
            exact *= f;
            m = top;
#pragma unroll 1
            for (int i = lane; i < n; i += 32) {
                const float w = exp2_fast(smem.rows[i][16 + warp] - m);
                sum += smem.rows[i][32 + warp] * w;
                if (Elem::TWO_SUMS) exact += smem.rows[i][warp] * w;
            }
            if (!one_round) __syncthreads();
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, d);
            if (Elem::TWO_SUMS) exact += __shfl_xor_sync(0xffffffffu, exact, d);
        }
        if (!Elem::TWO_SUMS) exact = sum;
        if (item == unit * per_unit && lane == 0 && row_group * 16 + warp < rows)
            p.lse[row_offset(p, pieces.req, kv_head, row_group * 16 + warp, p.lse_stride_b, p.lse_stride_h, p.lse_stride_s)] =
                exact == 0.0f ? __int_as_float(0x7f800000) : (log2_fast(exact) + m) * 0.6931471805599453f;
        const float inv = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);

        float acc[Format::VALUES];
#pragma unroll
        for (int i = 0; i < Format::VALUES; ++i) acc[i] = 0.0f;
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
            for (int i = lane; i < end - round; i += 32)
                smem.rows[i][48 + warp] = exp2_fast(smem.rows[i][48 + warp] - m) * inv;
            __syncthreads();
#pragma unroll 1
            for (int begin = round + first_piece; begin < end; begin += share * AT_ONCE) {
                const uint4* v = place;
                const int stop = min(end, begin + int(share) * AT_ONCE);
                cp_async_wait<0>();
#pragma unroll 1
                for (int piece = begin; piece < stop; piece += share, v += 32) {
                    const float* w = smem.rows[piece - round] + 48 + lane / 4;
                    add_piece<Elem>(acc, *v, w[0], w[8]);
                }
                copy_data(begin + share * AT_ONCE, end);
            }
            __syncthreads();    // others are through with the weights, and with the place for sums
        }
        if (share > 1) {
            float4* sums = reinterpret_cast<float4*>(smem.pieces);
#pragma unroll
            for (int i = 0; i < Format::VALUES / 4; ++i)
                sums[(warp * (Format::VALUES / 4) + i) * 32 + lane] =
                    make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
            __syncthreads();
#pragma unroll 1
            for (u32 w = warp + together; first_piece == 0 && w < COMBINE_WARPS; w += together) {
#pragma unroll
                for (int i = 0; i < Format::VALUES / 4; ++i) {
                    const float4 o = sums[(w * (Format::VALUES / 4) + i) * 32 + lane];
                    acc[4 * i] += o.x;
                    acc[4 * i + 1] += o.y;
                    acc[4 * i + 2] += o.z;
                    acc[4 * i + 3] += o.w;
                }
            }
            __syncthreads();
        }
        if (first_piece > 0) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const u32 row = row_group * 16 + lane / 4 + 8 * k;
            if (row >= rows) break;
            u16* dst = reinterpret_cast<u16*>(p.out) +
                       row_offset(p, pieces.req, kv_head, row, p.out_stride_b, p.out_stride_h, p.out_stride_s) +
                       i64(chunk * (Format::VALUES * 2) + lane % 4 * 2) * p.out_stride_d;
#pragma unroll
            for (int i = 0; i < Format::VALUES / 4; ++i) {
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

extern "C" __global__ void __launch_bounds__(512, 2)
    polymla_combine_bf16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::Bf16>(p); }
extern "C" __global__ void __launch_bounds__(512, 2)
    polymla_combine_f16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::F16>(p); }
