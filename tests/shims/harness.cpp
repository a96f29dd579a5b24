// A vendor's driver and run-time compiler on the fiber harness: exports the functions that the driver table names, under the
// vendor's names, over this process's memory and tests/simt. Test-only. It proves the host's calls and their arguments, not
// the vendor's ABI.
//
// Strict where a driver would be lenient: memory starts as NaN, copies must stay inside one allocation, handles must be
// live, and the compiler looks at its options. One call of a test's choice can be made to fail.
//
// A header that mod.rs writes of the vendor's file is included by the command line:
//   SHIM_alloc, SHIM_RTC_log, ...     the names
//   SHIM_WARP, SHIM_SHARED_KIB, SHIM_MAJOR, SHIM_MINOR         the device; the last two of its compute capability
//   SHIM_WARP_ATTRIBUTE, SHIM_MAJOR_ATTRIBUTE, ...             numbers of attributes
//   SHIM_PROPERTIES_BYTES, SHIM_ARCH_AT, SHIM_ARCH_NAME        the struct of properties, where an architecture is said by that
//   SHIM_HOST_FLAGS, SHIM_ARCH_OPTION                          what a host allocation and a compilation must ask for
//   SHIM_CONTEXTS          defined where contexts are made current, as by CUDA's driver
//   SHIM_NO_COMPILER       defined where there is no run-time compiler
//   SHIM_NVIDIA            defined where this is libcuda and NVRTC, for forward/ to load
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

extern "C" int simt_launch(const char* name, unsigned grid, unsigned shared_bytes, const void* params, uint64_t seed);
extern "C" unsigned simt_shared_bytes(const char* name);

#define API extern "C" __attribute__((visibility("default")))
#define SHIM(name) SHIM_##name
#define SHIM_RTC(name) SHIM_RTC_##name

namespace {
constexpr int INVALID = 1, NO_DEVICE = 100, NOT_FOUND = 500;
const char CODE[64] = "\x7f" "ELF kernels of the fiber harness";

std::mutex lock;
std::map<char*, size_t> allocations;
std::set<std::string> functions;
#ifdef SHIM_NVIDIA
std::set<std::string> allowed;
#endif
std::set<void*> modules, handles;
thread_local int current = 0;
uint64_t launches = 0;

int allocate(void** out, size_t bytes) {
    std::lock_guard<std::mutex> hold(lock);
    char* p = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset(p, 0xff, bytes);
    allocations[p] = bytes;
    *out = p;
    return 0;
}
int release(void* p) {
    std::lock_guard<std::mutex> hold(lock);
    if (!allocations.erase(static_cast<char*>(p))) return INVALID;
    std::free(p);
    return 0;
}
bool inside(void* p, size_t bytes) {
    std::lock_guard<std::mutex> hold(lock);
    auto next = allocations.upper_bound(static_cast<char*>(p));
    if (next == allocations.begin()) return false;
    --next;
    return static_cast<char*>(p) + bytes <= next->first + next->second;
}
int make(void** out, std::set<void*>& kind) {
    std::lock_guard<std::mutex> hold(lock);
    *out = std::malloc(1);
    kind.insert(*out);
    return 0;
}
int drop(void* p, std::set<void*>& kind) {
    std::lock_guard<std::mutex> hold(lock);
    if (!kind.erase(p)) return INVALID;
    std::free(p);
    return 0;
}
bool stream_lives(void* s) {
    std::lock_guard<std::mutex> hold(lock);
    return !s || handles.count(s);
}
// Calls until one fails; below 0, none does. Calls that give something back never fail: nobody could do anything about it.
int calls_left = -1;
const char* failed = "";
bool fails(const char* call) {
    std::lock_guard<std::mutex> hold(lock);
    if (calls_left < 0 || calls_left-- != 0) return false;
    failed = call;
    return true;
}
}  // namespace
#define FAULT if (fails(__func__)) return INVALID;

// This is not the vendor's library: what runs through it proves tier T3.
API int polymla_stand_in_tier() { return 3; }

// For tests: lets the call after this many fail, says which it was, and counts what was made and not given back.
API void polymla_stand_in_fail_after(int calls) { calls_left = calls, failed = ""; }
API int polymla_stand_in_left() { return calls_left; }
API const char* polymla_stand_in_failed() { return failed; }
API size_t polymla_stand_in_alive() { return allocations.size() + modules.size() + handles.size(); }

