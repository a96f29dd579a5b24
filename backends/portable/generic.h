// The kernel for every other pair of head dimensions: slow, small, and bound by no tile.
//
// Tile      one query row x 32 tokens, up to GENERIC_COLUMNS columns of O in registers (4 a thread).
// Roles     8 groups of 32 lanes share the tokens' scores; each thread owns columns of O.
// Grid      rows * column_chunks * h_kv * num_parts blocks of 256 threads; each chunk of columns makes the scores anew.
#pragma once

#include "common.h"

namespace polymla {

constexpr int GENERIC_THREADS = 256;
constexpr int GENERIC_TOKENS = 32;
constexpr int GENERIC_COLUMNS = 4 * GENERIC_THREADS;

struct GenericSmem {
    i64 ckv[GENERIC_TOKENS], kpe[GENERIC_TOKENS];   // element offsets of the tokens of a tile
    float score[GENERIC_TOKENS];
    float weight[GENERIC_TOKENS];
    float factor, final_factor, final_log2;
    int bad;
};

template <class Elem>
PM_DEV void generic_segment(const DecodeParams& p, const Segment& s, int kv_head, int r, int chunk, GenericSmem& sm) {
    const int t = pm_thread(), lane = t % 32, group = t / 32;
    const Row row(p, kv_head, r);
    const int rope = p.head_dim_k - p.head_dim_v;
    const u16* q_nope = static_cast<const u16*>(p.q_nope) + i64(s.req) * p.q_nope_stride_b +
                        i64(row.j) * p.q_nope_stride_s + i64(row.head) * p.q_nope_stride_h;
    const u16* q_pe = static_cast<const u16*>(p.q_pe) + i64(s.req) * p.q_pe_stride_b + i64(row.j) * p.q_pe_stride_s +
                      i64(row.head) * p.q_pe_stride_h;
    const u16* ckv = static_cast<const u16*>(p.ckv);
    const u16* kpe = static_cast<const u16*>(p.kpe);
    const int* table = p.block_table + i64(s.req) * p.block_table_stride_b;
    const int limit = visible_end(p, s.req, row.j, s.len);
    const int first = s.begin * BLOCK_TOKENS;
    const int last = s.bad ? first : int(i64(s.end) * BLOCK_TOKENS < s.len ? s.end * BLOCK_TOKENS : s.len);
    float m = -pm_inf(), l = 0.0f;      // of the first group's lanes
    float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};

    pm_sync();
    if (t == 0) {
        sm.bad = s.bad || limit == -1;
        if (sm.bad) report(p.status, s.req);
    }
    for (u32 at = u32(first); at < u32(last); at += GENERIC_TOKENS) {
        const int base = int(at), n = pm_min(GENERIC_TOKENS, last - base);
        pm_sync();
        if (t < n) {
            const int tok = base + t, index = page_index(p, tok), page = table[index];
            const i64 place = tok - index * p.page_size;
            const bool valid = u32(page) < u32(p.num_pages);
            if (!valid) {
                sm.bad = 1;
                report(p.status, s.req);
            }
            sm.ckv[t] = valid ? page * p.ckv_stride_page + place * p.ckv_stride_token + kv_head * p.ckv_stride_head : -1;
            sm.kpe[t] = valid ? page * p.kpe_stride_page + place * p.kpe_stride_token + kv_head * p.kpe_stride_head : 0;
        }
        pm_sync();
        for (int i = group; i < GENERIC_TOKENS; i += GENERIC_THREADS / 32) {
            float dot = 0.0f;
            if (i < n && sm.ckv[i] >= 0) {
                for (int c = lane; c < p.head_dim_v; c += 32)
                    dot += Elem::to_float(q_nope[c]) * Elem::to_float(ckv[sm.ckv[i] + c]);
                for (int c = lane; c < rope; c += 32)
                    dot += Elem::to_float(q_pe[c]) * Elem::to_float(kpe[sm.kpe[i] + c]);
            }
            for (int lanes = 1; lanes < 32; lanes *= 2) dot += pm_shfl_xor(dot, lanes);
            if (lane == 0) sm.score[i] = i < n && base + i < limit ? dot * p.scale_log2 : -pm_inf();
        }
        pm_sync();
        if (group == 0) {
            const float x = sm.score[lane];
            float top = x;
            for (int lanes = 1; lanes < 32; lanes *= 2) top = pm_max(top, pm_shfl_xor(top, lanes));
            const float next = pm_max(m, top), from = next == -pm_inf() ? 0.0f : next;
            const float factor = m == next ? 1.0f : pm_exp2(m - from), w = pm_exp2(x - from);
            float sum = w;
            for (int lanes = 1; lanes < 32; lanes *= 2) sum += pm_shfl_xor(sum, lanes);
            l = l * factor + sum;
            m = next;
            sm.weight[lane] = w;
            if (lane == 0) sm.factor = factor;
        }
        pm_sync();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = chunk * GENERIC_COLUMNS + i * GENERIC_THREADS + t;
            if (c >= p.head_dim_v) continue;
            float sum = acc[i] * sm.factor;
            for (int k = 0; k < n; ++k)
                if (sm.ckv[k] >= 0) sum += sm.weight[k] * Elem::to_float(ckv[sm.ckv[k] + c]);
            acc[i] = sum;
        }
    }
    pm_sync();
    if (t == 0) {
        const bool empty = l == 0.0f;
        sm.final_factor = sm.bad ? pm_nan() : empty ? 0.0f : 1.0f / l;
        sm.final_log2 = sm.bad ? pm_nan() : empty ? -pm_inf() : m + pm_log2(l);
    }
    pm_sync();
    if (t == 0 && chunk == 0) {
        if (s.slot < 0)
            store_lse(p, s.req, row, sm.final_log2);
        else
            p.partial_lse[partial_row(p, s.slot, kv_head, r)] = sm.final_log2;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int c = chunk * GENERIC_COLUMNS + i * GENERIC_THREADS + t;
        if (c >= p.head_dim_v) continue;
        const float v = acc[i] * sm.final_factor;
        if (s.slot < 0)
            static_cast<u16*>(p.out)[out_offset(p, s.req, row) + i64(c) * p.out_stride_d] = Elem::from_float(v);
        else
            p.partial_out[partial_row(p, s.slot, kv_head, r) * p.head_dim_v + c] = v;
    }
}

template <class Elem>
PM_DEV void generic(const DecodeParams& p, char* smem) {
    GenericSmem& sm = *reinterpret_cast<GenericSmem*>(smem);
    const int rows = p.s_q * p.heads_per_kv;
    const int chunks = (p.head_dim_v + GENERIC_COLUMNS - 1) / GENERIC_COLUMNS;
    const int r = pm_block() % rows, chunk = pm_block() / rows % chunks, rest = pm_block() / rows / chunks;
    SegmentWalk walk;
    walk.begin(p, rest / p.h_kv);
    Segment s;
    while (walk.next(p, s)) {
        if (s.slot >= p.slots) s.slot = -1;
        generic_segment<Elem>(p, s, rest % p.h_kv, r, chunk, sm);
    }
}

}  // namespace polymla
