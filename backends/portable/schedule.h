// The schedule on the device: get_mla_metadata of src/schedule.rs, number for number, for lengths that live there.
//
// One block of SCHEDULE_THREADS threads. Lengths are read and checked by all, a chunk at a time, into shared memory; the
// plan itself is a short serial recurrence (where a part ends depends on where the one before did), so thread 0 walks it.
#pragma once

#include "common.h"

namespace polymla {

constexpr int SCHEDULE_THREADS = 256;
constexpr int SCHEDULE_CHUNK = 1024;            // requests whose block counts are in shared memory at a time
constexpr int SCHEDULE_SMEM = SCHEDULE_CHUNK * 4 + SCHEDULE_THREADS * 8;

struct SchedulePlanner {
    const ScheduleParams& p;
    int* chunk;                                 // block counts of requests [loaded, loaded + SCHEDULE_CHUNK)
    i64* sums;                                  // one a thread
    int loaded;

    PM_DEV SchedulePlanner(const ScheduleParams& params, char* smem) : p(params), loaded(-1) {
        sums = reinterpret_cast<i64*>(smem);
        chunk = reinterpret_cast<int*>(smem + SCHEDULE_THREADS * 8);
    }

    // Blocks of request r, from global memory; an invalid length counts as none.
    PM_DEV int blocks_of(int r) const {
        const int len = p.cache_seqlens[r];
        return len < 0 || i64(len) > p.max_tokens ? 0 : int((u32(len) + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    }
    // What a request weighs in the total: its charge (balanced) or its splits (batch-invariant).
    PM_DEV i64 weight(int blocks) const {
        if (p.fixed_split_blocks > 0) return splits(blocks);
        return (blocks > 1 ? blocks : 1) + i64(p.overhead_blocks);
    }
    PM_DEV i64 splits(int blocks) const {
        const i64 n = (i64(blocks) + p.fixed_split_blocks - 1) / p.fixed_split_blocks;
        return n > 1 ? n : 1;
    }

    // All threads: checks every length and adds up the weights.
    PM_DEV i64 total() {
        i64 sum = 0;
        for (int r = pm_thread(); r < p.b; r += SCHEDULE_THREADS) {
            const int len = p.cache_seqlens[r];
            if (len < 0 || i64(len) > p.max_tokens) report(p.status, r);
            sum += weight(blocks_of(r));
        }
        sums[pm_thread()] = sum;
        pm_sync();
        for (int n = SCHEDULE_THREADS / 2; n > 0; n /= 2) {
            if (pm_thread() < n) sums[pm_thread()] += sums[pm_thread() + n];
            pm_sync();
        }
        return sums[0];
    }

    // Thread 0: the plan. `at`, `block`, `split` say where the planner stands; everything before is handed out.
    int part = 0, at = 0, split = 0;
    i64 block = 0, room = 0, charge_total = 0;
    int begin_at = 0, begin_split = 0, previous_blocks = 0;
    i64 begin_block = 0;
    int cumulative = 0;

    // Closes the part that began at `begin_*` and ends here. `blocks` counts those of request `at`.
    PM_DEV void close(int blocks) {
        const bool inside = block > 0;
        const int end_req = inside ? at : at - 1;
        const i64 end_blocks = inside ? blocks : at > 0 ? previous_blocks : 0;
        const i64 end_block = inside ? block : end_blocks;
        bool first = begin_block != 0, last = end_block != end_blocks;
        if (begin_at == end_req) first = last = first || last;
        PartMeta m;
        m.begin_req = begin_at;
        m.end_req = end_req;
        m.begin_block = int(begin_block);
        m.end_block = int(end_block);
        m.begin_split = begin_split;
        m.is_first_req_split = first;
        m.is_last_req_split = last;
        m.padding = 0;
        p.parts[part++] = m;
        begin_at = at;
        begin_block = block;
        begin_split = split;
    }
    PM_DEV void finish_request(int blocks) {
        cumulative += split;
        p.num_splits[at + 1] = cumulative;
        previous_blocks = blocks;
        ++at;
        block = 0;
        split = 0;
    }

    // Equal payloads. Works through one request; `payload` is what a part may hold.
    PM_DEV void balanced(int blocks, i64 payload) {
        const i64 charged = blocks > 1 ? blocks : 1, overhead = p.overhead_blocks;
        for (;;) {
            const i64 rest = charged - block;
            if (room >= rest + overhead) {
                room -= rest + overhead;
                ++split;
                finish_request(blocks);
                return;
            }
            if (part >= p.num_parts) return;    // cannot be: the payloads cover the total
            if (room > overhead) {              // cut here, unless not even one block fits beside the overhead
                block += room - overhead;
                ++split;
            }
            close(blocks);
            room = payload;
        }
    }

    // Fixed splits; parts take them as evenly as can be, the first `total % num_parts` one more.
    PM_DEV void invariant(int blocks, i64 total) {
        const i64 all = splits(blocks);
        while (split < all) {
            while (room == 0 && part < p.num_parts - 1) {
                close(blocks);
                room = total / p.num_parts + (part < total % p.num_parts);
            }
            const i64 here = all - split < room ? all - split : room;
            if (here == 0) return;              // cannot be either
            split += int(here);
            block += here * p.fixed_split_blocks;
            room -= here;
        }
        finish_request(blocks);
    }

    PM_DEV void run() {
        const i64 sum = total();
        const bool fits = sum <= 0x7fffffff;
        if (!fits && pm_thread() == 0) report(p.status, p.b);
        i64 payload = (sum + p.num_parts - 1) / p.num_parts + p.overhead_blocks;
        if (p.fixed_split_blocks > 0) payload = sum / p.num_parts + (0 < sum % p.num_parts);
        room = payload;
        if (pm_thread() == 0) p.num_splits[0] = 0;
        for (int base = 0; base < p.b; base += SCHEDULE_CHUNK) {
            pm_sync();
            const int n = pm_min(SCHEDULE_CHUNK, p.b - base);
            for (int i = pm_thread(); i < n; i += SCHEDULE_THREADS) chunk[i] = blocks_of(base + i);
            pm_sync();
            if (pm_thread() != 0) continue;
            for (int i = 0; i < n; ++i) {
                if (!fits) {                    // a plan without work is safe to run
                    p.num_splits[base + i + 1] = 0;
                } else if (p.fixed_split_blocks > 0) {
                    invariant(chunk[i], sum);
                } else {
                    balanced(chunk[i], payload);
                }
            }
        }
        if (pm_thread() != 0) return;
        if (fits) {
            while (part < p.num_parts) close(0);
            return;
        }
        for (part = 0; part < p.num_parts; ++part) {
            PartMeta none = {p.b, p.b - 1, 0, 0, 0, 0, 0, 0};
            p.parts[part] = none;
        }
    }
};

PM_DEV void schedule(const ScheduleParams& p, char* smem) {
    SchedulePlanner planner(p, smem);
    planner.run();
}

}  // namespace polymla