namespace {
const char* name_of(int code) { return code == INVALID ? "InvalidValue" : "OtherError"; }
const char* words_of(int code) { return code == INVALID ? "invalid argument" : "another error"; }
}  // namespace
#ifdef SHIM_CONTEXTS
API int SHIM(error_name)(int code, const char** words) { return *words = name_of(code), 0; }
API int SHIM(error_string)(int code, const char** words) { return *words = words_of(code), 0; }
#else
API const char* SHIM(error_name)(int code) { return name_of(code); }
API const char* SHIM(error_string)(int code) { return words_of(code); }
#endif
API int SHIM(init)(unsigned flags) { FAULT return flags ? INVALID : 0; }
API int SHIM(version)(int* v) { FAULT return *v = 60000000, 0; }
API int SHIM(device_count)(int* n) { FAULT return *n = 2, 0; }
#ifdef SHIM_CONTEXTS
// Devices are not their ordinals here, and a context is made of its device; none is current at first.
API int SHIM(device_get)(int* d, int ordinal) { FAULT return ordinal < 0 || ordinal > 1 ? INVALID : (*d = ordinal + 10, 0); }
API int SHIM(retain_context)(void** context, int d) { FAULT
    return d < 10 || d > 11 ? INVALID : (*context = reinterpret_cast<void*>(uintptr_t(d)), 0);
}
API int SHIM(get_context)(void** context) { FAULT return *context = reinterpret_cast<void*>(uintptr_t(current)), 0; }
API int SHIM(set_context)(void* context) { FAULT return current = int(reinterpret_cast<uintptr_t>(context)), 0; }
constexpr int FIRST = 10;
#else
API int SHIM(get_device)(int* d) { FAULT return *d = current, 0; }
API int SHIM(set_device)(int d) { FAULT return d < 0 || d > 1 ? INVALID : (current = d, 0); }
constexpr int FIRST = 0;
#endif
API int SHIM(device_attribute)(int* value, int attribute, int device) { FAULT
    device -= FIRST;
    if (device < 0 || device > 1) return INVALID;
    // Device 0 has waves that the kernels are not for: the host must pass it over.
    switch (attribute) {
        case SHIM_WARP_ATTRIBUTE: return *value = device == 0 ? 16 : SHIM_WARP, 0;
        case SHIM_SHARED_ATTRIBUTE: return *value = SHIM_SHARED_KIB * 1024, 0;
        case SHIM_PROCESSORS_ATTRIBUTE: return *value = 4, 0;
    }
#ifdef SHIM_MAJOR_ATTRIBUTE
    if (attribute == SHIM_MAJOR_ATTRIBUTE) return *value = SHIM_MAJOR, 0;
    if (attribute == SHIM_MINOR_ATTRIBUTE) return *value = SHIM_MINOR, 0;
#endif
    return INVALID;
}
API int SHIM(device_name)(char* name, int length, int device) { FAULT
    if (device < FIRST || device > FIRST + 1) return INVALID;
    std::snprintf(name, size_t(length), "fiber harness %d", device - FIRST);
    return 0;
}
#ifdef SHIM_PROPERTIES_BYTES
API int SHIM(device_properties)(void* properties, int) { FAULT
    std::memset(properties, 0, SHIM_PROPERTIES_BYTES);
    std::strcpy(static_cast<char*>(properties) + SHIM_ARCH_AT, SHIM_ARCH_NAME);
    return 0;
}
#endif
API int SHIM(alloc)(void** p, size_t bytes) { FAULT return current == FIRST + 1 ? allocate(p, bytes) : NO_DEVICE; }
API int SHIM(free)(void* p) { return release(p); }
API int SHIM(host_alloc)(void** p, size_t bytes, unsigned flags) { FAULT return flags == SHIM_HOST_FLAGS ? allocate(p, bytes) : INVALID; }
API int SHIM(host_address)(void** out, void* p, unsigned flags) { FAULT return flags ? INVALID : (*out = p, 0); }
API int SHIM(host_free)(void* p) { return release(p); }
API int SHIM(copy_to_device)(void* to, void* from, size_t n) { FAULT return inside(to, n) ? std::memcpy(to, from, n), 0 : INVALID; }
API int SHIM(copy_to_host)(void* to, void* from, size_t n) { FAULT return inside(from, n) ? std::memcpy(to, from, n), 0 : INVALID; }
API int SHIM(copy_on_device)(void* to, void* from, size_t n, void* stream) { FAULT
    return inside(to, n) && inside(from, n) && stream_lives(stream) ? std::memcpy(to, from, n), 0 : INVALID;
}
API int SHIM(fill_bytes)(void* to, unsigned char value, size_t n, void* stream) { FAULT
    return inside(to, n) && stream_lives(stream) ? std::memset(to, value, n), 0 : INVALID;
}
API int SHIM(fill_words)(void* to, int value, size_t n, void* stream) { FAULT
    if (!inside(to, 4 * n) || !stream_lives(stream)) return INVALID;
    for (size_t i = 0; i < n; ++i) static_cast<int*>(to)[i] = value;
    return 0;
}
API int SHIM(synchronize)() { FAULT return 0; }
API int SHIM(stream_create)(void** s, unsigned flags) { FAULT return flags ? INVALID : make(s, handles); }
API int SHIM(stream_destroy)(void* s) { return drop(s, handles); }
API int SHIM(stream_synchronize)(void* s) { FAULT return stream_lives(s) ? 0 : INVALID; }
API int SHIM(event_create)(void** e, unsigned flags) { FAULT return flags ? INVALID : make(e, handles); }
API int SHIM(event_destroy)(void* e) { return drop(e, handles); }
API int SHIM(event_record)(void* e, void* s) { FAULT return e && stream_lives(e) && stream_lives(s) ? 0 : INVALID; }
API int SHIM(event_synchronize)(void* e) { FAULT return e && stream_lives(e) ? 0 : INVALID; }
API int SHIM(event_elapsed)(float* ms, void* a, void* b) { FAULT
    return a && b && stream_lives(a) && stream_lives(b) ? (*ms = 1.5f, 0) : INVALID;
}
API int SHIM(module_load)(void** m, const void* image) { FAULT
    return std::memcmp(image, CODE, sizeof CODE) == 0 ? make(m, modules) : INVALID;
}
API int SHIM(module_unload)(void* m) { return drop(m, modules); }
API int SHIM(module_function)(void** f, void* m, const char* name) { FAULT
    std::lock_guard<std::mutex> hold(lock);
    if (!modules.count(m) || !simt_shared_bytes(name)) return NOT_FOUND;
    *f = const_cast<char*>(functions.insert(name).first->c_str());
    return 0;
}
API int SHIM(launch)(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void* stream, void** params, void** extra) { FAULT
    const char* name = static_cast<const char*>(f);
    if (!gx || gy != 1 || gz != 1 || bx != 256 || by != 1 || bz != 1 || extra || !stream_lives(stream)) return INVALID;
    if (shared > SHIM_SHARED_KIB * 1024 || shared < simt_shared_bytes(name)) return INVALID;
    std::lock_guard<std::mutex> hold(lock);
#ifdef SHIM_NVIDIA
    if (shared > 48 * 1024 && !allowed.count(name)) return INVALID;
#endif
    return simt_launch(name, gx, shared, params[0], ++launches);
}

