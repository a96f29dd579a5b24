// Merging the pieces of split requests.
//
// Tile      n8 blocks (16 rows x 8 columns of O, in fragment order): 512 contiguous bytes a
//           piece and block, 16 bytes a lane, eight loads in flight.
// Roles     when there is much to merge every warp takes four n8 blocks, two pieces at a
//           time; when there is little (small batches) the eight warps of a CTA share one
//           block's pieces and merge in shared memory. The order of summation is fixed.
// Pipeline  launched as a programmatic dependent of the main kernel: the list of split
//           requests is made while that runs, the partial results are read after it.
//
// Grid: any number of CTAs of 256 threads; they share the work evenly.
#include "tile.h"

namespace polymla {

constexpr int COMBINE_THREADS = 256;
constexpr int MAX_PARTS = 1024;

struct Merge {
    float m0, m1, w0, w1;   // running maximum and weight of rows g and g + 8
    float4 o;
    PM_DEV void init() {
        m0 = m1 = -1e30f;
        w0 = w1 = 0.0f;
        o = make_float4(0, 0, 0, 0);
    }
    PM_DEV void add(float lse0, float lse1, float weight0, float weight1, float4 v) {
        const float n0 = fmaxf(m0, lse0), n1 = fmaxf(m1, lse1);
        const float a0 = exp2_fast(m0 - n0), a1 = exp2_fast(m1 - n1);
        const float b0 = exp2_fast(lse0 - n0), b1 = exp2_fast(lse1 - n1);
        o.x = o.x * a0 + v.x * b0;
        o.y = o.y * a0 + v.y * b0;
        o.z = o.z * a1 + v.z * b1;
        o.w = o.w * a1 + v.w * b1;
        w0 = w0 * a0 + weight0 * b0;
        w1 = w1 * a1 + weight1 * b1;
        m0 = n0;
        m1 = n1;
    }
};

template <class Elem>
PM_DEV void store_merged(const DecodeParams& p, const Merge& s, int req, int kv_head, int first_row, int half, int block,
                         int lane) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int row = first_row + lane / 4 + 8 * k;
        if (row >= p.s_q * p.heads_per_kv) return;
        const int j = row / p.heads_per_kv, h = kv_head * p.heads_per_kv + row - j * p.heads_per_kv;
        const float w = k ? s.w1 : s.w0, m = k ? s.m1 : s.m0;
        const float inv = w == 0.0f ? 0.0f : 1.0f / w;
        u16* dst = reinterpret_cast<u16*>(p.out) + i64(req) * p.out_stride_b + i64(j) * p.out_stride_s +
                   i64(h) * p.out_stride_h + (half * 256 + block * 8 + lane % 4 * 2) * p.out_stride_d;
        const u32 word = pack2<Elem>((k ? s.o.z : s.o.x) * inv, (k ? s.o.w : s.o.y) * inv);
        if (p.flags & FLAG_OUT_VEC16) {
            *reinterpret_cast<u32*>(dst) = word;
        } else {
            dst[0] = u16(word);
            dst[p.out_stride_d] = u16(word >> 16);
        }
        if (half == 0 && block == 0 && lane % 4 == 0)
            p.lse[i64(req) * p.lse_stride_b + i64(h) * p.lse_stride_h + i64(j) * p.lse_stride_s] =
                w == 0.0f ? __int_as_float(0x7f800000) : logf(w) + m * 0.6931471805599453f;
    }
}

// Pieces first, first + step, ... of N adjacent n8 blocks, U pieces at a time.
template <int N, int U, class SlotOf>
PM_DEV void merge_pieces(const DecodeParams& p, Merge (&s)[N], SlotOf slot_of, int first, int step, int n, int kv_head,
                         int m_tile, int row_group, int half, int block, int lane) {
#pragma unroll 1
    for (int base = first; base < n; base += step * U) {
        float l0[U], l1[U];
        float4 v[U][N];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const int piece = base + u * step;
            l0[u] = l1[u] = -__int_as_float(0x7f800000);
#pragma unroll
            for (int i = 0; i < N; ++i) v[u][i] = make_float4(0, 0, 0, 0);
            if (piece < n) {
                const i64 tile = partial_tile(p, slot_of(piece), kv_head, m_tile);
                const float* lse = p.partial_lse + tile * TILE_M + row_group * 16 + lane / 4;
                l0[u] = __ldcg(lse);
                l1[u] = __ldcg(lse + 8);
                const float4* src = reinterpret_cast<const float4*>(p.partial_out) +
                                    ((tile * 4 + row_group) * 2 + half) * 1024 + block * 32 + lane;
#pragma unroll
                for (int i = 0; i < N; ++i) v[u][i] = __ldcg(src + i * 32);
            }
        }
        float n0 = s[0].m0, n1 = s[0].m1;
#pragma unroll
        for (int u = 0; u < U; ++u) {
            n0 = fmaxf(n0, l0[u]);
            n1 = fmaxf(n1, l1[u]);
        }
        const float a0 = exp2_fast(s[0].m0 - n0), a1 = exp2_fast(s[0].m1 - n1);
        float w0 = s[0].w0 * a0, w1 = s[0].w1 * a1;
#pragma unroll
        for (int i = 0; i < N; ++i) s[i].o = make_float4(s[i].o.x * a0, s[i].o.y * a0, s[i].o.z * a1, s[i].o.w * a1);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const float b0 = exp2_fast(l0[u] - n0), b1 = exp2_fast(l1[u] - n1);
            w0 += b0;
            w1 += b1;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                s[i].o.x += v[u][i].x * b0;
                s[i].o.y += v[u][i].y * b0;
                s[i].o.z += v[u][i].z * b1;
                s[i].o.w += v[u][i].w * b1;
            }
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            s[i].m0 = n0;
            s[i].m1 = n1;
            s[i].w0 = w0;
            s[i].w1 = w1;
        }
    }
}

