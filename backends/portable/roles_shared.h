// What the roles of decode_roles.h share: shared memory, the barriers in it, segments, and the role that copies.
//
// Tile      64 packed query rows x 64 tokens.
// Roles     4 warps copy, 8 tokens of each half of a tile a warp; the others wait for them and for each other by barriers.
// Pipeline  2 stages of KV in two halves; what has been read is filled again, from L2, where it has been brought meanwhile.
//
// A row of KV is brought whole by the copy engine (cp.async.bulk): copies of 16 bytes take as much of shared memory's time again
// as reading operands does. So rows cannot be swizzled; they are an odd number of 16 bytes apart instead. The 16 bytes between
// them hold what is known of the tile's query rows.
#pragma once

#include "load.h"

namespace polymla {

template <class C>
struct RoleShared {
    static constexpr int PV_THREADS = DECODE_THREADS, PAIRS = 2, QK_THREADS = PAIRS * 64, COPY_THREADS = 128;
    static constexpr int QK_FIRST = PV_THREADS, COPY_FIRST = QK_FIRST + QK_THREADS, THREADS = COPY_FIRST + COPY_THREADS;

    // Barriers in shared memory. The n-th use of one waits for its n-th phase, which nobody may then be ahead of, neither by
    // waiting nor by arriving. What a role may run ahead with, by a segment, has one for each of the two slots: the copying
    // warps do, and the second group in segments without keys.
    enum Barrier {
        SEGMENT,                // a slot says what the next segment is
        LOADED = SEGMENT + 2,   // all copies of its segment are under way
        STORED = LOADED + 2,    // and O is stored: nobody wants the slot any more
        ROWS = STORED + 2,      // a segment's rows are finished
        Q_FULL = ROWS + 2,      // Q has landed; for every segment with keys
        Q_EMPTY,                // and is read
        FULL,                   // a half stage has landed: stage * 2 + half
        EMPTY = FULL + 4,       // and it, and the half of P with it, is read
        P_FULL = EMPTY + 4,     // P and its factors are there: group
        MAXIMA = P_FULL + 2,    // for a group's 32 rows: 2 * pair + group
        SUMS = MAXIMA + 2 * PAIRS,
        TURN = SUMS + PAIRS,    // a score warp is through with a tile's matrix work: the P V warps beside it may have theirs
        BARRIERS = TURN + QK_THREADS / 32
    };
    static PM_DEV int arrivals(int which) {
        return which < LOADED                        ? 1
               : which < STORED                      ? COPY_THREADS
               : which < ROWS                        ? PV_THREADS
               : which < Q_FULL || which == Q_EMPTY  ? QK_THREADS
               : which < FULL                        ? COPY_THREADS
               : which < EMPTY                       ? C::N / 2
               : which < P_FULL                      ? PV_THREADS
               : which < MAXIMA                      ? PAIRS * 32
               : which < TURN                        ? 32
                                                     : 1;
    }

    // A segment, as the copying warps tell it to the others. Two slots: the copies may be a segment ahead.
    struct Slot {
        Segment segment;
        int more, bad;
    };
    struct Work {
        int first, last;        // tokens
        int tiles;
        PM_DEV Work(const Segment& s) {
            first = s.begin * BLOCK_TOKENS;
            last = s.bad ? first : int(i64(s.end) * BLOCK_TOKENS < s.len ? s.end * BLOCK_TOKENS : s.len);
            tiles = int((u32(last > first ? last - first : 0) + C::N - 1) / C::N);
        }
    };

    // In bytes from the base; Q is where the uniform kernel has it, and swizzled as there.
    static constexpr int ROW_BYTES = C::DK * 2 + 16;    // of KV
    static constexpr int STAGE_BYTES = C::N * ROW_BYTES, HALF_BYTES = STAGE_BYTES / 2;
    static constexpr int kv = C::q + C::M * C::DK * 2;
    static constexpr int p = kv + 2 * STAGE_BYTES;
    static constexpr int factor = p + C::M * C::N * 2;  // f32 [2][M]: by group, what O is multiplied by before its P V is added
    static constexpr int slots = factor + 2 * C::M * 4;
    static constexpr int barriers = slots + 2 * int(sizeof(Slot));
    static constexpr int walk_at = barriers + BARRIERS * 8;     // the walk over the part, of one thread
    static constexpr int total = walk_at + int(sizeof(SegmentWalk));
    static_assert(total <= POLYMLA_SMEM_KIB * 1024, "the class's shared memory");
    static_assert(C::Q_COLS == C::DK && C::M == C::N, "a query row has two notes");

