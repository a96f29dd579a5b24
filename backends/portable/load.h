// Q and KV from global memory into swizzled tiles. 8 threads a row, so that a row's 128-byte pieces are read whole.
//
// Nothing is read through a table entry out of range, nothing past the end of a sequence: such rows become zeros. Rows
// that are not 16-byte aligned are read element by element.
#pragma once

#include "config.h"

namespace polymla {

// A row whose two parts may lie apart.
template <int DV>
struct RowParts {
    const u16 *nope, *pe;
    PM_DEV const u16* at(int col) const { return col < DV ? nope + col : pe + (col - DV); }
};
template <class C>
PM_DEV RowParts<C::DV> q_row(const DecodeParams& p, int req, Row at) {
    const RowParts<C::DV> row = {static_cast<const u16*>(p.q_nope) + i64(req) * p.q_nope_stride_b +
                                     i64(at.j) * p.q_nope_stride_s + i64(at.head) * p.q_nope_stride_h,
                                 static_cast<const u16*>(p.q_pe) + i64(req) * p.q_pe_stride_b +
                                     i64(at.j) * p.q_pe_stride_s + i64(at.head) * p.q_pe_stride_h};
    return row;
}
template <class C>
PM_DEV RowParts<C::DV> kv_row(const DecodeParams& p, i64 page, int place, i64 head) {
    const RowParts<C::DV> row = {static_cast<const u16*>(p.ckv) + page * p.ckv_stride_page + place * p.ckv_stride_token +
                                     head * p.ckv_stride_head,
                                 static_cast<const u16*>(p.kpe) + page * p.kpe_stride_page + place * p.kpe_stride_token +
                                     head * p.kpe_stride_head};
    return row;
}

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
PM_DEV void copy_row(Swizzled<U> tile, int row, int lane8, int col0, RowParts<DV> from, bool valid, bool aligned) {
    char* dst = tile.base + row * (U * 16) + ((lane8 ^ (row & 7)) << 4);
    if (aligned) {
#pragma unroll
        for (int j = 0; j < U / 8; ++j) {
            const int col = col0 + j * 64;
            pm_copy16(dst + j * 128, from.at(col) + lane8 * 8, valid);
        }
        return;
    }
#pragma unroll 1
    for (int j = 0; j < U / 8; ++j) {
        const int col = col0 + j * 64;
        copy_unit(dst + j * 128, from.at(col) + lane8 * 8, valid, false);
    }
}

// Columns [col0, col0 + Q_COLS) of the query rows [row0, row0 + M) of a request, by THREADS threads.
template <class C, int THREADS>
PM_DEV void load_q(const DecodeParams& p, int req, int kv_head, int row0, int col0, char* smem, bool aligned) {
    const Swizzled<C::Q_COLS / 8> tile = {smem + C::q};
    const int rows = p.s_q * p.heads_per_kv;
    for (int r = pm_thread() % THREADS / 8; r < C::M; r += THREADS / 8) {
        const bool valid = row0 + r < rows;
        const Row at(p, kv_head, valid ? row0 + r : 0);
        copy_row<C::Q_COLS / 8, C::DV>(tile, r, pm_thread() % 8, col0, q_row<C>(p, req, at), valid, aligned);
    }
}

// Copies tiles of N tokens, in order, by THREADS threads, 8 a token; table entries are looked up one tile ahead. THREADS
// divides the number of the first of them.
template <class C, int THREADS>
struct KvLoader {
    static constexpr int TOKENS_A_PASS = THREADS / 8;
    static constexpr int PASSES = (C::HALF + TOKENS_A_PASS - 1) / TOKENS_A_PASS;
    int first, last;                        // tokens of the segment
    int entry[C::HALVES][PASSES];           // of the tile that is copied next

    static PM_DEV int row_of(int half, int pass) {
        return half * C::HALF + pass * TOKENS_A_PASS + pm_thread() % THREADS / 8;
    }
    // Whether this thread has a row in a pass: with fewer tokens than a pass covers, some have none.
    static PM_DEV bool has_row(int pass) {
        return (pass + 1) * TOKENS_A_PASS <= C::HALF || pass * TOKENS_A_PASS + pm_thread() % THREADS / 8 < C::HALF;
    }

    // Past the longest sequence of all this wraps, which the unsigned comparisons with `last` take for the end.
    PM_DEV int token(int tile, int row) const { return int(u32(first) + u32(tile) * C::N + u32(row)); }

    PM_DEV void look_up(const DecodeParams& p, const Segment& s, int tile) {
        const int* table = p.block_table + i64(s.req) * p.block_table_stride_b;
#pragma unroll
        for (int half = 0; half < C::HALVES; ++half)
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const int tok = token(tile, row_of(half, pass));
                entry[half][pass] = has_row(pass) && u32(tok) < u32(last) ? table[page_index(p, tok)] : 0;
            }
    }

    // Where the rows of a half are.
    struct Found {
        RowParts<C::DV> row[PASSES];
        bool valid[PASSES];
    };
    PM_DEV void find(const DecodeParams& p, const Segment& s, int kv_head, int tile, int half, int* bad, Found& found) const {
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const int tok = token(tile, row_of(half, pass));
            // `half` may be no constant, and an array indexed by such lies in memory.
            const int page = half ? entry[C::HALVES - 1][pass] : entry[0][pass];
            bool valid = has_row(pass) && u32(tok) < u32(last);
            if (valid && u32(page) >= u32(p.num_pages)) {
                *bad = 1;
                report(p.status, s.req);
                valid = false;
            }
            const int place = valid ? tok - page_index(p, tok) * p.page_size : 0;
            found.row[pass] = kv_row<C>(p, valid ? page : 0, place, valid ? kv_head : 0);
            found.valid[pass] = valid;
        }
    }
    static PM_DEV void copy(const Found& found, int half, char* stage, bool aligned) {
        const Swizzled<C::U> to = {stage};
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass)
            if (has_row(pass))
                copy_row<C::U, C::DV>(to, row_of(half, pass), pm_thread() % 8, 0, found.row[pass], found.valid[pass], aligned);
    }
};

}  // namespace polymla