#ifdef SHIM_NVIDIA
// A kernel must be allowed more shared memory than 48 KiB: MAX_DYNAMIC_SHARED_SIZE_BYTES.
API int cuFuncSetAttribute(void* f, int attribute, int value) {
    if (attribute != 8 || value != SHIM_SHARED_KIB * 1024) return INVALID;
    std::lock_guard<std::mutex> hold(lock);
    return allowed.insert(static_cast<char*>(f)), 0;
}
#endif

#ifndef SHIM_NO_COMPILER
// The compiler: takes the source for what it is by its options, and counts how often it was asked.
API const char* SHIM_RTC(error_string)(int) { return "compilation failed"; }
API int SHIM_RTC(version)(int* major, int* minor) { FAULT return *major = 1, *minor = 2, 0; }
API int SHIM_RTC(create)(void** p, const char* text, const char* name, int headers, const char**, const char**) { FAULT
    if (headers || std::strstr(text, "#include \"") || std::strcmp(name, "portable.cu")) return INVALID;
#ifdef SHIM_NVIDIA
    // What stands before the vendor's source ends with a line that numbers the others as they were.
    if (!std::strstr(text, "\n#line 1\n")) return INVALID;
#endif
    return make(p, handles);
}
API int SHIM_RTC(compile)(void*, int count, const char** options) { FAULT
    bool arch = false, smem = false;
    for (int i = 0; i < count; ++i) {
        arch |= !std::strncmp(options[i], SHIM_ARCH_OPTION, std::strlen(SHIM_ARCH_OPTION));
        smem |= options[i] == "-DPOLYMLA_SMEM_KIB=" + std::to_string(POLYMLA_SMEM_KIB);
#ifdef SHIM_NVIDIA
        const bool known = !std::strncmp(options[i], "-D", 2) || !std::strncmp(options[i], "-std=", 5);
        if (!known && std::strcmp(options[i], SHIM_ARCH_OPTION)) return INVALID;
#endif
    }
    return arch && smem ? 0 : INVALID;
}
API int SHIM_RTC(log_size)(void*, size_t* n) { FAULT return *n = 1, 0; }
API int SHIM_RTC(log)(void*, char* log) { FAULT return *log = 0, 0; }
API int SHIM_RTC(binary_size)(void*, size_t* n) { FAULT return *n = sizeof CODE, 0; }
API int SHIM_RTC(binary)(void*, char* code) { FAULT return std::memcpy(code, CODE, sizeof CODE), 0; }
API int SHIM_RTC(destroy)(void** p) { return drop(*p, handles); }
#endif
