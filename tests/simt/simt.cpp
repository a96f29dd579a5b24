#include "simt.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "fiber.h"

namespace simt {
namespace {

constexpr size_t STACK = 256 * 1024;
constexpr size_t GUARD = 4096;
constexpr unsigned char POISON = 0xff;      // NaN in every floating type

struct Copy {
    char* dst;
    const void* src;
    bool valid;
};

struct Fiber : FiberStack {
    std::vector<std::vector<Copy>> groups;  // committed, oldest first; the last one is open
};

// Lanes that wait at one place.
struct Meeting {
    Op op = nullptr;
    const char* file = nullptr;
    int line = 0, arrived = 0;
    std::vector<void*> records;
    std::vector<int> lanes;
};

struct Phase {
    int arrivals = 0, arrived = 0;
    long long bytes = 0;        // expected and not yet counted
    unsigned parity = 0;
    std::vector<Copy> copies;
    std::vector<int> waiting;
    std::set<int> who;          // arrived in this phase
};

struct Block {
    const Launch* launch = nullptr;
    int index = 0, current = 0, finished = 0;
    uint64_t random = 1;
    std::vector<Fiber> fibers;
    std::vector<int> ready;
    Meeting barrier;
    std::vector<Meeting> halves, warps;     // groups of 32 lanes, and of more
    std::map<char*, Phase> phases;
    std::vector<char> memory;
    char* shared = nullptr;
    jmp_buf scheduler;
};

thread_local Block* here = nullptr;

[[noreturn]] void die(const char* what, const char* file, int line) {
    std::fprintf(stderr, "simt: %s: block %d thread %d at %s:%d\n", what, here->index, here->current, file, line);
    std::fflush(stderr);
    std::abort();
}

void leave() { here->fibers[here->current].leave(here->scheduler); }

void enter() {
    Block& b = *here;
    b.launch->kernel(b.launch->params);
    b.fibers[b.current].done = true;
    ++b.finished;
    if (b.barrier.arrived > 0) die("divergent barrier: a thread ended while others wait", b.barrier.file, b.barrier.line);
    _longjmp(b.scheduler, 1);
}

// Puts the current thread into a meeting; true when it is complete, which is then empty again.
bool arrive(Meeting& m, int expected, Op op, void* mine, int slot, const char* file, int line, const char* what) {
    Block& b = *here;
    if (m.arrived == 0) {
        m.op = op;
        m.file = file;
        m.line = line;
        m.records.assign(expected, nullptr);
        m.lanes.clear();
    } else if (m.op != op || m.line != line || std::strcmp(m.file, file) != 0) {
        std::fprintf(stderr, "simt: others wait at %s:%d\n", m.file, m.line);
        die(what, file, line);
    }
    m.records[slot] = mine;
    m.lanes.push_back(b.current);
    if (++m.arrived < expected) return false;
    m.arrived = 0;
    for (int lane : m.lanes)
        if (lane != b.current) b.ready.push_back(lane);
    return true;
}

void run_block(Block& b) {
    b.finished = 0;
    b.ready.clear();
    b.phases.clear();
    const int n = int(b.launch->threads);
    for (int i = 0; i < n; ++i) {
        b.fibers[i].started = b.fibers[i].done = false;
        b.fibers[i].groups.assign(1, {});
        b.ready.push_back(i);
    }
    std::memset(b.memory.data(), POISON, b.memory.size());
    volatile int total = n;
    _setjmp(b.scheduler);
    if (b.finished < total) {
        if (b.ready.empty()) {
            const Meeting* m = b.barrier.arrived > 0 ? &b.barrier : nullptr;
            for (auto* groups : {&b.halves, &b.warps})
                for (const Meeting& g : *groups)
                    if (!m && g.arrived > 0) m = &g;
            die("divergent barrier or warp instruction: nobody can go on", m ? m->file : "?", m ? m->line : 0);
        }
        b.current = take_any(b.ready, b.random);
        b.fibers[b.current].resume(STACK, enter);
    }
    for (const Fiber& f : b.fibers)
        for (const auto& group : f.groups)
            if (!group.empty()) die("a thread ended with copies that nobody waited for", "?", 0);
    for (size_t i = b.launch->shared_bytes; i < b.launch->shared_bytes + GUARD; ++i)
        if (static_cast<unsigned char>(b.shared[i]) != POISON) die("a write past the end of shared memory", "?", int(i));
}

}  // namespace

int thread() { return here->current; }
int block() { return here->index; }
char* shared() { return here->shared; }

void barrier(const char* file, int line) {
    Block& b = *here;
    if (b.finished > 0) die("divergent barrier: a thread has ended before it", file, line);
    if (!arrive(b.barrier, int(b.launch->threads), nullptr, nullptr, b.current, file, line,
                "divergent barrier: threads wait at different places"))
        leave();
}

void collective(int width, Op op, void* mine, const char* file, int line) {
    Block& b = *here;
    auto& groups = width > 32 ? b.warps : b.halves;
    groups.resize(b.launch->threads / unsigned(width));
    Meeting& m = groups[b.current / width];
    if (arrive(m, width, op, mine, b.current % width, file, line, "divergent warp instruction"))
        op(m.records.data());
    else
        leave();
}

void copy16(char* dst, const void* src, bool valid) {
    std::memset(dst, POISON, 16);
    here->fibers[here->current].groups.back().push_back({dst, src, valid});
}

void land(const std::vector<Copy>& copies) {
    for (const Copy& c : copies) {
        if (c.valid)
            std::memcpy(c.dst, c.src, 16);
        else
            std::memset(c.dst, 0, 16);
    }
}

void phase_init(char* at, int arrivals) {
    if (here->phases.count(at)) die("a phase barrier is initialised twice", "?", 0);
    here->phases[at].arrivals = arrivals;
}

Phase& phase(char* at, const char* file, int line) {
    auto found = here->phases.find(at);
    if (found == here->phases.end()) die("no phase barrier was initialised here", file, line);
    return found->second;
}

// Ends a phase that has all its arrivals and bytes.
void complete(Phase& p) {
    if (p.arrived < p.arrivals || p.bytes != 0) return;
    p.who.clear();
    land(p.copies);
    p.copies.clear();
    p.arrived = 0;
    p.parity ^= 1;
    for (int other : p.waiting) here->ready.push_back(other);
    p.waiting.clear();
}

void phase_arrive(char* at, bool copies, const char* file, int line) {
    Block& b = *here;
    Phase& p = phase(at, file, line);
    for (auto& group : b.fibers[b.current].groups) {
        if (!copies) break;
        p.copies.insert(p.copies.end(), group.begin(), group.end());
        group.clear();
    }
    if (!p.who.insert(b.current).second) die("a thread arrives twice in one phase", file, line);
    ++p.arrived;
    complete(p);
}

void phase_arrive_expect(char* at, int bytes, const char* file, int line) {
    phase(at, file, line).bytes += bytes;
    phase_arrive(at, false, file, line);
}

void bulk_copy(char* dst, const void* src, int bytes, char* at, const char* file, int line) {
    const auto unaligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 != 0; };
    if (bytes % 16 != 0 || unaligned(dst) || unaligned(src)) die("a bulk copy that is not of whole 16 bytes", file, line);
    std::memset(dst, POISON, size_t(bytes));
    Phase& p = phase(at, file, line);
    for (int i = 0; i < bytes; i += 16) p.copies.push_back({dst + i, static_cast<const char*>(src) + i, true});
    p.bytes -= bytes;
    complete(p);
}

void phase_wait(char* at, unsigned parity, const char* file, int line) {
    Phase& p = phase(at, file, line);
    // The phase of this parity has ended when the current one has the other.
    while (p.parity == parity) {
        p.waiting.push_back(here->current);
        leave();
    }
}

void copy_commit() { here->fibers[here->current].groups.push_back({}); }

void copy_wait(int pending) {
    auto& groups = here->fibers[here->current].groups;
    const int ended = int(groups.size()) - 1 - pending;
    for (int i = 0; i < ended; ++i) land(groups[i]);
    if (ended > 0) groups.erase(groups.begin(), groups.begin() + ended);
}

void launch(const Launch& launch) {
    Block b;
    b.launch = &launch;
    b.random = launch.seed * 2 + 1;
    b.fibers = std::vector<Fiber>(launch.threads);
    b.memory.resize(launch.shared_bytes + GUARD + 128);
    b.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(b.memory.data()) + 127) / 128 * 128);
    here = &b;
    for (unsigned i = 0; i < launch.grid; ++i) {
        b.index = int(i);
        run_block(b);
    }
    here = nullptr;
}

}  // namespace simt
