// How fast an H200 reads the pages of rows C and F (docs/kernel-log.md) when nothing is computed: contiguous bulk copies of a block
// each, three in flight an SM, between the same events and after the same flush as benches/sm90/run.py. Shares are fixed, or
// (`dyn`) all or the rest comes from a queue, in pieces of `chunk` blocks.
//
//   nvcc -O3 -std=c++17 -arch=sm_90a benches/sm90/stream.cu -o stream && ./stream
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

constexpr int BLOCK_BYTES = 73728, STAGES = 3;

__device__ __forceinline__ void wait(uint32_t bar, uint32_t parity) {
    asm volatile("{.reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra L; }" ::"r"(bar), "r"(parity) : "memory");
}

// `share` blocks for each CTA, then, with a queue, chunks of what is left.
__global__ void __launch_bounds__(128, 1)
    stream(const char* kv, const int* table, int n, int* queue, int share, int chunk, int* blocks_of_sm) {
    extern __shared__ __align__(1024) char smem[];
    __shared__ __align__(8) uint64_t bars[STAGES];
    if (threadIdx.x != 0) return;
    const uint32_t base = uint32_t(__cvta_generic_to_shared(smem)), bar = uint32_t(__cvta_generic_to_shared(bars));
    for (int i = 0; i < STAGES; ++i) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(bar + 8 * i));
    asm volatile("fence.mbarrier_init.release.cluster;");
    int issued = 0, done = 0, at = blockIdx.x * share, end = min(at + share, n);
    bool more = queue != nullptr;
    while (true) {
        if (at >= end && more) {
            at = gridDim.x * share + atomicAdd(queue, chunk);
            end = min(at + chunk, n);
            if (at >= n) more = false, end = at;
        }
        if (at >= end) break;
        const int stage = issued % STAGES;
        if (issued - done == STAGES) { wait(bar + 8 * (done % STAGES), (done / STAGES) & 1); ++done; }
        const char* src = kv + size_t(table[at]) * BLOCK_BYTES;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar + 8 * stage), "r"(BLOCK_BYTES) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(base + stage * BLOCK_BYTES),
                     "l"(src), "r"(BLOCK_BYTES), "r"(bar + 8 * stage) : "memory");
        ++issued, ++at;
    }
    for (; done < issued; ++done) wait(bar + 8 * (done % STAGES), (done / STAGES) & 1);
    uint32_t sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    blocks_of_sm[sm] = issued;
}

int main() {
    cudaFuncSetAttribute(stream, cudaFuncAttributeMaxDynamicSharedMemorySize, STAGES * BLOCK_BYTES);
    const int most = 32768;
    char *kv, *flush;
    int *table, *queue, *blocks_of_sm;
    cudaMalloc(&kv, size_t(most) * BLOCK_BYTES);
    cudaMalloc(&flush, 1 << 30);
    cudaMalloc(&table, most * 4);
    cudaMalloc(&queue, 4);
    cudaMalloc(&blocks_of_sm, 4 * 256);
    cudaMemset(kv, 1, size_t(most) * BLOCK_BYTES);
    for (int n : {8192, 32768}) {
        std::vector<int> pages(n);
        for (int i = 0; i < n; ++i) pages[i] = i;
        for (int i = n - 1; i > 0; --i) std::swap(pages[i], pages[rand() % (i + 1)]);
        cudaMemcpy(table, pages.data(), n * 4, cudaMemcpyHostToDevice);
        struct Way { const char* name; bool queued; int share, grid, chunk; };
        const Way ways[] = {{"fixed, 128 CTAs", false, n / 128, 128, 1}, {"fixed, 132 CTAs", false, (n + 131) / 132, 132, 1},
                            {"dyn, all", true, 0, 132, 1}, {"dyn, half", true, n / 264, 132, 1},
                            {"dyn, 15%", true, int(n / 132 * .85), 132, 1}, {"dyn, 15% by 4", true, int(n / 132 * .85), 132, 4},
                            {"dyn, 20% by 8", true, int(n / 132 * .8), 132, 8}};
        for (const Way& way : ways) {
            std::vector<float> us;
            for (int i = -2; i < 9; ++i) {
                cudaMemsetAsync(flush, i, 1 << 30);
                cudaMemsetAsync(queue, 0, 4);
                cudaEvent_t a, b;
                cudaEventCreate(&a), cudaEventCreate(&b);
                cudaEventRecord(a);
                stream<<<way.grid, 128, STAGES * BLOCK_BYTES>>>(kv, table, n, way.queued ? queue : nullptr, way.share, way.chunk, blocks_of_sm);
                cudaEventRecord(b);
                cudaDeviceSynchronize();
                float ms;
                cudaEventElapsedTime(&ms, a, b);
                if (i >= 0) us.push_back(ms * 1e3f);
                cudaEventDestroy(a), cudaEventDestroy(b);
            }
            std::sort(us.begin(), us.end());
            const float median = us[us.size() / 2];
            int blocks[256];
            cudaMemcpy(blocks, blocks_of_sm, sizeof blocks, cudaMemcpyDeviceToHost);
            std::sort(blocks, blocks + 132);
            std::printf("%5d blocks, %-16s %.1f us %.2f TB/s, blocks an SM %d to %d\n", n, way.name, median,
                        double(n) * BLOCK_BYTES / median / 1e6, blocks[4], blocks[131]);
        }
    }
    std::printf("%s\n", cudaGetErrorString(cudaGetLastError()));
}