    // Behind row r of the first stage, and of the second.
    struct EndNote {
        i64 offset;             // where query row r goes, -1 for nowhere
        float inverse;          // what its O is multiplied by at the end
        float unused;
    };
    struct MaximumNote {
        float maximum[2];       // after a group's last step
        float other_m, other_l; // the second group's, at the end
    };
    static PM_DEV EndNote& end_note(char* smem, int row) {
        return *reinterpret_cast<EndNote*>(smem + kv + row * ROW_BYTES + C::DK * 2);
    }
    static PM_DEV MaximumNote& maximum_note(char* smem, int row) {
        return *reinterpret_cast<MaximumNote*>(smem + kv + STAGE_BYTES + row * ROW_BYTES + C::DK * 2);
    }
    static PM_DEV float* factors(char* smem, int group) { return reinterpret_cast<float*>(smem + factor + group * C::M * 4); }
    static PM_DEV Slot& slot_of(char* smem, u32 turn) { return reinterpret_cast<Slot*>(smem + slots)[turn & 1]; }
    static PM_DEV SegmentWalk& walk(char* smem) { return *reinterpret_cast<SegmentWalk*>(smem + walk_at); }

    static PM_DEV char* barrier(char* smem, int which) { return smem + barriers + which * 8; }
    static PM_DEV void wait(char* smem, int which, u32 phase) { pm_mbar_wait(barrier(smem, which), phase & 1); }
    static PM_DEV void wait_slot(char* smem, int which, u32 turn) { wait(smem, which + int(turn & 1), turn >> 1); }
    // What this thread did so far is seen by who waits. (One lane for its warp, after a barrier of the warp, is no faster, and
    // compute-sanitizer does not understand it.)
    static PM_DEV void arrive(char* smem, int which) { pm_mbar_arrive(barrier(smem, which)); }

    static PM_DEV void fill(const DecodeParams& params, Slot& slot, bool more, Segment s) {
        const bool bad = more && s.bad;
        if (bad) report(params.status, s.req);
        // With nowhere to put a partial result, the request becomes NaN.
        if (s.slot >= params.slots) s.slot = -1;
        slot.segment = s;
        slot.more = more;
        slot.bad = bad;
    }

    // One token of a tile, of a thread that has one.
    struct Token {
        int half, place;        // place: in the tile
        bool mine;              // or this thread has none
        PM_DEV Token() {
            const int warp = (pm_thread() - COPY_FIRST) / 32, lane = pm_thread() % 32;
            half = lane / 8 % 2;
            place = half * (C::N / 2) + warp * 8 + lane % 8;
            mine = lane < 16;
        }
        // In the sequence; past the longest of all this wraps, which the unsigned comparisons with `last` take for the end.
        PM_DEV u32 of(const Work& w, int tile) const { return u32(w.first) + u32(tile) * C::N + u32(place); }
    };
    static_assert(COPY_THREADS / 32 * 8 == C::N / 2, "every token has a thread");

    // This thread's entry of the block table, for a tile; 0 where it has no token there.
    static PM_DEV int look_up(const DecodeParams& params, int req, const Work& w, int tile) {
        const u32 tok = Token().of(w, tile);
        if (tile >= w.tiles || tok >= u32(w.last)) return 0;
        return params.block_table[i64(req) * params.block_table_stride_b + page_index(params, int(tok))];
    }

    // What a copying thread finds out by itself, because everybody waits for its first copy: the first segment, and the table entry
    // of this thread's token.
    struct Start {
        int more, req, entry;
        Work work;
    };

    // Before anything else. The first segment is known to all afterwards.
    static PM_DEV Start begin(const DecodeParams& params, int part, char* smem) {
        Segment first = {};
        bool more = false;
        if (pm_thread() >= COPY_FIRST) {
            SegmentWalk here;
            here.begin(params, part);
            prefetch_table(params, part, pm_thread() - COPY_FIRST);
            more = here.next(params, first);
            if (pm_thread() == COPY_FIRST) {
                fill(params, slot_of(smem, 0), more, first);
                walk(smem) = here;
            }
        }
        const Work work(first);
        const Start start = {more, first.req, more ? look_up(params, first.req, work, 0) : 0, work};
        // By one lane of a warp: the instruction takes one address, and for the lanes' many there would be a loop over them.
        if (pm_thread() >= QK_FIRST && pm_thread() < COPY_FIRST && pm_thread() % 32 == 0) {
#pragma unroll 1
            for (int i = (pm_thread() - QK_FIRST) / 32; i < BARRIERS; i += QK_THREADS / 32) pm_mbar_init(barrier(smem, i), arrivals(i));
            pm_mbar_init_done();
        }
        pm_sync();
        if (pm_thread() == COPY_FIRST) pm_mbar_arrive(barrier(smem, SEGMENT));
        return start;
    }

