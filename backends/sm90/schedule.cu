// The schedule: how the KV blocks of all requests are cut over num_parts parts.
//
// One CTA of 512 threads. Costs are in eighths of a block's time: a piece of a request
// costs 8 * blocks + cost_segment, and cost_split more when it is not the whole request.
//   1. prefix sums of the requests' costs (scratch);
//   2. 256 threads each try one limit T on a part's cost and fill parts greedily; the
//      smallest T that fits wins, found in two rounds. The other 256 do the same without
//      ever splitting a request. No split is taken when it costs at most cost_combine more;
//   3. thread 0 writes the parts of the winner and the list of split requests, all threads write num_splits.
// Parts are contiguous runs of (request, block), upstream's layout.
#include "ptx.h"

namespace polymla {

constexpr int SCHED_THREADS = 512;
constexpr int TRIES = SCHED_THREADS / 2;
constexpr int SCHED_MAX_PARTS = 1024;

PM_DEV int blocks_of(const ScheduleParams& p, int r) {
    const int len = p.cache_seqlens[r];
    return len <= 0 || len > p.max_len ? 0 : int((u32(len) + 63) / 64);
}

// Inclusive sums over the CTA of one value a thread; returns the exclusive sum.
PM_DEV i64 block_scan(i64 v, i64* warp_sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 x = v;
    for (int d = 1; d < 32; d *= 2) {
        const i64 y = __shfl_up_sync(0xffffffffu, x, d);
        if (lane >= d) x += y;
    }
    if (lane == 31) warp_sums[warp] = x;
    __syncthreads();
    i64 before = 0;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
    __syncthreads();
    return before + x - v;
}

// Where a part ends within a request, and the slot of what it does of that request: two a part, for its first
// request and for another.
struct Cut { int req, slot; };

// Fills parts up to cost `limit` each; true when all requests fit. With `emit`, writes them.
PM_DEV bool fill_parts(const ScheduleParams& p, i64 limit, bool may_split, bool emit, Cut* cuts, int* num_cuts) {
    const i64* cost = p.scratch;
    const int fixed = p.fixed_split_blocks;
    int r = 0, k = 0, piece = 0, n_cuts = 0;
    for (int part = 0; part < p.num_parts; ++part) {
        const int r0 = r, k0 = k, piece0 = piece;
        if (r >= p.b) {
            if (!emit) return true;
            p.parts[part] = PartMeta{p.b, p.b - 1, 0, 0, 0, 0, 0, 0};
            continue;
        }
        i64 room = limit;
        bool full = false;
        if (k > 0) {
            const int rest = blocks_of(p, r) - k;
            const i64 c = i64(rest) * 8 + p.cost_segment + p.cost_split;
            if (c <= room) {
                room -= c;
                ++r;
                k = piece = 0;
            } else {
                i64 take = (room - p.cost_segment - p.cost_split) / 8;
                if (rest - take < p.min_split_blocks) take = rest - p.min_split_blocks;
                if (take < p.min_split_blocks) take = p.min_split_blocks;
                if (fixed) take = take / fixed > 0 ? take / fixed * fixed : fixed;
                if (take >= rest) {
                    ++r;
                    k = piece = 0;
                } else {
                    k += int(take);
                    ++piece;
                }
                full = true;
            }
        }
        if (!full) {
            // Whole requests: the furthest r with cost[r] - cost[r0] <= room, by galloping.
            const i64 reach = (r < p.b ? cost[r] : 0) + room;
            int step = 1;
            while (r < p.b && cost[min(r + step, p.b)] <= reach) {
                r = min(r + step, p.b);
                step *= 2;
            }
            for (; step >= 1; step /= 2)
                if (r + step <= p.b && cost[r + step] <= reach) r += step;
            if (may_split && r < p.b) {
                const int n = blocks_of(p, r);
                i64 take = (reach - cost[r] - p.cost_segment - p.cost_split) / 8;
                if (n - take < p.min_split_blocks) take = n - p.min_split_blocks;
                if (fixed) take = take / fixed * fixed;
                if (take >= p.min_split_blocks && take < n) {
                    k = int(take);
                    piece = 1;
                }
            }
            if (r == r0 && k == k0) {
                if (!fixed || !may_split) return false;     // T is too small to make progress
                const int n = blocks_of(p, r);
                if (n > fixed) {
                    k = fixed;
                    piece = 1;
                } else {
                    ++r;
                }
            }
        }
        if (k > 0) {
            if (emit) cuts[n_cuts] = Cut{r, 2 * part + (r0 == r ? 0 : 1)};
            ++n_cuts;
        }
        if (emit) {
            const int end_req = k > 0 ? r : r - 1;
            const int end_block = k > 0 ? k : blocks_of(p, r - 1);
            int first = k0 > 0, last = k > 0;
            if (r0 == end_req) first = last = first || last;
            p.parts[part] = PartMeta{r0, end_req, k0, end_block, piece0, first, last, 0};
        }
    }
    if (emit) *num_cuts = n_cuts;
    return r >= p.b;
}

PM_DEV void schedule(const ScheduleParams& p) {
    __shared__ i64 sums[SCHED_THREADS / 32];
    __shared__ i64 max_cost_s;
    __shared__ int best[2];
    __shared__ Cut cuts[SCHED_MAX_PARTS];
    __shared__ int num_cuts;
    const int tid = threadIdx.x;
    pdl_wait();

    // 1. prefix sums of cost
    const int per = (p.b + SCHED_THREADS - 1) / SCHED_THREADS;
    const int lo_r = min(tid * per, p.b), hi_r = min(lo_r + per, p.b);
    i64 mine = 0, top = 0, pieces = 0;
    for (int r = lo_r; r < hi_r; ++r) {
        const int n = blocks_of(p, r);
        const i64 c = i64(n) * 8 + p.cost_segment;
        mine += c;
        top = c > top ? c : top;
        pieces += p.fixed_split_blocks > 0 && n > p.fixed_split_blocks
                      ? (n + p.fixed_split_blocks - 1) / p.fixed_split_blocks : 1;
    }
    if (tid == 0) max_cost_s = 0;
    i64 at = block_scan(mine, sums);
    if (tid == 0) p.scratch[0] = 0;
    for (int r = lo_r; r < hi_r; ++r) {
        at += i64(blocks_of(p, r)) * 8 + p.cost_segment;
        p.scratch[r + 1] = at;
    }
    atomicMax(&max_cost_s, top);
    __syncthreads();

    // 2. the smallest limit that fits, with splits (threads 0..255) and without (256..511)
    const int mode = tid / TRIES, t = tid % TRIES;
    const i64 total = p.scratch[p.b];
    i64 lo = (total + p.num_parts - 1) / p.num_parts;
    i64 hi = lo + max_cost_s + 2 * (p.cost_segment + p.cost_split) + 16;
    for (int round = 0; round < 2; ++round) {
        const i64 step = (hi - lo + TRIES - 2) / (TRIES - 1);
        if (tid < 2) best[tid] = TRIES - 1;
        __syncthreads();
        if (t < TRIES - 1 && !(p.fixed_split_blocks && mode == 1) &&
            fill_parts(p, lo + step * t, mode == 0, false, cuts, &num_cuts))
            atomicMin(&best[mode], t);
        __syncthreads();
        hi = lo + step * best[mode];
        lo = best[mode] > 0 ? hi - step + 1 : hi;
        __syncthreads();
    }
    __shared__ i64 limits[2];
    if (t == 0) limits[mode] = hi;
    __syncthreads();
    const bool may_split = p.fixed_split_blocks > 0 || limits[1] > limits[0] + p.cost_combine;

    // 3. write
    if (tid == 0) {
        num_cuts = 0;
        i64 limit = limits[may_split ? 0 : 1];
        while (!fill_parts(p, limit, may_split, true, cuts, &num_cuts)) limit += limit / 8 + 8;
        // The split requests for the combine kernel, where the prefix sums were: at most one a request.
        Owner* owners = reinterpret_cast<Owner*>(p.scratch);
        int count = 0;
        for (int i = 0; i < num_cuts; ++i) {
            if (i == 0 || cuts[i].req != cuts[i - 1].req)
                owners[++count] = Owner{cuts[i].req, u16(cuts[i].slot), 2};
            else
                ++owners[count].pieces;
        }
        owners[0] = Owner{count, 0, 0};
    }
    const i64 pieces_before = block_scan(pieces, sums);
    __syncthreads();
    i64 split_at = pieces_before;
    if (tid == 0) p.num_splits[0] = 0;
    for (int r = lo_r; r < hi_r; ++r) {
        if (p.fixed_split_blocks > 0) {
            const int n = blocks_of(p, r);
            split_at += n > p.fixed_split_blocks ? (n + p.fixed_split_blocks - 1) / p.fixed_split_blocks : 1;
            p.num_splits[r + 1] = int(split_at);
        } else {
            int a = 0, b = num_cuts;    // cuts in requests <= r
            while (a < b) {
                const int mid = (a + b) / 2;
                if (cuts[mid].req <= r) a = mid + 1; else b = mid;
            }
            p.num_splits[r + 1] = r + 1 + a;
        }
    }
    pdl_launch_dependents();
}

}  // namespace polymla

extern "C" __global__ void __launch_bounds__(512) polymla_schedule(const __grid_constant__ polymla::ScheduleParams p) {
    polymla::schedule(p);
}
