// A thread of an emulated GPU, for the harness of the portable kernels (simt.cpp) and the emulator of the Hopper ones
// (tests/sm90): a stack of its own on one CPU thread, left and entered by setjmp; and the order in which they take turns.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

struct FiberStack {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
    std::unique_ptr<char[]> stack;

    // Goes on where it left, or begins with `entry`.
    [[noreturn]] void resume(size_t stack_bytes, void (*entry)()) {
        if (started) _longjmp(at, 1);
        started = true;
        getcontext(&start);
        if (!stack) stack.reset(new char[stack_bytes]);
        start.uc_stack.ss_sp = stack.get();
        start.uc_stack.ss_size = stack_bytes;
        start.uc_link = nullptr;
        makecontext(&start, entry, 0);
        setcontext(&start);
        __builtin_unreachable();
    }

    // Back to the scheduler, until it is resumed.
    void leave(jmp_buf& scheduler) {
        if (_setjmp(at) == 0) _longjmp(scheduler, 1);
    }
};

inline uint64_t next_random(uint64_t& state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

// Takes one out, whichever.
inline int take_any(std::vector<int>& ready, uint64_t& random) {
    const size_t pick = next_random(random) % ready.size();
    const int taken = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    return taken;
}

}  // namespace simt
