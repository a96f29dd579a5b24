// ldmatrix and mma.sync m16n8k16, lane by lane, by the register layouts that the PTX manual publishes, and asynchronous
// copies. Nothing here knows how the kernel's tiles use them.
#pragma once

namespace polymla {

PM_DEV void pm_copy16(char* dst, const void* src, bool valid) { simt::copy16(dst, src, valid); }
PM_DEV void pm_copy_commit() { simt::copy_commit(); }
template <int N>
PM_DEV void pm_copy_wait() {
    simt::copy_wait(N);
}

// Barriers in shared memory that warps and copies arrive on.
#define PM_ROLES 1
#define PM_PIECES 1
PM_DEV u32 pm_bytes(u32 x, u32 y, u32 selector) {
    const unsigned long long both = (unsigned long long)(y) << 32 | x;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) r |= u32(both >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
    return r;
}
template <int N>
PM_DEV void pm_take_registers() {}
template <int N>
PM_DEV void pm_leave_registers() {}
PM_DEV int pm_thread_again() { return simt::thread(); }
PM_DEV i64 pm_settled(i64 x) { return x; }
template <class T>
struct ShflLane {
    T x, y;
    int from;
};
template <class T>
PM_DEV void shfl(void** records) {
    for (int l = 0; l < 32; ++l) {
        ShflLane<T>& lane = *static_cast<ShflLane<T>*>(records[l]);
        lane.y = static_cast<ShflLane<T>*>(records[lane.from])->x;
    }
}
template <class T>
PM_DEV T pm_shfl(T x, int lane) {
    ShflLane<T> mine = {x, x, lane};
    simt::collective(32, shfl<T>, &mine, __FILE__, __LINE__);
    return mine.y;
}
PM_DEV float pm_fma(float a, float b, float c) { return std::fma(a, b, c); }
PM_DEV void pm_mbar_init(char* at, int arrivals) { simt::phase_init(at, arrivals); }
PM_DEV void pm_mbar_arrive(char* at) { simt::phase_arrive(at, false, __FILE__, __LINE__); }
PM_DEV void pm_copy_arrive(char* at) { simt::phase_arrive(at, true, __FILE__, __LINE__); }
PM_DEV void pm_mbar_init_done() {}
PM_DEV void pm_fence_bulk() {}
PM_DEV void pm_mbar_arrive_expect(char* at, int bytes) { simt::phase_arrive_expect(at, bytes, __FILE__, __LINE__); }
PM_DEV void pm_bulk_copy(char* dst, const void* src, int bytes, char* at) {
    simt::bulk_copy(dst, src, bytes, at, __FILE__, __LINE__);
}
PM_DEV void pm_bulk_prefetch(const void* src, int bytes) {
    for (int i = 0; i < bytes; i += 16) pm_prefetch(static_cast<const char*>(src) + i);
}
PM_DEV void pm_mbar_wait(char* at, u32 parity) { simt::phase_wait(at, parity, __FILE__, __LINE__); }

// Lane 8 i + r gives the address of row r of matrix i, 8 elements. Lane l receives of each matrix elements 2 (l % 4) and
// the next of row l / 4, or of the transposed matrix's row l / 4.
struct LdmatrixLane {
    const char* row;
    u32* r;
    bool trans;
};
PM_DEV void ldmatrix(void** records) {
    u16 rows[32][8];
    for (int i = 0; i < 32; ++i) {
        const char* at = static_cast<LdmatrixLane*>(records[i])->row;
        if (reinterpret_cast<uintptr_t>(at) % 16 != 0) {
            std::fprintf(stderr, "simt: ldmatrix row address is not a multiple of 16\n");
            std::abort();
        }
        std::memcpy(rows[i], at, 16);
    }
    for (int l = 0; l < 32; ++l) {
        const LdmatrixLane& lane = *static_cast<LdmatrixLane*>(records[l]);
        for (int i = 0; i < 4; ++i) {
            u16 pair[2];
            for (int e = 0; e < 2; ++e) {
                const int row = l / 4, col = 2 * (l % 4) + e;
                pair[e] = lane.trans ? rows[8 * i + col][row] : rows[8 * i + row][col];
            }
            lane.r[i] = u32(pair[0]) | (u32(pair[1]) << 16);
        }
    }
}
PM_DEV void pm_ldmatrix_x4(u32 (&r)[4], const char* at) {
    LdmatrixLane mine = {at, r, false};
    simt::collective(32, ldmatrix, &mine, __FILE__, __LINE__);
}
PM_DEV void pm_ldmatrix_x4_trans(u32 (&r)[4], const char* at) {
    LdmatrixLane mine = {at, r, true};
    simt::collective(32, ldmatrix, &mine, __FILE__, __LINE__);
}

// The inverse: lane l gives of each matrix elements 2 (l % 4) and the next of row l / 4.
struct StmatrixLane {
    char* row;
    u32 r[4];
};
PM_DEV void stmatrix(void** records) {
    for (int i = 0; i < 32; ++i) {
        char* at = static_cast<StmatrixLane*>(records[i])->row;
        if (reinterpret_cast<uintptr_t>(at) % 16 != 0) {
            std::fprintf(stderr, "simt: stmatrix row address is not a multiple of 16\n");
            std::abort();
        }
        for (int pair = 0; pair < 4; ++pair)
            std::memcpy(at + pair * 4, &static_cast<StmatrixLane*>(records[i % 8 * 4 + pair])->r[i / 8], 4);
    }
}
PM_DEV void pm_stmatrix_x4(char* at, u32 a, u32 b, u32 c, u32 d) {
    StmatrixLane mine = {at, {a, b, c, d}};
    simt::collective(32, stmatrix, &mine, __FILE__, __LINE__);
}

struct MmaLane {
    float* c;
    const u32* a;
    const u32* b;
};
template <class Elem>
PM_DEV void mma_16816(void** records) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int l = 0; l < 32; ++l) {
        const MmaLane& lane = *static_cast<MmaLane*>(records[l]);
        const int group = l >> 2, in_group = l & 3;
        for (int i = 0; i < 8; ++i) {       // a0..a7
            const int row = (i & 2) ? group + 8 : group;
            const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            a[row][col] = widen<Elem>(u16(lane.a[i / 2] >> (16 * (i & 1))));
        }
        for (int i = 0; i < 4; ++i) {       // b0..b3
            const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
            b[row][group] = widen<Elem>(u16(lane.b[i / 2] >> (16 * (i & 1))));
        }
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int col = 0; col < 8; ++col) c[row][col] += a[row][k] * b[k][col];
    for (int l = 0; l < 32; ++l) {
        const MmaLane& lane = *static_cast<MmaLane*>(records[l]);
        const int group = l >> 2, in_group = l & 3;
        for (int i = 0; i < 4; ++i) lane.c[i] += c[i < 2 ? group : group + 8][in_group * 2 + (i & 1)];
    }
}
template <class Elem>
PM_DEV void pm_mma_16816(float* c, const u32 (&a)[4], const u32* b) {
    MmaLane mine = {c, a, b};
    simt::collective(32, mma_16816<Elem>, &mine, __FILE__, __LINE__);
}

}  // namespace polymla
