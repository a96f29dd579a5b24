// 16 x 16 x 16 tiles on mma.sync m16n8k16 with operands through ldmatrix (warp 32; sm_80 and later).
//
// The dialect gives pm_ldmatrix_x4, pm_ldmatrix_x4_trans and pm_mma_16816<Elem>. With g = lane / 4, t = lane % 4:
//   A  a0 (g, 2t..) a1 (g + 8, 2t..) a2 (g, 2t + 8..) a3 (g + 8, 2t + 8..)
//   B  b0 (k 2t.., n g) b1 (k 2t + 8.., n g)
//   C  c0 c1 (g, 2t..) c2 c3 (g + 8, 2t..)
#pragma once

#include "common.h"

namespace polymla {

template <class Elem>
struct MmaTile {
    // 16 rows x 16 columns: two n8 accumulators.
    struct C {
        float v[8];
    };
    static constexpr int SIZE = 8;
    static constexpr int RUN = 2;           // elements that lie in neighbouring columns
    static constexpr bool UNROLL = true;     // k steps of Q K^T are unrolled

    static PM_DEV int lane() { return pm_thread() % 32; }
    static PM_DEV int row(int i) { return lane() / 4 + (i & 2) * 4; }
    static PM_DEV int col(int i) { return (i & 4) * 2 + (lane() % 4) * 2 + (i & 1); }

    // One step's operands of Q K^T.
    template <int MT, int NT>
    struct Operands {
        u32 a[MT][4], b[NT][4];
    };
    template <int MT, int NT, int UQ, int UK>
    static PM_DEV void load(Operands<MT, NT>& o, Swizzled<UQ> q, int row0, int kq, Swizzled<UK> key, int token0, int kk) {
        const int l = lane();
#pragma unroll
        for (int m = 0; m < MT; ++m)
            pm_ldmatrix_x4(o.a[m],
                           q.base + (row0 + 16 * m + l % 16) * (UQ * 16) + (((2 * kq + l / 16) ^ (l & 7)) << 4));
#pragma unroll
        for (int n = 0; n < NT; ++n)
            pm_ldmatrix_x4(o.b[n], key.base + (token0 + 16 * n + (l & 7) + (l / 16) * 8) * (UK * 16) +
                                       (((2 * kk + ((l / 8) & 1)) ^ (l & 7)) << 4));
    }
    // The same for step k of rows that begin at q, swizzled and of U units, and at key, ROW bytes apart. `a` is where this lane
    // reads in q, whose swizzle is an XOR of its low bits with a constant, where k is one; key is where it reads there. ROW is an
    // odd number of 16 bytes: 8 rows cover all banks as they are.
    template <int U>
    static PM_DEV int a_lane() { return lane() % 16 * (U * 16) + ((lane() / 16) ^ (lane() & 7)) * 16; }
    template <int ROW>
    static PM_DEV int b_lane() { return ((lane() & 7) + lane() / 16 * 8) * ROW + ((lane() / 8) & 1) * 16; }
    template <int MT, int NT, int U, int ROW>
    static PM_DEV void load_step(Operands<MT, NT>& o, const char* q, int a, const char* key, int k) {
        static_assert(ROW / 16 % 2 == 1 && ROW % 16 == 0, "banks");
        const int flip = k % 4 * 32, piece = k / 4 * 128;
#pragma unroll
        for (int m = 0; m < MT; ++m) pm_ldmatrix_x4(o.a[m], q + (a ^ flip) + (m * 16 * U * 16 + piece));
#pragma unroll
        for (int n = 0; n < NT; ++n) pm_ldmatrix_x4(o.b[n], key + (n * 16 * ROW + k * 32));
    }
    template <int MT, int NT>
    static PM_DEV void multiply(C (&acc)[MT][NT], const Operands<MT, NT>& o) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                pm_mma_16816<Elem>(acc[m][n].v, o.a[m], o.b[n]);
                pm_mma_16816<Elem>(acc[m][n].v + 4, o.a[m], o.b[n] + 2);
            }
    }

    // acc[m][n] += Q[row0 + 16 m, 16 kq ..] . K[token0 + 16 n, 16 kk ..]; row0 and token0 are multiples of 16.
    template <int MT, int NT, int UQ, int UK>
    static PM_DEV void qk(C (&acc)[MT][NT], Swizzled<UQ> q, int row0, int kq, Swizzled<UK> key, int token0, int kk) {
        Operands<MT, NT> o;
        load(o, q, row0, kq, key, token0, kk);
        multiply(acc, o);
    }

    // acc[m][i] += P[16 m, 16 step ..] . V[16 step .., col0 + 16 i ..]: 64 columns of V.
    template <int MT, int UP, int UV>
    static PM_DEV void pv(C (&acc)[MT][4], Swizzled<UP> p, Swizzled<UV> v, int step, int col0) {
        const int l = lane();
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) pm_ldmatrix_x4(a[m], p.unit(16 * m + l % 16, 2 * step + l / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 b[4];
            pm_ldmatrix_x4_trans(b, v.base + (16 * step + l % 16) * (UV * 16) +
                                        (((col0 / 8 + 2 * i + l / 16) ^ (l & 7)) << 4));
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                pm_mma_16816<Elem>(acc[m][i].v, a[m], b);
                pm_mma_16816<Elem>(acc[m][i].v + 4, a[m], b + 2);
            }
        }
    }

    // One step of pv. `p` and `v` are where this lane reads, in bytes from `base`: the step's place in both, and p_lane, whose
    // swizzle is an XOR here too, or v_lane.
    static PM_DEV int p_lane(int lane, int row_bytes) { return lane % 16 * row_bytes + ((lane / 16) ^ (lane & 7)) * 16; }
    static PM_DEV int v_lane(int lane, int row_bytes) { return lane % 16 * row_bytes + lane / 16 * 16; }
    template <int MT, int UP>
    static PM_DEV void pv_step(C (&acc)[MT][4], const char* base, int p, int v) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) pm_ldmatrix_x4(a[m], base + p + m * 16 * UP * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 b[4];
            pm_ldmatrix_x4_trans(b, base + v + i * 32);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                pm_mma_16816<Elem>(acc[m][i].v, a[m], b);
                pm_mma_16816<Elem>(acc[m][i].v + 4, a[m], b + 2);
            }
        }
    }

    // Run r of the 16 x 64 piece that pv accumulates: RUN values of one row, from column `col` of the 64 on.
    static constexpr int RUNS = 4 * SIZE / RUN;
    static constexpr int ROW_SETS = 2;       // run r lies in row r % ROW_SETS of the lane's rows
    static PM_DEV int run_row(int r) { return row(2 * r % 8); }
    static PM_DEV int run_col(int r) { return (r / 4) * 16 + col(2 * r % 8); }
    static PM_DEV float run_value(const C (&c)[4], int r, int e) { return c[r / 4].v[2 * r % 8 + e]; }
    // The row of element i of every C that pv accumulates.
    static PM_DEV int pv_row(int i) { return row(i); }
};

}  // namespace polymla
