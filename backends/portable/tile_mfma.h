// 16 x 16 x 16 tiles on MFMA (wave 64; gfx90a and later), and on any unit with its register layout.
//
// The dialect gives pm_mfma_16x16x16<Elem>(c, a, b). With n = lane % 16, g = lane / 16, i = 0..3:
//   A (m n, k 4g + i)   B (k 4g + i, n n)   C (m 4g + i, n n)
//
// V is stored token by token, so the four k of a B operand lie in four rows. A lane reads 4 neighbouring columns of
// each of its 4 tokens and transposes them in registers: tile t of a 64-column group holds columns 4n + t, and a row's
// four tiles hold four neighbouring columns, which makes the stores at the end vectors.
#pragma once

#include "common.h"

namespace polymla {

template <class Elem>
struct MfmaTile {
    struct C {
        float v[4];
    };
    static constexpr int SIZE = 4;
    static constexpr int RUN = 4;
    static constexpr bool UNROLL = true;     // k steps of Q K^T are unrolled

    static PM_DEV int lane() { return pm_thread() % 64; }
    static PM_DEV int row(int i) { return (lane() / 16) * 4 + i; }
    static PM_DEV int col(int) { return lane() % 16; }

    // 4 elements of the lane's row and k group.
    template <int U>
    static PM_DEV Words2 operand(Swizzled<U> tile, int row0, int k) {
        const int l = lane();
        const char* unit = tile.unit(row0 + l % 16, 2 * k + l / 32);
        return *reinterpret_cast<const Words2*>(unit + ((l / 16) & 1) * 8);
    }

    template <int MT, int NT, int UQ, int UK>
    static PM_DEV void qk(C (&acc)[MT][NT], Swizzled<UQ> q, int row0, int kq, Swizzled<UK> key, int token0, int kk) {
        Words2 a[MT];
#pragma unroll
        for (int m = 0; m < MT; ++m) a[m] = operand(q, row0 + 16 * m, kq);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const Words2 b = operand(key, token0 + 16 * n, kk);
#pragma unroll
            for (int m = 0; m < MT; ++m) pm_mfma_16x16x16<Elem>(acc[m][n].v, a[m], b);
        }
    }

    template <int MT, int UP, int UV>
    static PM_DEV void pv(C (&acc)[MT][4], Swizzled<UP> p, Swizzled<UV> v, int step, int col0) {
        const int l = lane();
        Words2 a[MT], rows[4];
#pragma unroll
        for (int m = 0; m < MT; ++m) a[m] = operand(p, 16 * m, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const char* unit = v.unit(16 * step + (l / 16) * 4 + i, col0 / 8 + (l % 16) / 2);
            rows[i] = *reinterpret_cast<const Words2*>(unit + (l & 1) * 8);
        }
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            Words2 b;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 lo = rows[2 * h].w[t / 2] >> (16 * (t & 1)), hi = rows[2 * h + 1].w[t / 2] >> (16 * (t & 1));
                b.w[h] = (lo & 0xffffu) | (hi << 16);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) pm_mfma_16x16x16<Elem>(acc[m][t].v, a[m], b);
        }
    }

    static constexpr int RUNS = SIZE;
    static constexpr int ROW_SETS = SIZE;       // run r lies in row r % ROW_SETS of the lane's rows
    static PM_DEV int run_row(int r) { return row(r); }
    static PM_DEV int run_col(int) { return (lane() % 16) * 4; }
    static PM_DEV float run_value(const C (&c)[4], int r, int e) { return c[e].v[r]; }
    static PM_DEV int pv_row(int i) { return row(i); }
};

}  // namespace polymla
