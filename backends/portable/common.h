// What every portable kernel shares: elements, swizzled tiles, the walk over a part of the schedule.
//
// Included after a dialect header, which gives
//   PM_DEV, PM_GLOBAL(threads), PM_SHARED_DYNAMIC      declarations
//   PM_WARP                                            warp width: 32, 64 or 128
//   pm_thread, pm_block, pm_sync                       index and barrier of a block
//   pm_shfl_xor, pm_shfl                               within 32 neighbouring lanes, all of which must arrive
//   pm_exp2, pm_log2, pm_atomic_min                    arithmetic
//   pm_max                                             the larger number; of a number and NaN, either
//   pm_copy16, pm_copy_commit, pm_copy_wait            16 bytes from global to shared memory, asynchronous where it can be
//   pm_prefetch                                        brings an address that may be read into the cache, or nothing
//   pm_grid_wait, pm_grid_release                      ordering against the kernel before and after, or nothing
//   pm_f16_to_float, pm_float_to_f16, pm_pack_bf16     conversions
// and, for tiles on mma.sync, pm_bytes, pm_settled (a value worked out where it stands), and what decode_roles.h uses.
#pragma once

#include "params.h"

namespace polymla {

constexpr int BLOCK_TOKENS = 64;    // the schedule's unit

PM_DEV float pm_from_bits(u32 u) {
    FloatBits v;
    v.u = u;
    return v.f;
}
PM_DEV float pm_inf() { return pm_from_bits(0x7f800000u); }
PM_DEV float pm_nan() { return pm_from_bits(0x7fc00000u); }

PM_DEV int pm_min(int a, int b) { return a < b ? a : b; }

// ---- elements -------------------------------------------------------------------------------

struct Bf16 {
    static PM_DEV float to_float(u16 x) { return pm_from_bits(u32(x) << 16); }
    static PM_DEV u32 pack(float lo, float hi) { return pm_pack_bf16(lo, hi); }
    static PM_DEV u16 from_float(float x) { return u16(pack(x, 0.0f)); }
};

struct F16 {
    static PM_DEV float to_float(u16 x) { return pm_f16_to_float(x); }
    static PM_DEV u32 pack(float lo, float hi) {
        return u32(pm_float_to_f16(lo)) | (u32(pm_float_to_f16(hi)) << 16);
    }
    static PM_DEV u16 from_float(float x) { return pm_float_to_f16(x); }
};

struct alignas(8) Words2 {
    u32 w[2];
};
struct alignas(16) Words4 {
    u32 w[4];
};
struct alignas(16) Floats4 {
    float f[4];
};
struct alignas(8) Floats2 {
    float f[2];
};

// ---- swizzled tiles in shared memory ------------------------------------------------------------
// Rows of U units of 16 bytes (8 elements). Unit u of row r lies at u ^ phase(r), so that the same unit of 8 consecutive
// rows covers all banks, which is what ldmatrix and its like read.
template <int U>
struct Swizzled {
    static_assert(U == 2 || U == 4 || U % 8 == 0, "the phase must stay inside a row");
    char* base;

    static PM_DEV int phase(int row) {
        return U >= 8 ? (row & 7) : ((row * U / 8) & (U - 1));
    }
    PM_DEV char* unit(int row, int u) const { return base + (row * U + (u ^ phase(row))) * 16; }
    PM_DEV u16 element(int row, int col) const {
        return reinterpret_cast<const u16*>(unit(row, col / 8))[col % 8];
    }
};

// ---- segments -----------------------------------------------------------------------------------
// One split that a block works on: blocks [begin, end) of a request.
struct Segment {
    int req;
    int len;        // keys of the request; 0 where its length is invalid
    int begin, end; // blocks
    int slot;       // row of the partial buffers, or -1 where this is the whole request
    bool bad;       // the length is invalid, or the slot is beyond the buffers
};

PM_DEV void report(int* status, int req) {
    if (status) pm_atomic_min(status, req);
}

// The request that a part begins with, if requests are equally long. Only a guess: what is read by it costs no time where
// it is right, and nothing else where it is not.
PM_DEV int likely_request(const DecodeParams& p, int part) {
    return pm_min(int(float(part) * p.requests_a_part), p.b - 1);
}

// Walks a part as Schedule::splits_of does.
struct SegmentWalk {
    int req, next_begin, next_split;
    int end_req, end_block;     // of the part
    int guess, len, first, after;   // a request, its length and its splits

    // All that is read is read together: each trip to memory is as long as the work on a block.
    PM_DEV void begin(const DecodeParams& p, int index) {
        const PartMeta& part = p.parts[index];
        const int r = likely_request(p, index);
        const int begin_req = part.begin_req, begin_block = part.begin_block, begin_split = part.begin_split;
        const int last_req = part.end_req, last_block = part.end_block;
        const int r_len = p.cache_seqlens[r], r_first = p.num_splits[r], r_after = p.num_splits[r + 1];
        req = begin_req < 0 ? p.b : begin_req;
        next_begin = begin_block;
        next_split = begin_split;
        end_req = last_req;
        end_block = last_block;
        guess = r;
        len = r_len;
        first = r_first;
        after = r_after;
    }

