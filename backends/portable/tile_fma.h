// 16 x 16 x 16 tiles by plain fused multiply-adds, for every warp width: what runs where no matrix unit is known.
//
// A lane holds two neighbouring columns, 2 (lane % 8), of the rows lane / 8 + i * PM_WARP / 8.
#pragma once

#include "common.h"

namespace polymla {

template <class Elem>
struct FmaTile {
    static constexpr int SIZE = 256 / PM_WARP;
    static constexpr int RUN = 2;
    static constexpr bool UNROLL = false;     // k steps of Q K^T stay a loop: unrolled, they fill the registers
    static constexpr int ROWS = SIZE / 2;
    struct C {
        float v[SIZE];
    };

    static PM_DEV int lane() { return pm_thread() % PM_WARP; }
    static PM_DEV int row(int i) { return lane() / 8 + (i / 2) * (PM_WARP / 8); }
    static PM_DEV int col(int i) { return (lane() % 8) * 2 + (i & 1); }

    static PM_DEV void widen(float (&f)[8], const char* unit) {
        const Words4 w = *reinterpret_cast<const Words4*>(unit);
#pragma unroll
        for (int i = 0; i < 8; ++i) f[i] = Elem::to_float(u16(w.w[i / 2] >> (16 * (i & 1))));
    }

    template <int MT, int NT, int UQ, int UK>
    static PM_DEV void qk(C (&acc)[MT][NT], Swizzled<UQ> q, int row0, int kq, Swizzled<UK> key, int token0, int kk) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            float a[MT][ROWS][8];
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int i = 0; i < ROWS; ++i) widen(a[m][i], q.unit(row0 + 16 * m + row(2 * i), 2 * kq + half));
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float b[8];
                    widen(b, key.unit(token0 + 16 * n + col(c), 2 * kk + half));
#pragma unroll
                    for (int m = 0; m < MT; ++m)
#pragma unroll
                        for (int i = 0; i < ROWS; ++i)
#pragma unroll
                            for (int e = 0; e < 8; ++e) acc[m][n].v[2 * i + c] += a[m][i][e] * b[e];
                }
        }
    }

    template <int MT, int UP, int UV>
    static PM_DEV void pv(C (&acc)[MT][4], Swizzled<UP> p, Swizzled<UV> v, int step, int col0) {
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            float a[MT][ROWS][8];
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int i = 0; i < ROWS; ++i) widen(a[m][i], p.unit(16 * m + row(2 * i), 2 * step + half));
#pragma unroll
            for (int e = 0; e < 8; ++e)
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const int c = col0 + 16 * t + col(0);
                    const char* unit = v.unit(16 * step + 8 * half + e, c / 8);
                    const u32 pair = *reinterpret_cast<const u32*>(unit + (c % 8) * 2);
                    const float lo = Elem::to_float(u16(pair)), hi = Elem::to_float(u16(pair >> 16));
#pragma unroll
                    for (int m = 0; m < MT; ++m)
#pragma unroll
                        for (int i = 0; i < ROWS; ++i) {
                            acc[m][t].v[2 * i] += a[m][i][e] * lo;
                            acc[m][t].v[2 * i + 1] += a[m][i][e] * hi;
                        }
                }
        }
    }

    static constexpr int RUNS = 4 * ROWS;
    static constexpr int ROW_SETS = ROWS;       // run r lies in row r % ROW_SETS of the lane's rows
    static PM_DEV int run_row(int r) { return row(2 * (r % ROWS)); }
    static PM_DEV int run_col(int r) { return (r / ROWS) * 16 + col(0); }
    static PM_DEV float run_value(const C (&c)[4], int r, int e) { return c[r / ROWS].v[2 * (r % ROWS) + e]; }
    static PM_DEV int pv_row(int i) { return row(i); }
};

}  // namespace polymla
