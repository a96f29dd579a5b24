// v_mfma_f32_16x16x16 (bf16_1k, f16), lane by lane, by the register layouts that AMD's CDNA ISA documents publish.
#pragma once

#include "common.h"

namespace polymla {

struct MfmaLane {
    float* c;
    Words2 a, b;
};
template <class Elem>
PM_DEV void mfma_16x16x16(void** records) {
    float a[16][16], b[16][16], d[16][16] = {};
    for (int l = 0; l < 64; ++l) {
        const MfmaLane& lane = *static_cast<MfmaLane*>(records[l]);
        for (int i = 0; i < 4; ++i) {
            const int k = 4 * (l / 16) + i;
            a[l % 16][k] = widen<Elem>(u16(lane.a.w[i / 2] >> (16 * (i % 2))));
            b[k][l % 16] = widen<Elem>(u16(lane.b.w[i / 2] >> (16 * (i % 2))));
        }
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 64; ++l)
        for (int i = 0; i < 4; ++i) static_cast<MfmaLane*>(records[l])->c[i] += d[4 * (l / 16) + i][l % 16];
}
template <class Elem>
PM_DEV void pm_mfma_16x16x16(float* c, Words2 a, Words2 b) {
    MfmaLane mine = {c, a, b};
    simt::collective(64, mfma_16x16x16<Elem>, &mine, __FILE__, __LINE__);
}

}  // namespace polymla
