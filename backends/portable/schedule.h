// The schedule on the device: get_mla_metadata of src/schedule.rs, number for number, for lengths that live there.
//
// One block of SCHEDULE_THREADS threads. Lengths are read and checked by all, a chunk at a time, into shared memory; the
// plan itself is a short serial recurrence (where a part ends depends on where the one before did), so thread 0 walks it.
//
// Where the overhead is left open (negative), SCHEDULE_TRIES threads walk first, each with an overhead of its own, and the plan
// with the least cost is made: that of its dearest part, in which a segment costs SEGMENT_COST beyond its blocks, and
// that of merging its splits. Few blocks a part want a small overhead, as every multiprocessor counts; many want requests
// to stay whole.
#pragma once

#include "common.h"

namespace polymla {

constexpr int SCHEDULE_THREADS = 256;
constexpr int SCHEDULE_CHUNK = 1024;            // requests whose block counts are in shared memory at a time
constexpr int SCHEDULE_SMEM = SCHEDULE_CHUNK * 4 + SCHEDULE_THREADS * 8;
constexpr int SCHEDULE_TRIES = SCHEDULE_THREADS / 32;
constexpr i64 BLOCK_COST = 1024, SEGMENT_COST = 1280;

// The overheads that are tried, in blocks. Of equal costs the first wins.
PM_DEV int overhead_of_try(int i) { return i == 0 ? 5 : i <= 5 ? i - 1 : 2 * i - 5; }     // 5, 0 to 4, 7, 9

struct SchedulePlanner {
    const ScheduleParams& p;
    int* chunk;                                 // block counts of SCHEDULE_CHUNK requests
    i64* sums;                                  // one a thread
    int overhead;                               // of balanced plans
    bool writes;                                // or only counts what a plan would cost

    PM_DEV SchedulePlanner(const ScheduleParams& params, char* smem)
        : p(params), overhead(params.overhead_blocks > 0 ? params.overhead_blocks : 0), writes(true) {
        sums = reinterpret_cast<i64*>(smem);
        chunk = reinterpret_cast<int*>(smem + SCHEDULE_THREADS * 8);
    }

    // Blocks of request r, from global memory; an invalid length counts as none.
    PM_DEV int blocks_of(int r) const {
        const int len = p.cache_seqlens[r];
        return len < 0 || i64(len) > p.max_tokens ? 0 : int((u32(len) + BLOCK_TOKENS - 1) / BLOCK_TOKENS);
    }
    // What a request weighs in the total: its charge without the overhead (balanced) or its splits (batch-invariant).
    PM_DEV i64 weight(int blocks) const {
        if (p.fixed_split_blocks > 0) return splits(blocks);
        return blocks > 1 ? blocks : 1;
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
    // Costs of the part that is being filled, and of all.
    i64 part_cost = 0, most_cost = 0, merged = 0;

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
        if (writes) p.parts[part] = m;
        ++part;
        most_cost = part_cost > most_cost ? part_cost : most_cost;
        part_cost = 0;
        begin_at = at;
        begin_block = block;
        begin_split = split;
    }
    PM_DEV void finish_request(int blocks) {
        cumulative += split;
        if (writes) p.num_splits[at + 1] = cumulative;
        if (split > 1) merged += split;
        previous_blocks = blocks;
        ++at;
        block = 0;
        split = 0;
    }

    // Equal payloads. Works through one request; `payload` is what a part may hold.
    PM_DEV void balanced(int blocks, i64 payload) {
        const i64 charged = blocks > 1 ? blocks : 1;
        for (;;) {
            const i64 rest = charged - block;
            if (room >= rest + overhead) {
                room -= rest + overhead;
                part_cost += rest * BLOCK_COST + SEGMENT_COST;
                ++split;
                finish_request(blocks);
                return;
            }
            if (part >= p.num_parts) return;    // cannot be: the payloads cover the total
            if (room > overhead) {              // cut here, unless not even one block fits beside the overhead
                block += room - overhead;
                part_cost += (room - overhead) * BLOCK_COST + SEGMENT_COST;
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

    // What a part may hold.
    PM_DEV i64 payload(i64 sum) const {
        if (p.fixed_split_blocks > 0) return sum / p.num_parts + (0 < sum % p.num_parts);
        return (sum + p.num_parts - 1) / p.num_parts + overhead;
    }

    // All threads; those that `walk` go through all requests. `sum` is theirs.
    PM_DEV void walk_requests(bool walks, i64 sum) {
        const i64 limit = payload(sum);
        room = limit;
        for (int base = 0; base < p.b; base += SCHEDULE_CHUNK) {
            pm_sync();
            const int n = pm_min(SCHEDULE_CHUNK, p.b - base);
            for (int i = pm_thread(); i < n; i += SCHEDULE_THREADS) chunk[i] = blocks_of(base + i);
            pm_sync();
            if (!walks) continue;
            for (int i = 0; i < n; ++i) {
                if (p.fixed_split_blocks > 0)
                    invariant(chunk[i], sum);
                else
                    balanced(chunk[i], limit);
            }
        }
    }

    // The overhead of the cheapest plan.
    PM_DEV int cheapest(i64 bare) {
        SchedulePlanner trial = *this;
        const int mine = pm_thread() / 32;
        const bool tries = pm_thread() % 32 == 0;
        trial.overhead = overhead_of_try(mine);
        trial.writes = false;
        const i64 sum = bare + i64(p.b) * trial.overhead;
        trial.walk_requests(tries && sum <= 0x7fffffff, sum);
        trial.close(0);
        pm_sync();
        if (tries)
            sums[mine] = sum <= 0x7fffffff ? trial.most_cost + trial.merged * p.merge_cost : i64(0x7fffffffffffffffLL);
        pm_sync();
        int best = 0;
        for (int i = 1; i < SCHEDULE_TRIES; ++i)
            if (sums[i] < sums[best]) best = i;
        return overhead_of_try(best);
    }

    PM_DEV void run() {
        const i64 bare = total();
        if (p.fixed_split_blocks == 0 && p.overhead_blocks < 0) {
            pm_sync();
            overhead = cheapest(bare);
        }
        const i64 sum = p.fixed_split_blocks > 0 ? bare : bare + i64(p.b) * overhead;
        const bool fits = sum <= 0x7fffffff;
        if (!fits && pm_thread() == 0) report(p.status, p.b);
        if (pm_thread() == 0) p.num_splits[0] = 0;
        if (fits) {
            walk_requests(pm_thread() == 0, sum);
            if (pm_thread() == 0)
                while (part < p.num_parts) close(0);
            return;
        }
        // A plan without work is safe to run.
        for (int r = pm_thread(); r < p.b; r += SCHEDULE_THREADS) p.num_splits[r + 1] = 0;
        for (int i = pm_thread(); i < p.num_parts; i += SCHEDULE_THREADS) {
            PartMeta none = {p.b, p.b - 1, 0, 0, 0, 0, 0, 0};
            p.parts[i] = none;
        }
    }
};

PM_DEV void schedule(const ScheduleParams& p, char* smem) {
    SchedulePlanner planner(p, smem);
    planner.run();
}

}  // namespace polymla
