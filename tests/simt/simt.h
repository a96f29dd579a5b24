// A block of GPU threads on one CPU thread: every GPU thread is a fiber, barriers and warp-wide instructions are the
// points where fibers switch.
//
// What it is strict about, so that a kernel that passes here does not depend on luck:
//   - a barrier that not all threads of the block reach, or that they reach at different places, aborts the process;
//   - so does a warp-wide instruction that not all lanes of its group reach at the same place;
//   - fibers run in a pseudo-random order, so that a missing barrier shows as a wrong result;
//   - an asynchronous copy lands when it is waited for, never before, and its target is poison until then;
//   - a thread that arrives twice in one phase of a barrier in shared memory, which is then over too early, aborts;
//   - shared memory is exactly as large as asked for, starts as poison, and has a guard behind it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

int thread();
int block();
char* shared();

// All threads of the block.
void barrier(const char* file, int line);

// All `width` lanes of this thread's group of neighbours. The last one to arrive calls `op` with every lane's record.
typedef void (*Op)(void** lanes);
void collective(int width, Op op, void* mine, const char* file, int line);

// A barrier in shared memory whose phases complete by `arrivals` arrivals each; 8 bytes stand for it. The copies of
// the threads that arrive with theirs (`copies`) land when the phase completes, not before.
void phase_init(char* at, int arrivals);
void phase_arrive(char* at, bool copies, const char* file, int line);
// As an arrival without copies; the phase also waits until copies of so many bytes were counted for it.
void phase_arrive_expect(char* at, int bytes, const char* file, int line);
void phase_wait(char* at, unsigned parity, const char* file, int line);

// `bytes` from `src`, which count for the phase of a barrier and land when it completes. All are multiples of 16.
void bulk_copy(char* dst, const void* src, int bytes, char* at, const char* file, int line);

// 16 bytes from `src`, or zeros.
void copy16(char* dst, const void* src, bool valid);
void copy_commit();
void copy_wait(int pending);

struct Launch {
    unsigned grid, threads, shared_bytes;
    uint64_t seed;
    void (*kernel)(const void* params);
    const void* params;
};
// Runs every block; returns nothing but when all is well.
void launch(const Launch& launch);

}  // namespace simt
