// Q and KV from global memory into swizzled tiles. 8 threads a row, so that a row's 128-byte pieces are read whole.
//
// Nothing is read through a table entry out of range, nothing past the end of a sequence: such rows become zeros. Rows
// that are not 16-byte aligned are read element by element.
#pragma once

#include "config.h"

namespace polymla {

// 8 elements from a row that may have any alignment.
PM_DEV void copy_unit(char* dst, const u16* src, bool valid, bool aligned) {
    if (aligned) {
        pm_copy16(dst, src, valid);
        return;
    }
    Words4 w = {{0, 0, 0, 0}};
    if (valid) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w.w[i] = u32(src[2 * i]) | (u32(src[2 * i + 1]) << 16);
    }
    *reinterpret_cast<Words4*>(dst) = w;
}

// One row of U units from its two parts, by 8 threads; this one is `lane8`. Units are counted from column `col0`.
template <int U, int DV>
PM_DEV void copy_row(Swizzled<U> tile, int row, int lane8, int col0, const u16* nope, const u16* pe, bool valid,
                     bool aligned) {
    char* dst = tile.base + row * (U * 16) + ((lane8 ^ (row & 7)) << 4);
    if (aligned) {
#pragma unroll
        for (int j = 0; j < U / 8; ++j) {
            const int col = col0 + j * 64;
            pm_copy16(dst + j * 128, (col < DV ? nope + col : pe + (col - DV)) + lane8 * 8, valid);
        }
        return;
    }
#pragma unroll 1
    for (int j = 0; j < U / 8; ++j) {
        const int col = col0 + j * 64;
        copy_unit(dst + j * 128, (col < DV ? nope + col : pe + (col - DV)) + lane8 * 8, valid, false);
    }
}

// Columns [col0, col0 + Q_COLS) of the query rows [row0, row0 + M) of a request.
template <class C>
PM_DEV void load_q(const DecodeParams& p, int req, int kv_head, int row0, int col0, char* smem, bool aligned) {
    const Swizzled<C::Q_COLS / 8> tile = {smem + C::q};
    const int rows = p.s_q * p.heads_per_kv;
    for (int r = pm_thread() / 8; r < C::M; r += DECODE_THREADS / 8) {
        const bool valid = row0 + r < rows;
        const Row at(p, kv_head, valid ? row0 + r : 0);
        const u16* nope = static_cast<const u16*>(p.q_nope) + i64(req) * p.q_nope_stride_b +
                          i64(at.j) * p.q_nope_stride_s + i64(at.head) * p.q_nope_stride_h;
        const u16* pe = static_cast<const u16*>(p.q_pe) + i64(req) * p.q_pe_stride_b + i64(at.j) * p.q_pe_stride_s +
                        i64(at.head) * p.q_pe_stride_h;
        copy_row<C::Q_COLS / 8, C::DV>(tile, r, pm_thread() % 8, col0, nope, pe, valid, aligned);
    }
}

// Copies tiles of N tokens, in order; table entries are looked up one tile ahead.
template <class C>
struct KvLoader {
    int first, last;                        // tokens of the segment
    int entry[C::HALVES][C::PASSES];        // of the tile that is copied next

    static PM_DEV int row_of(int half, int pass) {
        return half * C::HALF + pass * C::TOKENS_A_PASS + pm_thread() / 8;
    }
    // Whether this thread has a row in a pass: with fewer tokens than a pass covers, some have none.
    static PM_DEV bool has_row(int pass) {
        return (pass + 1) * C::TOKENS_A_PASS <= C::HALF || pass * C::TOKENS_A_PASS + pm_thread() / 8 < C::HALF;
    }

    // Past the longest sequence of all this wraps, which the unsigned comparisons with `last` take for the end.
    PM_DEV int token(int tile, int row) const { return int(u32(first) + u32(tile) * C::N + u32(row)); }

    PM_DEV void look_up(const DecodeParams& p, const Segment& s, int tile) {
        const int* table = p.block_table + i64(s.req) * p.block_table_stride_b;
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
            for (int pass = 0; pass < C::PASSES; ++pass) {
                const int tok = token(tile, row_of(half, pass));
                entry[half][pass] = has_row(pass) && u32(tok) < u32(last) ? table[page_index(p, tok)] : 0;
            }
    }

    PM_DEV void copy(const DecodeParams& p, const Segment& s, int kv_head, int tile, int half, char* stage, int* bad,
                     bool aligned) {
        const Swizzled<C::U> to = {stage};
#pragma unroll
        for (int pass = 0; pass < C::PASSES; ++pass) {
            if (!has_row(pass)) continue;
            const int row = row_of(half, pass), tok = token(tile, row);
            // `half` may be no constant, and an array indexed by such lies in memory.
            const int page = half ? entry[C::HALVES - 1][pass] : entry[0][pass];
            bool valid = u32(tok) < u32(last);
            if (valid && u32(page) >= u32(p.num_pages)) {
                *bad = 1;
                report(p.status, s.req);
                valid = false;
            }
            const int place = valid ? tok - page_index(p, tok) * p.page_size : 0;
            const i64 at = valid ? page : 0, head = valid ? kv_head : 0;
            const u16* ckv = static_cast<const u16*>(p.ckv) + at * p.ckv_stride_page + place * p.ckv_stride_token +
                             head * p.ckv_stride_head;
            const u16* kpe = static_cast<const u16*>(p.kpe) + at * p.kpe_stride_page + place * p.kpe_stride_token +
                             head * p.kpe_stride_head;
            copy_row<C::U, C::DV>(to, row, pm_thread() % 8, 0, ckv, kpe, valid, aligned);
        }
    }
};

}  // namespace polymla
