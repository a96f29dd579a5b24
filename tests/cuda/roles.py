"""A model of the Hopper decode kernel's roles: who waits for whom, in random order. Needs no GPU: python3 tests/cuda/roles.py

Every warp of backends/sm90/decode_*.h is a coroutine that waits, arrives and reads as its kernel code does; nothing is computed.
Random schedules make some warps much faster than others, as caches and fetching do on the card. A run fails when a warp reads a
segment record or a factor that is not its segment's, when a stage is filled under its reader, when a barrier gets one arrival too
many, and when no one can go on.

FAULTS are planted one at a time and have to be found. The first is one that the kernel had: with more segments without keys in a
row than there are records it ended in an illegal instruction.
"""
import random
import sys

SEGMENTS, STAGES, READERS = 4, 3, 15
FAULTS = ("records counted by P V alone", "factors written without waiting", "stage given back by one half",
          "last stage given back before O has gone through it")


class Barrier:
    """An mbarrier: phases of `count` arrivals."""

    def __init__(self, count):
        self.count = self.pending = count
        self.phase = 0

    def arrive(self):
        assert self.phase >= 0 and self.pending > 0, "an arrival too many"
        self.pending -= 1
        if self.pending == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def done(self, parity):
        return self.phase & 1 != parity


class Ring:
    """tile.h's Ring: a stage and the parity of its turn."""

    def __init__(self):
        self.turn = 0

    def at(self):
        return self.turn % STAGES, self.turn // STAGES & 1

    def advance(self):
        self.turn += 1


