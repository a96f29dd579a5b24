// Merges the partial results of split requests, in split order, so that the bits never depend on timing.
//
// Unit      one query row x 128 columns, by `combine_ways` groups of 32 lanes: way w adds up splits w, w + ways, ...;
//           way 0 adds the ways up. 4 columns a lane.
// Pipeline  8 splits' loads are under way together, the first of them while the weights are still being worked out.
// Grid      b * ceil(s_q * h_q * column chunks / combine_units) blocks of 256 threads. Few units a block and many ways where
//           there are few rows (small batches with many splits), the other way round where there are many. A
//           batch-invariant run fixes the ways.
#pragma once

#include "common.h"

namespace polymla {

constexpr int COMBINE_THREADS = 256;
constexpr int COMBINE_GROUPS = COMBINE_THREADS / 32;
constexpr int COMBINE_COLUMNS = 128;
constexpr int COMBINE_SMEM = COMBINE_GROUPS * COMBINE_COLUMNS * 4;

PM_DEV void load_columns(float (&v)[4], const float* row, int col, int head_dim_v) {
    if (head_dim_v % 4 == 0) {
        if (col < head_dim_v) {
            const Floats4 x = *reinterpret_cast<const Floats4*>(row + col);
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = x.f[e];
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (col + e < head_dim_v) v[e] = row[col + e];
}

// The splits of one unit that a group of lanes adds up.
struct CombineSplits {
    const float *lse, *out;
    i64 lse_stride, out_stride;
    int n, way, ways, col, head_dim_v;

    // Eight splits from `i0` on; nothing is kept of those that are not there.
    PM_DEV void load(float (&v)[8][4], int i0) const {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int i = i0 + k * ways;
#pragma unroll
            for (int e = 0; e < 4; ++e) v[k][e] = 0.0f;
            if (i < n) load_columns(v[k], out + i * out_stride, col, head_dim_v);
        }
    }

    // The sum over this way's splits, weighted; `top` is the maximum of all splits' lse, `sum` that of their weights.
    PM_DEV void add(float (&acc)[4], float& top, float& sum) const {
        const int lane = pm_thread() % 32;
        float v[8][4];
        load(v, way);
        const float mine = lane < n ? lse[lane * lse_stride] : -pm_inf();
        top = mine == mine ? mine : -pm_inf();      // NaN, of an invalid row, comes back by the weights
        for (int i = lane + 32; i < n; i += 32) top = pm_max(lse[i * lse_stride], top);
        for (int lanes = 1; lanes < 32; lanes *= 2) top = pm_max(pm_shfl_xor(top, lanes), top);
        const float from = top == -pm_inf() ? 0.0f : top;
        sum = pm_exp2(mine - from);
        for (int i = lane + 32; i < n; i += 32) sum += pm_exp2(lse[i * lse_stride] - from);
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += pm_shfl_xor(sum, lanes);
        for (int i0 = way; i0 < n; i0 += 8 * ways) {
            if (i0 > way) load(v, i0);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int i = i0 + k * ways;
                const float w = i < n ? pm_exp2(lse[i * lse_stride] - from) : 0.0f;
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[e] += w * v[k][e];
            }
        }
        top = from;
    }
};

template <class Elem>
PM_DEV void combine(const DecodeParams& p, char* smem) {
    const int all_rows = p.s_q * p.h_q, rows_per_kv = p.s_q * p.heads_per_kv;
    const int chunks = (p.head_dim_v + COMBINE_COLUMNS - 1) / COMBINE_COLUMNS;
    const i64 all_units = i64(all_rows) * chunks;
    const int blocks = int((all_units + p.combine_units - 1) / p.combine_units);
    const int req = pm_block() / blocks;
    const i64 unit0 = i64(pm_block() % blocks) * p.combine_units;
    // The plan is older than the kernel before this one, which waited for it.
    const int first = p.num_splits[req], n = p.num_splits[req + 1] - first;
    pm_grid_wait();
    if (n <= 1) return;
    const bool lost = i64(first) + n > p.slots;     // some splits had nowhere to go
    const int lane = pm_thread() % 32, group = pm_thread() / 32;
    const int ways = p.combine_ways, way = group % ways;
    const int units = int(all_units - unit0 < p.combine_units ? all_units - unit0 : p.combine_units);
    const i64 out_stride = i64(all_rows) * p.head_dim_v;
    float* shared = reinterpret_cast<float*>(smem);

    // Every group makes the same number of turns: there are barriers inside.
    for (int base = 0; base < units; base += COMBINE_GROUPS / ways) {
        const bool mine = base + group / ways < units;
        const i64 unit = unit0 + (mine ? base + group / ways : 0);
        const int r = int(unit / chunks), chunk = int(unit - i64(r) * chunks);
        const int col = chunk * COMBINE_COLUMNS + lane * 4;
        const CombineSplits splits = {p.partial_lse + i64(first) * all_rows + r,
                                      p.partial_out + i64(first) * out_stride + i64(r) * p.head_dim_v,
                                      all_rows, out_stride, n, way, ways, col, p.head_dim_v};
        float top = -pm_inf(), sum = 0.0f;
        float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (mine && !lost) splits.add(acc, top, sum);
        if (ways > 1) {
            Floats4 mine4 = {{acc[0], acc[1], acc[2], acc[3]}};
            reinterpret_cast<Floats4*>(shared)[group * 32 + lane] = mine4;
            pm_sync();
            if (way == 0)
                for (int k = 1; k < ways; ++k) {
                    const Floats4 x = reinterpret_cast<const Floats4*>(shared)[(group + k) * 32 + lane];
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[e] += x.f[e];
                }
            pm_sync();
        }
        if (!mine || way != 0) continue;
        const float factor = lost ? pm_nan() : sum == 0.0f ? 0.0f : 1.0f / sum;
        const Row row(p, r / rows_per_kv, r % rows_per_kv);
        if (lane == 0 && chunk == 0)
            store_lse(p, req, row, lost ? pm_nan() : sum == 0.0f ? -pm_inf() : top + pm_log2(sum));
        u16* to = static_cast<u16*>(p.out) + out_offset(p, req, row);
        if ((p.flags & FLAG_OUT_VEC) && col + 4 <= p.head_dim_v) {
            const Words2 packed = {{Elem::pack(acc[0] * factor, acc[1] * factor),
                                    Elem::pack(acc[2] * factor, acc[3] * factor)}};
            *reinterpret_cast<Words2*>(to + col) = packed;
            continue;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (col + e < p.head_dim_v) to[i64(col + e) * p.out_stride_d] = Elem::from_float(acc[e] * factor);
    }
}

}  // namespace polymla