    // Q of the first segment, by COPY_THREADS that have nothing else to do yet.
    static PM_DEV void first_q(const DecodeParams& params, int kv_head, int row0, char* smem) {
        const Slot& slot = slot_of(smem, 0);
        if (!slot.more || Work(slot.segment).tiles == 0) return;
        load_q<C, COPY_THREADS>(params, slot.segment.req, kv_head, row0, 0, smem, true);
        pm_copy_arrive(barrier(smem, Q_FULL));
    }

    // ---- copies ------------------------------------------------------------------------------------
    // `entry`: this thread's of the first tile.
    static PM_DEV void copy_tiles(const DecodeParams& params, int req, const Work& w, int entry, u32 done, int kv_head, int* bad,
                                  char* smem) {
        const Token token;
#pragma unroll 1
        for (int tile = 0; tile < w.tiles; ++tile) {
            const u32 count = done + u32(tile), tok = token.of(w, tile);
            const int stage = int(count & 1);
            bool valid = tok < u32(w.last);
            if (valid && u32(entry) >= u32(params.num_pages)) {
                *bad = 1;
                report(params.status, req);
                valid = false;
            }
            const int place = valid ? int(tok) - page_index(params, int(tok)) * params.page_size : 0;
            const RowParts<C::DV> row = kv_row<C>(params, valid ? entry : 0, place, valid ? kv_head : 0);
            // Each copy is some 60 cycles of this warp's, so that a row in one piece is one.
            const bool whole = C::DK == C::DV || row.pe == row.nope + C::DV;
            const int first_bytes = whole ? C::DK * 2 : C::DV * 2;
            // All that can be done before the room is free is: it is the way from there that P V waits for.
            if (count > 1 && valid && token.mine) {
                pm_bulk_prefetch(row.nope, first_bytes);
                if (!whole) pm_bulk_prefetch(row.pe, (C::DK - C::DV) * 2);
            }
            char* to = smem + kv + stage * STAGE_BYTES + token.place * ROW_BYTES;
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
                if (count > 1) wait(smem, EMPTY + stage * 2 + half, (count >> 1) - 1);
                if (token.half != half || !token.mine) continue;
                char* full = barrier(smem, FULL + stage * 2 + half);
                if (valid) {
                    pm_mbar_arrive_expect(full, C::DK * 2);
                    pm_bulk_copy(to, row.nope, first_bytes, full);
                    if (!whole) pm_bulk_copy(to + C::DV * 2, row.pe, (C::DK - C::DV) * 2, full);
                } else {
                    for (int i = 0; i < C::U; ++i) *reinterpret_cast<Words4*>(to + i * 16) = Words4{{0, 0, 0, 0}};
                    pm_fence_bulk();    // this thread's next copy goes to the same place
                    pm_mbar_arrive(full);
                }
            }
            entry = look_up(params, req, w, tile + 1);      // behind the copy: the way to a segment's first one is everybody's
        }
    }

    static PM_DEV void copy_role(const DecodeParams& params, const Start& start, int kv_head, int row0, char* smem) {
        u32 done = 0, loads = 0;            // tiles, and segments with keys, of the segments before
        for (u32 turn = 0;; ++turn) {
            Slot& slot = slot_of(smem, turn);
            if (turn > 0 && pm_thread() == COPY_FIRST) {
                if (turn > 1) wait_slot(smem, STORED, turn - 2);
                Segment next = {};
                const bool more = walk(smem).next(params, next);
                fill(params, slot, more, next);
                pm_mbar_arrive(barrier(smem, SEGMENT + int(turn & 1)));
            }
            if (turn > 0) wait_slot(smem, SEGMENT, turn);
            if (turn > 0 ? !slot.more : !start.more) {
                pm_grid_release();      // not before: blocks that wait for this one take a multiprocessor
                return;
            }
            int req = start.req, entry = start.entry;
            Work w = start.work;
            if (turn > 0) {
                req = slot.segment.req;
                w = Work(slot.segment);
                entry = look_up(params, req, w, 0);
            }
            if (w.tiles > 0) {
                if (turn > 0) {             // the first segment's is others'
                    if (loads > 0) wait(smem, Q_EMPTY, loads - 1);
                    load_q<C, COPY_THREADS>(params, req, kv_head, row0, 0, smem, true);
                    pm_copy_arrive(barrier(smem, Q_FULL));
                }
                ++loads;
                copy_tiles(params, req, w, entry, done, kv_head, &slot.bad, smem);
                done += u32(w.tiles);
            }
            arrive(smem, LOADED + int(turn & 1));
        }
    }
};

}  // namespace polymla
