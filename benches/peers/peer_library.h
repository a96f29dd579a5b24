/* What a shared library exports so that h200_peers.py --library times it: a peer's kernels without its Python package.
 *
 * The library is yours to bring: none is part of this repository. All pointers are device pointers, but for the name.
 * q [b, s_q, h_q, 576], k [num_pages, 64, 1, 576] and out [b, s_q, h_q, 512] are bf16 and contiguous (V is k's first 512
 * columns); lse [b, h_q, s_q] is f32 in natural log, or, where peer_lse_rows() is 1, [b, s_q, h_q]; table is int32 with
 * table_stride entries a request; lens is int32 [b]. Work goes to `stream` (a cudaStream_t); nothing may synchronise.
 * Functions that return int return 0 or an error number. The workspace arrives as 0xff bytes, once a row; peer_plan is
 * called once a row, outside the timing, peer_decode once a timed call. */
#ifndef PEER_LIBRARY_H
#define PEER_LIBRARY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PEER_ABI 1

/* Sizes of one row; the table has max_pages columns that count. */
typedef struct PeerShape {
    int32_t b, s_q, h_q, num_pages, max_pages, num_sms, causal;
    float scale;
} PeerShape;

int peer_abi(void);
const char *peer_name(void);
int peer_lse_rows(void);
int64_t peer_workspace_bytes(const PeerShape *shape);
int peer_plan(const PeerShape *shape, void *workspace, const int32_t *lens, void *stream);
int peer_decode(const PeerShape *shape, void *workspace, const void *q, const void *k, const int32_t *table,
                int64_t table_stride, const int32_t *lens, void *out, float *lse, void *stream);

#ifdef __cplusplus
}
#endif
#endif