    PM_DEV bool next(const DecodeParams& p, Segment& s) {
        if (req > pm_min(end_req, p.b - 1)) return false;
        if (req != guess) {
            guess = req;
            // All that is read comes first, so that the reads wait for memory together.
            const int r_len = p.cache_seqlens[req], r_first = p.num_splits[req], r_after = p.num_splits[req + 1];
            len = r_len;
            first = r_first;
            after = r_after;
        }
        s.bad = len < 0 || i64(len) > i64(p.max_pages_per_seq) * p.page_size;
        s.req = req;
        s.len = s.bad ? 0 : len;
        const int blocks = int((u32(s.len) + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
        // A plan made for longer sequences than these must not reach past the end of one.
        int end = req == end_req ? pm_min(end_block, blocks) : blocks;
        s.begin = next_begin;
        if (end < s.begin) end = s.begin;
        s.slot = after - first > 1 ? first + next_split : -1;
        if (s.slot >= p.slots || s.slot < -1) s.bad = true;
        if (p.fixed_split_blocks > 0 && end - s.begin > p.fixed_split_blocks) {
            next_begin = s.end = s.begin + p.fixed_split_blocks;
            ++next_split;
            return true;
        }
        s.end = end;
        ++req;
        next_begin = next_split = 0;
        return true;
    }
};

// ---- rows -----------------------------------------------------------------------------------------
// Row r of a KV head is query token r / heads_per_kv, head r % heads_per_kv of its group. A division is some 40 instructions,
// one after another, where everybody waits for the first tile.
PM_DEV int query_of(const DecodeParams& p, int r) { return p.s_q == 1 ? 0 : r / p.heads_per_kv; }
struct Row {
    int j, head;
    PM_DEV Row(const DecodeParams& p, int kv_head, int r) {
        j = query_of(p, r);
        head = kv_head * p.heads_per_kv + (r - j * p.heads_per_kv);
    }
};

// What a block of a decode kernel works on: the first of `tile` packed rows of a KV head, for a part. Divisions are kept out of the
// way of what is common.
struct BlockPlace {
    int row0, kv_head, part;
    PM_DEV BlockPlace(const DecodeParams& p, int tile) {
        const int tiles = (p.s_q * p.heads_per_kv + tile - 1) / tile, block = pm_block();
        const int rest = tiles == 1 ? block : tiles == 2 ? int(u32(block) / 2) : block / tiles;
        row0 = (block - rest * tiles) * tile;
        part = p.h_kv == 1 ? rest : rest / p.h_kv;
        kv_head = rest - part * p.h_kv;
    }
};

// Keys that query token j of a request of `len` keys sees; -1 where its entry of visible_lens is invalid.
PM_DEV int visible_end(const DecodeParams& p, int req, int j, int len) {
    if (p.visible_lens) {
        const int v = p.visible_lens[i64(req) * p.visible_lens_stride_b + j];
        return v < 0 || v > len ? -1 : v;
    }
    if (!p.causal) return len;
    const i64 v = i64(len) - p.s_q + j + 1;
    return v < 0 ? 0 : int(v);
}

// Writes the last word on a row's lse: base-2 logarithm in, natural out; no key is +infinity.
PM_DEV void store_lse(const DecodeParams& p, int req, Row row, float log2_sum) {
    const float ln2 = 0.693147180559945309f;
    const float value = log2_sum == -pm_inf() ? pm_inf() : log2_sum * ln2;
    p.lse[i64(req) * p.lse_stride_b + i64(row.head) * p.lse_stride_h + i64(row.j) * p.lse_stride_s] = value;
}

PM_DEV i64 out_offset(const DecodeParams& p, int req, Row row) {
    return i64(req) * p.out_stride_b + i64(row.j) * p.out_stride_s + i64(row.head) * p.out_stride_h;
}

// The maximum that a row's weights are relative to, base 2. The old one stays until it is exceeded by much: weights of up to
// 2^8 are as exact as those of up to 1, and O is rarely multiplied by anything.
PM_DEV float running_maximum(float before, float top) { return top > before + 8.0f ? top : before; }

// Brings the table of the request that a part probably begins with into the cache, before it is known what of it is needed;
// every thread does a line. Of a very long table the first lines are.
PM_DEV void prefetch_table(const DecodeParams& p, int part, int thread) {
    const int entry = thread * 32;
    if (entry < p.max_pages_per_seq)
        pm_prefetch(p.block_table + i64(likely_request(p, part)) * p.block_table_stride_b + entry);
}

// Index of row r of a KV head within one slot of the partial buffers.
PM_DEV i64 partial_row(const DecodeParams& p, int slot, int kv_head, int r) {
    const i64 rows = i64(p.s_q) * p.heads_per_kv;
    return (i64(slot) * p.h_kv + kv_head) * rows + r;
}

// Address of the page that holds token `tok`, and the token's place in it.
PM_DEV int page_index(const DecodeParams& p, int tok) {
    return p.page_shift >= 0 ? tok >> p.page_shift : tok / p.page_size;
}

}  // namespace polymla