class Cta:
    def __init__(self, segments, fault, rng):
        self.segments, self.fault, self.rng = segments, fault, rng      # blocks of each segment
        self.whole = [rng.random() < 0.5 for _ in segments]     # not a piece: O goes out by way of the last block's place
        self.records = [None] * SEGMENTS
        self.record_full = [Barrier(1) for _ in range(SEGMENTS)]
        self.record_empty = [Barrier(8 if fault == FAULTS[0] else READERS) for _ in range(SEGMENTS)]
        self.factors = [None] * 4       # each Q K^T warp writes those of its rows
        self.inv_full, self.inv_empty = Barrier(4), Barrier(8)
        self.content = [[None] * STAGES for _ in range(2)]      # turns
        self.full = [[Barrier(1) for _ in range(STAGES)] for _ in range(2)]
        self.empty = [[Barrier(4 * (side + 1)) for _ in range(STAGES)] for side in range(2)]
        self.full_q, self.done_q = Barrier(1), Barrier(4)
        self.full_tail, self.empty_tail = [Barrier(1), Barrier(1)], [Barrier(8), Barrier(8)]
        self.p_full, self.gate = [Barrier(4), Barrier(4)], [Barrier(1), Barrier(1)]
        self.at_named, self.named = 0, 0

    def record(self, segment):
        """Reads the record: it has to be this segment's."""
        assert self.records[segment % SEGMENTS][0] == segment, f"segment {segment}: {self.records[segment % SEGMENTS]}"
        return self.records[segment % SEGMENTS][1]

    def walker(self):
        for segment in range(len(self.segments) + 1):
            at = segment % SEGMENTS
            while not self.record_empty[at].done(segment // SEGMENTS & 1 ^ 1):
                yield
            self.records[at] = (segment, self.segments[segment] if segment < len(self.segments) else None)
            yield
            self.record_full[at].arrive()
            yield

    def wait_segment(self, segment):
        while not self.record_full[segment % SEGMENTS].done(segment // SEGMENTS & 1):
            yield
        yield
        return self.record(segment)

    def leave(self, segment, pv=False):
        self.record(segment)
        if pv or self.fault != FAULTS[0]:
            self.record_empty[segment % SEGMENTS].arrive()

    def named_barrier(self):
        at, self.at_named = self.named, self.at_named + 1
        if self.at_named == 4:
            self.at_named, self.named = 0, self.named + 1
        while self.named == at:
            yield

    def side_loader(self, side):
        ring, segment = Ring(), 0
        while (blocks := (yield from self.wait_segment(segment))) is not None:
            for _ in range(blocks + 1 if blocks else 0):       # Q first, as if it were a block
                self.record(segment)
                if ring.turn == 0:      # the late loader brings a part's first
                    ring.advance()
                    continue
                stage, parity = ring.at()
                while not self.empty[side][stage].done(parity ^ 1):
                    yield
                yield
                self.content[side][stage] = ring.turn
                self.full[side][stage].arrive()
                ring.advance()
                yield
            self.leave(segment)
            segment += 1

    def late_loader(self):
        item = segment = 0
        first = True
        while (blocks := (yield from self.wait_segment(segment))) is not None:
            while not self.done_q.done(segment & 1 ^ 1):
                yield
            self.record(segment)
            for side in range(2 if blocks and first else 0):
                self.content[side][0] = 0
                self.full[side][0].arrive()
                yield
            first = first and not blocks
            self.full_q.arrive()
            yield
            for _ in range(blocks):
                self.record(segment)
                while not self.empty_tail[item & 1].done(item >> 1 & 1 ^ 1):
                    yield
                yield
                self.full_tail[item & 1].arrive()
                item += 1
                yield
            self.leave(segment)
            segment += 1

    def landed(self, ring):
        stage, parity = ring.at()
        return self.full[0][stage].done(parity) and self.full[1][stage].done(parity)

    def hand_over(self, warp, item, gate):
        self.p_full[item & 1].arrive()
        if gate and warp == 0:
            self.gate[item & 1].arrive()

    def qk(self, warp):
        ring, item, segment = Ring(), 0, -1
        while (blocks := (yield from self.wait_segment(segment := segment + 1))) is not None:
            if blocks == 0:
                while not self.full_q.done(segment & 1):
                    yield
                yield from self.end(warp, segment)
                continue
            while not self.landed(ring):
                yield
            yield
            stage, _ = ring.at()
            self.empty[0][stage].arrive()
            self.empty[1][stage].arrive()
            self.empty[1][stage].arrive()
            while not self.full_q.done(segment & 1):
                yield
            yield from self.named_barrier()
            ring.advance()
            gated = False
            for left in range(blocks, 0, -1):
                while not gated and not self.landed(ring):
                    yield
                yield
                if gated:
                    self.hand_over(warp, item - 1, False)
                    yield
                ring.advance()
                landed = self.landed(ring)      # a first look; each warp for itself
                while not self.full_tail[item & 1].done(item >> 1 & 1):
                    yield
                yield
                if gated and warp == 0:
                    self.gate[item - 1 & 1].arrive()
                yield
                self.record(segment)
                yield from self.named_barrier()
                item += 1
                gated = left > 1 and (landed or self.landed(ring))
                if not gated:
                    self.hand_over(warp, item - 1, True)
                yield
            yield from self.end(warp, segment)

    def end(self, warp, segment):
        self.done_q.arrive()
        yield
        while self.fault != FAULTS[1] and not self.inv_empty.done(segment & 1 ^ 1):
            yield
        self.factors[warp] = segment
        yield
        self.inv_full.arrive()
        yield
        self.leave(segment)
        for _ in range(self.rng.randrange(40)):     # lse
            yield

    def pv(self, warp):
        ring, item, segment = Ring(), 0, 0
        while (blocks := (yield from self.wait_segment(segment))) is not None:
            if blocks:
                ring.advance()      # Q had that turn
            held = bool(blocks) and self.whole[segment]
            for left in range(blocks, 0, -1):
                while not self.p_full[item & 1].done(item >> 1 & 1):
                    yield
                yield
                while not self.gate[item & 1].done(item >> 1 & 1):
                    yield
                yield
                self.record(segment)
                if not (held and left == 1 and warp >= 4):
                    self.empty_tail[item & 1].arrive()
                yield
                if not (held and left == 1):
                    self.release(warp, ring)
                ring.advance()
                item += 1
                yield
            yield from self.take_factors(warp, segment)
            self.leave(segment, pv=True)
            self.inv_empty.arrive()
            if held:
                last = Ring()
                last.turn = ring.turn - 1
                if self.fault == FAULTS[3]:
                    self.release(warp, last)
                for _ in range(self.rng.randrange(10)):     # O to its place and out
                    yield
                    assert self.content[warp >= 4][last.at()[0]] == last.turn, f"segment {segment}: O's place is filled again"
                if warp >= 4:
                    self.empty_tail[item - 1 & 1].arrive()
                if self.fault != FAULTS[3]:
                    self.release(warp, last)
            for _ in range(self.rng.randrange(10)):     # O
                yield
            segment += 1

    def take_factors(self, warp, segment):
        while not self.inv_full.done(segment & 1):
            yield
        found = self.factors[warp % 4]
        assert found == segment, f"segment {segment} has the factors of {found}"

    def release(self, warp, ring):
        stage, _ = ring.at()
        if warp < 4:
            self.empty[0][stage].arrive()
        if warp < 4 or self.fault != FAULTS[2]:
            self.empty[1][stage].arrive()

    def run(self):
        warps = [self.walker(), self.side_loader(0), self.side_loader(1), self.late_loader()]
        warps += [self.qk(w) for w in range(4)] + [self.pv(w) for w in range(8)]
        speeds = {id(w): self.rng.choice((1, 1, 1, 5, 20)) for w in warps}
        turns = 0
        while warps:
            warp = self.rng.choice(warps)
            try:
                for _ in range(speeds[id(warp)]):
                    next(warp)
            except StopIteration:
                warps.remove(warp)
            turns += 1
            assert turns < 200_000, f"{len(warps)} warps wait for ever"


def wrong(fault, runs):
    """How many of so many random parts go wrong, and how the first did."""
    found = []
    for seed in range(runs):
        rng = random.Random(seed)
        segments = [0, 0, 0, 0, 2] if seed == 0 else [rng.choice((0, 0, 0, 1, 2, 5)) for _ in range(rng.randrange(1, 14))]
        try:
            Cta(segments, fault, rng).run()
        except AssertionError as e:
            found.append(f"{segments}: {e}")
    return found


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    found = wrong(None, runs)
    print(f"the kernel's roles: {len(found)} of {runs} random parts go wrong", *found[:3], sep="\n  ")
    missed = 0
    for fault in FAULTS:
        # A fault that lets no one go on takes long to show.
        some = wrong(fault, 10 if fault == FAULTS[2] else 40)
        print(f"planted, {fault}: found in {len(some)} runs")
        missed += not some
    return 1 if found or missed else 0


if __name__ == "__main__":
    sys.exit(main())
