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

    // A token's row of KV, of a thread that has one.
    struct KeyRow {
        const u16 *nope, *pe;
        bool there, invalid;    // invalid: the table's entry is
    };
    static PM_DEV KeyRow find_row(const DecodeParams& params, const Work& w, int tile, int entry, int kv_head) {
        const u32 tok = Token().of(w, tile);
        const bool inside = tok < u32(w.last), valid = inside && u32(entry) < u32(params.num_pages);
        const int place = valid ? int(tok) - page_index(params, int(tok)) * params.page_size : 0;
        const RowParts<C::DV> row = kv_row<C>(params, valid ? entry : 0, place, valid ? kv_head : 0);
        return {row.nope, row.pe, valid, inside && !valid};
    }
    static PM_DEV void copy_key(const KeyRow& row, int stage, char* smem) {
        const Token token;
        char* to = smem + kv + stage * STAGE_BYTES + token.place * ROW_BYTES;
        char* full = barrier(smem, FULL + stage * 2 + token.half);
        if (row.there) {
            pm_mbar_arrive_expect(full, C::DK * 2);
            // Each copy is some 60 cycles of this warp's, so that a row in one piece is one.
            const bool whole = is_whole(row);
            pm_bulk_copy(to, row.nope, whole ? C::DK * 2 : C::DV * 2, full);
            if (!whole) pm_bulk_copy(to + C::DV * 2, row.pe, (C::DK - C::DV) * 2, full);
        } else {
#pragma unroll 1
            for (int i = 0; i < C::U; ++i) *reinterpret_cast<Words4*>(to + i * 16) = Words4{{0, 0, 0, 0}};
            pm_fence_bulk();    // this thread's next copy goes to the same place
            pm_mbar_arrive(full);
        }
    }
    static PM_DEV bool is_whole(const KeyRow& row) { return C::DK == C::DV || row.pe == row.nope + C::DV; }
    static PM_DEV void tell(const DecodeParams& params, int req, int* bad) {
        *bad = 1;
        report(params.status, req);
    }

    // The first segment, as a copying thread knows it.
    struct Start {
        int more, req;
        Work work;
    };

    // Before anything else. Everybody waits for the first keys and Q, so whoever brings them finds the first segment by itself, has
    // addresses ready before the barriers are, and instructions that lie together: each jump to others costs as much as ten.
    static PM_DEV Start begin(const DecodeParams& params, int part, int kv_head, int row0, char* smem) {
        const bool copies = pm_thread() >= COPY_FIRST, brings_q = pm_thread() < COPY_THREADS;   // P V's warps are idle yet
        Segment first = {};
        bool more = false;
        if (copies || brings_q) {
            SegmentWalk here;
            here.begin(params, part);
            if (copies) prefetch_table(params, part, pm_thread() - COPY_FIRST);
            more = here.next(params, first);
            if (pm_thread() == 0) {
                fill(params, slot_of(smem, 0), more, first);
                walk(smem) = here;
            }
        }
        const Work work(first);
        KeyRow row = {};
        if (copies && more) {
            row = find_row(params, work, 0, look_up(params, first.req, work, 0), kv_head);
        } else if (brings_q && work.tiles > 0) {
            load_q<C, COPY_THREADS>(params, first.req, kv_head, row0, 0, smem, true);
        } else if (pm_thread() >= QK_FIRST && pm_thread() % 32 == 0) {
            // By one lane of a warp, each of which is a constant: for addresses of many lanes there would be a loop over them.
#pragma unroll
            for (int i = 0; i < BARRIERS; ++i)
                if (i % (QK_THREADS / 32) == (pm_thread() - QK_FIRST) / 32) pm_mbar_init(barrier(smem, i), arrivals(i));
            pm_mbar_init_done();
        }
        pm_sync();
        if (work.tiles > 0) {
            if (copies && Token().mine) {
                copy_key(row, 0, smem);
                if (row.invalid) tell(params, first.req, &slot_of(smem, 0).bad);
            } else if (brings_q) {
                pm_copy_arrive(barrier(smem, Q_FULL));
            }
        }
        if (pm_thread() == COPY_FIRST) pm_mbar_arrive(barrier(smem, SEGMENT));
        return {more, first.req, work};
    }

    // ---- copies ------------------------------------------------------------------------------------
    // From tile `tile` on.
    static PM_DEV void copy_tiles(const DecodeParams& params, int req, const Work& w, int tile, u32 done, int kv_head, int* bad,
                                  char* smem) {
        const Token token;
        int entry = look_up(params, req, w, tile);
#pragma unroll 1
        for (; tile < w.tiles; ++tile) {
            const u32 count = done + u32(tile);
            const int stage = int(count & 1);
            const KeyRow row = find_row(params, w, tile, entry, kv_head);
            if (row.invalid) tell(params, req, bad);
            // All that can be done before the room is free is: it is the way from there that P V waits for.
            if (count > 1 && row.there && token.mine) {
                pm_bulk_prefetch(row.nope, is_whole(row) ? C::DK * 2 : C::DV * 2);
                if (!is_whole(row)) pm_bulk_prefetch(row.pe, (C::DK - C::DV) * 2);
            }
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
                if (count > 1) wait(smem, EMPTY + stage * 2 + half, (count >> 1) - 1);
                if (count == 1) wait(smem, FULL + half, 0);     // or the first keys would share the way with these
                if (token.half == half && token.mine) copy_key(row, stage, smem);
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
            int req = start.req, tile = 1;      // its first tile is under way
            Work w = start.work;
            if (turn > 0) {
                req = slot.segment.req;
                w = Work(slot.segment);
                tile = 0;
            }
            if (w.tiles > 0) {
                if (turn > 0) {             // the first segment's is others'
                    if (loads > 0) wait(smem, Q_EMPTY, loads - 1);
                    load_q<C, COPY_THREADS>(params, req, kv_head, row0, 0, smem, true);
                    pm_copy_arrive(barrier(smem, Q_FULL));
                }
                ++loads;
                copy_tiles(params, req, w, tile, done, kv_head, &slot.bad, smem);
                done += u32(w.tiles);
            }
            arrive(smem, LOADED + int(turn & 1));
        }
    }
};

}  // namespace polymla
