// One build of the portable kernels as a shared library that the test loads.
#include "portable.cu"

namespace {

using polymla::DecodeParams;
using polymla::ScheduleParams;

template <void (*KERNEL)(const DecodeParams)>
void decode_entry(const void* p) {
    KERNEL(*static_cast<const DecodeParams*>(p));
}
void schedule_entry(const void* p) { polymla_schedule(*static_cast<const ScheduleParams*>(p)); }

// What a barrier inside a divergent branch does: the test runs it in a child process and expects an abort.
void divergent_entry(const void*) {
    if (simt::thread() % 2 == 0) pm_sync();
}
void divergent_shuffle_entry(const void*) {
    using namespace polymla;
    if (simt::thread() % 32 != 3) (void)pm_shfl_xor(1.0f, 1);
}
// Threads that meet at two barriers of different places.
void crossed_entry(const void*) {
    if (simt::thread() < 32)
        pm_sync();
    else
        pm_sync();
}

void overrun_entry(const void*) {
    if (simt::thread() == 7) simt::shared()[3] = 1;     // launched with no shared memory
}
void unwaited_entry(const void*) {
    static const char source[16] = {};
    simt::copy16(simt::shared() + 256, source, true);   // the guard: the copy never lands, so nothing is written
}

void twice_entry(const void*) {
    char* at = simt::shared();
    if (simt::thread() == 0) simt::phase_init(at, 2);
    simt::barrier(__FILE__, __LINE__);
    if (simt::thread() == 1)
        for (int i = 0; i < 2; ++i) simt::phase_arrive(at, false, __FILE__, __LINE__);
}

template <class C>
constexpr unsigned total() {
    return C::total;
}

struct Kernel {
    const char* name;
    void (*entry)(const void*);
    unsigned shared_bytes, threads;
};

#if defined(PM_ROLES) && POLYMLA_SMEM_KIB >= 227
template <int DK>
constexpr Kernel with_roles(const char* name, void (*entry)(const void*)) {
    typedef typename polymla::ClassConfig<DK, 512, 64>::type C;
    return {name, entry, polymla::RoleShared<C>::total, polymla::RoleShared<C>::THREADS};
}
#define DECODE_64(ELEM, DK) \
    with_roles<DK>("polymla_decode_" #ELEM "_d" #DK "_m64", decode_entry<polymla_decode_##ELEM##_d##DK##_m64>),
#else
#define DECODE_64(ELEM, DK) DECODE(ELEM, DK, 64)
#endif

#define DECODE(ELEM, DK, M)                                                                            \
    {"polymla_decode_" #ELEM "_d" #DK "_m" #M, decode_entry<polymla_decode_##ELEM##_d##DK##_m##M>,     \
     total<polymla::ClassConfig<DK, 512, M>::type>(), 256},
#if POLYMLA_SMEM_KIB >= 163
#define DECODES(ELEM) DECODE(ELEM, 576, 16) DECODE(ELEM, 576, 32) DECODE_64(ELEM, 576) \
                      DECODE(ELEM, 512, 16) DECODE(ELEM, 512, 32) DECODE_64(ELEM, 512)
#elif POLYMLA_SMEM_KIB >= 99
#define DECODES(ELEM) DECODE(ELEM, 576, 16) DECODE(ELEM, 576, 32) DECODE(ELEM, 512, 16) DECODE(ELEM, 512, 32)
#else
#define DECODES(ELEM) DECODE(ELEM, 576, 16) DECODE(ELEM, 512, 16)
#endif
#ifdef PM_PIECES
#define MERGE(ELEM) {"polymla_merge_" #ELEM, decode_entry<polymla_merge_##ELEM>, sizeof(polymla::MergeSmem), polymla::MERGE_THREADS},
#else
#define MERGE(ELEM)
#endif
#define ALL(ELEM)                                                                                                  \
    DECODES(ELEM)                                                                                                  \
    {"polymla_generic_" #ELEM, decode_entry<polymla_generic_##ELEM>, sizeof(polymla::GenericSmem), 256},                \
    {"polymla_combine_" #ELEM, decode_entry<polymla_combine_##ELEM>, polymla::COMBINE_SMEM, 256},     \
    MERGE(ELEM)

const Kernel KERNELS[] = {
    ALL(bf16) ALL(f16)
    {"polymla_schedule", schedule_entry, polymla::SCHEDULE_SMEM, 256},
    {"divergent_barrier", divergent_entry, 0, 256},
    {"divergent_shuffle", divergent_shuffle_entry, 0, 256},
    {"crossed_barriers", crossed_entry, 0, 256},
    {"shared_overrun", overrun_entry, 0, 256},
    {"unwaited_copy", unwaited_entry, 0, 256},
    {"arrives_twice", twice_entry, 0, 256},
};

}  // namespace

// Runs a kernel; 1 where there is none of that name.
extern "C" int simt_launch(const char* name, unsigned grid, unsigned shared_bytes, const void* params, uint64_t seed) {
    for (const Kernel& k : KERNELS)
        if (std::strcmp(k.name, name) == 0) {
            simt::launch({grid, k.threads, shared_bytes, seed, k.entry, params});
            return 0;
        }
    return 1;
}

// Dynamic shared memory of a kernel, as the source computes it; the host's own formula is checked against this.
extern "C" unsigned simt_shared_bytes(const char* name) {
    for (const Kernel& k : KERNELS)
        if (std::strcmp(k.name, name) == 0) return k.shared_bytes;
    return 0;
}