template <class Elem>
PM_DEV void combine(const DecodeParams& p) {
    __shared__ int4 owners[MAX_PARTS];      // split requests: request, pieces, slot of the first, of the second
    __shared__ int warp_count[COMBINE_THREADS / 32];
    __shared__ float4 shared_o[8][32];
    __shared__ float4 shared_mw[8][32];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const bool fixed = p.fixed_split_blocks > 0;

    int count = 0;
    if (fixed) {
        count = p.b;
    } else {
        for (int base = 0; base < p.num_parts; base += COMBINE_THREADS) {
            const int part = base + tid;
            bool owner = false;
            int4 info = {0, 0, 0, 0};
            if (part < p.num_parts) {
                const PartMeta m = p.parts[part];
                owner = m.begin_req < p.b && m.end_req >= m.begin_req && m.last_req_split &&
                        (m.begin_req < m.end_req || m.begin_block == 0);
                if (owner)
                    info = make_int4(m.end_req, p.num_splits[m.end_req + 1] - p.num_splits[m.end_req],
                                     2 * part + (m.begin_req == m.end_req ? 0 : 1), 2 * (part + 1));
            }
            const u32 ballot = __ballot_sync(0xffffffffu, owner);
            if (lane == 0) warp_count[warp] = __popc(ballot);
            __syncthreads();
            int at = count + __popc(ballot & ((1u << lane) - 1));
            for (int w = 0; w < COMBINE_THREADS / 32; ++w) {
                if (w < warp) at += warp_count[w];
                count += warp_count[w];
            }
            if (owner && at < MAX_PARTS) owners[at] = info;
            __syncthreads();
        }
        count = min(count, MAX_PARTS);
    }
    pdl_wait();
    if (count == 0) return;

    const int rows = p.s_q * p.heads_per_kv;
    const int row_groups = (rows + 15) / 16;                        // over all M tiles
    const i64 units = i64(count) * p.h_kv * row_groups * 2;         // x 32 n8 blocks each
    const bool share = !fixed && units * 4 < gridDim.x;
    const int per_unit = share ? 32 : 1;

    for (i64 item = blockIdx.x; item < units * per_unit; item += gridDim.x) {
        const i64 unit = item / per_unit;
        const int block = share ? int(item - unit * per_unit) : warp * 4;
        const int half = int(unit & 1);
        const int row_group = int((unit >> 1) % row_groups);
        const int rest = int((unit >> 1) / row_groups);
        const int kv_head = rest % p.h_kv, owner = rest / p.h_kv;
        int req, n, first_slot, next_slot, slot_step;
        if (fixed) {
            req = owner;
            first_slot = p.num_splits[req];
            n = p.num_splits[req + 1] - first_slot;
            next_slot = first_slot + 1;
            slot_step = 1;
        } else {
            const int4 info = owners[owner];
            req = info.x;
            n = info.y;
            first_slot = info.z;
            next_slot = info.w;
            slot_step = 2;
        }
        if (n <= 1) continue;
        auto slot_of = [&](int piece) { return piece == 0 ? first_slot : next_slot + (piece - 1) * slot_step; };
        if (share) {
            Merge s[1];
            s[0].init();
            merge_pieces<1, 8>(p, s, slot_of, warp, 8, n, kv_head, row_group / 4, row_group % 4, half, block, lane);
            shared_o[warp][lane] = s[0].o;
            shared_mw[warp][lane] = make_float4(s[0].m0, s[0].m1, s[0].w0, s[0].w1);
            __syncthreads();
            if (warp == 0) {
#pragma unroll 1
                for (int w = 1; w < 8; ++w) {
                    const float4 mw = shared_mw[w][lane];
                    s[0].add(mw.x, mw.y, mw.z, mw.w, shared_o[w][lane]);
                }
                store_merged<Elem>(p, s[0], req, kv_head, row_group * 16, half, block, lane);
            }
            __syncthreads();
        } else {
            Merge s[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) s[i].init();
            merge_pieces<4, 2>(p, s, slot_of, 0, 1, n, kv_head, row_group / 4, row_group % 4, half, block, lane);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                store_merged<Elem>(p, s[i], req, kv_head, row_group * 16, half, block + i, lane);
        }
    }
}

}  // namespace polymla

extern "C" __global__ void __launch_bounds__(256, 2)
    polymla_combine_bf16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::Bf16>(p); }
extern "C" __global__ void __launch_bounds__(256, 2)
    polymla_combine_f16(const __grid_constant__ polymla::DecodeParams p) { polymla::combine<polymla::F16>(p); }
