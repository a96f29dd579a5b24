// Every kernel of one build: a dialect (-I backends/cuda, hip, ...), a tile class, one element type or both.
//
//   POLYMLA_SMEM_KIB   28, 64, 99, 163 or 227: the tile class (config.h)
//   POLYMLA_ONLY_BF16, POLYMLA_ONLY_F16            optional
#include "dialect.h"

#include "combine.h"
#include "decode.h"
#ifdef PM_ROLES
#include "decode_roles.h"
#endif
#include "generic.h"
#ifdef PM_PIECES
#include "merge.h"
#endif
#include "schedule.h"

#define PM_DECODE(NAME, ELEM, DK, DV, M)                                                                          \
    PM_GLOBAL(256) NAME(const polymla::DecodeParams p) {                                                          \
        PM_SHARED_DYNAMIC(smem);                                                                                  \
        polymla::pm_grid_wait();                                                                                  \
        polymla::Decoder<polymla::ELEM, polymla::PM_TILE<polymla::ELEM>,                                          \
                         polymla::ClassConfig<DK, DV, M>::type>::run(p, smem);                                    \
    }
#if defined(PM_ROLES) && POLYMLA_SMEM_KIB >= 227
// The largest tile, where it fits: matrix work of both products at once.
#define PM_DECODE_64(NAME, ELEM, DK, DV)                                                                          \
    PM_GLOBAL(512) NAME(const polymla::DecodeParams p) {                                                          \
        PM_SHARED_DYNAMIC(smem);                                                                                  \
        polymla::pm_grid_wait();                                                                                  \
        polymla::RoleDecoder<polymla::ELEM, polymla::PM_TILE<polymla::ELEM>,                                      \
                             polymla::ClassConfig<DK, DV, 64>::type>::run(p, smem);                               \
    }
#else
#define PM_DECODE_64(NAME, ELEM, DK, DV) PM_DECODE(NAME, ELEM, DK, DV, 64)
#endif
#if POLYMLA_SMEM_KIB >= 163
#define PM_DECODE_ALL(NAME, ELEM, DK, DV)    \
    PM_DECODE(NAME##_m16, ELEM, DK, DV, 16)  \
    PM_DECODE(NAME##_m32, ELEM, DK, DV, 32)  \
    PM_DECODE_64(NAME##_m64, ELEM, DK, DV)
#elif POLYMLA_SMEM_KIB >= 99
#define PM_DECODE_ALL(NAME, ELEM, DK, DV)    \
    PM_DECODE(NAME##_m16, ELEM, DK, DV, 16)  \
    PM_DECODE(NAME##_m32, ELEM, DK, DV, 32)
#else
#define PM_DECODE_ALL(NAME, ELEM, DK, DV) PM_DECODE(NAME##_m16, ELEM, DK, DV, 16)
#endif

#define PM_KERNELS(SUFFIX, ELEM)                                                  \
    PM_DECODE_ALL(polymla_decode_##SUFFIX##_d576, ELEM, 576, 512)                 \
    PM_DECODE_ALL(polymla_decode_##SUFFIX##_d512, ELEM, 512, 512)                 \
    PM_GLOBAL(256) polymla_generic_##SUFFIX(const polymla::DecodeParams p) {      \
        PM_SHARED_DYNAMIC(smem);                                                  \
        polymla::pm_grid_wait();                                                  \
        polymla::pm_grid_release();                                               \
        polymla::generic<polymla::ELEM>(p, smem);                                 \
    }                                                                             \
    PM_GLOBAL(256) polymla_combine_##SUFFIX(const polymla::DecodeParams p) {      \
        PM_SHARED_DYNAMIC(smem);                                                  \
        polymla::combine<polymla::ELEM>(p, smem);                                 \
    }

#ifdef PM_PIECES
#define PM_MERGE(SUFFIX, ELEM)                                                    \
    PM_GLOBAL(512) polymla_merge_##SUFFIX(const polymla::DecodeParams p) {        \
        PM_SHARED_DYNAMIC(smem);                                                  \
        polymla::merge<polymla::ELEM>(p, smem);                                   \
    }
#else
#define PM_MERGE(SUFFIX, ELEM)
#endif

#ifndef POLYMLA_ONLY_F16
PM_KERNELS(bf16, Bf16)
PM_MERGE(bf16, Bf16)
#endif
#ifndef POLYMLA_ONLY_BF16
PM_KERNELS(f16, F16)
PM_MERGE(f16, F16)
#endif

PM_GLOBAL(256) polymla_schedule(const polymla::ScheduleParams p) {
    PM_SHARED_DYNAMIC(smem);
    polymla::schedule(p, smem);
}
