/* A peer library that runs on the CPU: the smallest one there is, and what test_h200_peers.py tests the script with.
 * FAULT in the environment makes it wrong in one way. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "peer_library.h"

enum { D = 576, DV = 512, PAGE = 64 };

static int fault(const char *name) {
    const char *wanted = getenv("FAULT");
    return wanted && strcmp(wanted, name) == 0;
}

static float widen(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

int peer_abi(void) { return fault("abi") ? PEER_ABI + 1 : PEER_ABI; }
const char *peer_name(void) { return "a CPU stand-in"; }
int peer_lse_rows(void) { return fault("rows"); }

/* The plan: each request's length, which decode takes from here. */
int64_t peer_workspace_bytes(const PeerShape *s) { return fault("shape") ? -1 : (int64_t)s->b * 4; }

int peer_plan(const PeerShape *s, void *workspace, const int32_t *lens, void *stream) {
    (void)stream;
    if (fault("plan")) return 0; /* leaves the workspace as it came */
    memcpy(workspace, lens, (size_t)s->b * 4);
    return 0;
}

int peer_decode(const PeerShape *s, void *workspace, const void *q, const void *k, const int32_t *table,
                int64_t table_stride, const int32_t *lens, void *out, float *lse, void *stream) {
    (void)stream, (void)lens;
    if (fault("code")) return 7;
    for (int i = 0; i < s->b; i++) {
        int len = ((const int32_t *)workspace)[i];
        if (fault("page") && len > PAGE) len -= PAGE;
        for (int j = 0; j < s->s_q; j++)
            for (int h = 0; h < s->h_q; h++) {
                const int64_t row = ((int64_t)i * s->s_q + j) * s->h_q + h;
                float sum[DV] = {0}, weight = 0, most = -INFINITY;
                for (int t = 0; t < len; t++) {
                    const int64_t page = table[i * table_stride + t / PAGE];
                    const uint16_t *token = (const uint16_t *)k + (page * PAGE + t % PAGE) * D;
                    float score = 0;
                    for (int c = 0; c < D; c++) score += widen(((const uint16_t *)q)[row * D + c]) * widen(token[c]);
                    score *= s->scale;
                    const float raised = fmaxf(most, score), old = expf(most - raised), p = expf(score - raised);
                    most = raised;
                    weight = weight * old + p;
                    for (int c = 0; c < DV; c++) sum[c] = sum[c] * old + p * widen(token[c]);
                }
                if (fault("head") && h == s->h_q - 1) continue; /* never written */
                for (int c = 0; c < DV; c++) ((uint16_t *)out)[row * DV + c] = narrow(sum[c] / weight);
                const float natural = most + logf(weight);
                lse[((int64_t)i * s->h_q + h) * s->s_q + j] = fault("base") ? natural / logf(2) : natural;
            }
    }
    return 0;
}
