// A small device-side harness for the sm90 kernels: nvcc builds it into a shared library
// that run.py drives through ctypes. The product's host side is Rust; this exists so that
// kernels can be checked and timed with nothing but nvcc and Python.
#include "../../backends/sm90/decode.cu"
#include "../../backends/sm90/combine.cu"
#include "../../backends/sm90/schedule.cu"


#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdio>

using namespace polymla;

namespace {

#ifdef POLYMLA_ONE_KERNEL     // quick builds for timing
#define polymla_decode_bf16_d576_gather polymla_decode_bf16_d576_tma
#define polymla_decode_bf16_d512_tma polymla_decode_bf16_d576_tma
#define polymla_decode_bf16_d512_gather polymla_decode_bf16_d576_tma
#define polymla_decode_f16_d576_tma polymla_decode_bf16_d576_tma
#define polymla_decode_f16_d576_gather polymla_decode_bf16_d576_tma
#define polymla_decode_bf16_d512_few polymla_decode_bf16_d576_few
#define polymla_decode_f16_d512_few polymla_decode_bf16_d576_few
#define polymla_decode_f16_d576_few polymla_decode_bf16_d576_few
#define polymla_decode_f16_d512_tma polymla_decode_bf16_d576_tma
#define polymla_decode_f16_d512_gather polymla_decode_bf16_d576_tma
#endif

typedef void (*DecodeKernel)(const DecodeParams, const TensorMap, const TensorMap, const TensorMap, const TensorMap);
// [f16][rope][form]
DecodeKernel kernels[2][2][3] = {
    {{polymla_decode_bf16_d512_tma, polymla_decode_bf16_d512_gather, polymla_decode_bf16_d512_few},
     {polymla_decode_bf16_d576_tma, polymla_decode_bf16_d576_gather, polymla_decode_bf16_d576_few}},
    {{polymla_decode_f16_d512_tma, polymla_decode_f16_d512_gather, polymla_decode_f16_d512_few},
     {polymla_decode_f16_d576_tma, polymla_decode_f16_d576_gather, polymla_decode_f16_d576_few}}};

decltype(&cuTensorMapEncodeTiled) encode_fn;

int check(cudaError_t e, const char* what) {
    if (e != cudaSuccess) fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    return int(e);
}

// ckv: (64 columns, token, group of 64 columns, head, page); kpe: (64 columns, token, head, page).
// q: (64 columns, head, group, s, request); q_pe: (64 columns, head, s, request). Boxes: 64 columns x `rows`.
int encode(TensorMap* map, const void* base, int f16, int rank, int rows, const cuuint64_t (&dims)[5], const i64 (&strides)[4],
           int paired) {
    cuuint64_t bytes[4];
    for (int i = 0; i < 4; ++i) bytes[i] = cuuint64_t(strides[i]) * 2;
    cuuint32_t box[5] = {64, cuuint32_t(rows), 1, 1, 1}, one[5] = {1, 1, 1, 1, 1};
    CUresult r = encode_fn(reinterpret_cast<CUtensorMap*>(map),
                           f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
                           const_cast<void*>(base), dims, bytes, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B,
                           paired ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r) fprintf(stderr, "cuTensorMapEncodeTiled: %d\n", int(r));
    return int(r);
}

}  // namespace

extern "C" int pm_init() {
    cudaDriverEntryPointQueryResult q;
    if (int e = check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode_fn, 12000,
                                                       cudaEnableDefault, &q), "entry point")) return e;
    for (auto& a : kernels)
        for (auto& b : a)
            for (auto& k : b)
                if (int e = check(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, Smem::total), "smem"))
                    return e;
    for (auto k : {polymla_combine_bf16, polymla_combine_f16})
        if (int e = check(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(CombineSmem)), "smem")) return e;
    return 0;
}

extern "C" int pm_sizes(int* decode, int* schedule) {
    *decode = sizeof(DecodeParams);
    *schedule = sizeof(ScheduleParams);
    return Smem::total;
}

extern "C" int pm_maps(const DecodeParams* p, int f16, int rope, TensorMap* maps) {
    typedef cuuint64_t U;
    const int rows = p->page_size < 64 ? p->page_size : 64, paired = p->m_tiles % 2 == 0;
    if (int e = encode(&maps[0], p->ckv, f16, 5, rows, {64, U(p->page_size), 8, U(p->h_kv), U(p->num_pages)},
                       {p->ckv_stride_token, 64, p->ckv_stride_head, p->ckv_stride_page}, paired)) return e;
    if (int e = encode(&maps[2], p->q_nope, f16, 5, p->q_box_rows, {64, U(p->h_q), 8, U(p->s_q), U(p->b)},
                       {p->q_nope_stride_h, 64, p->q_nope_stride_s, p->q_nope_stride_b}, paired)) return e;
    if (!rope) return 0;
    if (int e = encode(&maps[1], p->kpe, f16, 4, rows, {64, U(p->page_size), U(p->h_kv), U(p->num_pages), 1},
                       {p->kpe_stride_token, p->kpe_stride_head, p->kpe_stride_page, 64}, paired)) return e;
    return encode(&maps[3], p->q_pe, f16, 4, p->q_box_rows, {64, U(p->h_q), U(p->s_q), U(p->b), 1},
                  {p->q_pe_stride_h, p->q_pe_stride_s, p->q_pe_stride_b, 64}, paired);
}

extern "C" int pm_schedule(const ScheduleParams* p, void* stream) {
    polymla_schedule<<<1, 512, 0, (cudaStream_t)stream>>>(*p);
    return check(cudaGetLastError(), "schedule");
}

// form: 0 tma, 1 gather, 2 few rows. combine_ctas 0: no combine.
extern "C" int pm_decode(const DecodeParams* p, const TensorMap* maps, int f16, int rope, int form, int combine_ctas,
                         void* stream) {
    cudaLaunchAttribute attr[1];
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = dim3(p->m_tiles, p->h_kv, p->num_parts);
    cfg.blockDim = dim3(512);
    cfg.dynamicSmemBytes = Smem::total;
    cfg.stream = (cudaStream_t)stream;
    // Two M tiles of a request share their loads.
    attr[0].id = cudaLaunchAttributeClusterDimension;
    attr[0].val.clusterDim = {form == 0 && p->m_tiles % 2 == 0 ? 2u : 1u, 1, 1};
    cfg.attrs = attr;
    cfg.numAttrs = 1;
    if (int e = check(cudaLaunchKernelEx(&cfg, kernels[f16][rope][form], *p, maps[0], maps[1], maps[2], maps[3]), "decode"))
        return e;
    if (!combine_ctas) return 0;
    cudaLaunchConfig_t c2 = {};
    c2.gridDim = dim3(combine_ctas);
    c2.blockDim = dim3(512);
    c2.dynamicSmemBytes = sizeof(CombineSmem);
    c2.stream = (cudaStream_t)stream;
    c2.attrs = attr;
    c2.numAttrs = 1;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    return check(cudaLaunchKernelEx(&c2, f16 ? polymla_combine_f16 : polymla_combine_bf16, *p), "combine");
}

#ifdef POLYMLA_PROFILE
extern "C" int pm_merge_times(void* dst) {
    return check(cudaMemcpyFromSymbol(dst, polymla_merge_times, sizeof(polymla_merge_times)), "merge times");
}
extern "C" int pm_marks(void* dst) { return check(cudaMemcpyFromSymbol(dst, polymla_marks, sizeof(polymla_marks)), "marks"); }
extern "C" int pm_times(void* dst) { return check(cudaMemcpyFromSymbol(dst, polymla_times, sizeof(polymla_times)), "times"); }
#endif
