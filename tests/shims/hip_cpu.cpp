// HIP on the fiber harness: exports the functions of HIP and hiprtc that the driver table names, over this process's memory
// and tests/simt. Test-only. It proves the host's calls and their arguments, not AMD's ABI.
//
// Strict where a driver would be lenient: memory starts as NaN, copies must stay inside one allocation, handles must be
// live, and the compiler looks at its options.
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

namespace {
constexpr int INVALID = 1, NO_DEVICE = 100, NOT_FOUND = 500;
const char CODE[64] = "\x7f" "ELF kernels of the fiber harness";

std::mutex lock;
std::map<char*, size_t> allocations;
std::set<std::string> functions;
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
}  // namespace

// This is not AMD's library: what runs through it proves tier T3.
API int polymla_stand_in_tier() { return 3; }

API const char* hipGetErrorName(int code) { return code == INVALID ? "hipErrorInvalidValue" : "hipErrorOther"; }
API const char* hipGetErrorString(int code) { return code == INVALID ? "invalid argument" : "another error"; }
API int hipInit(unsigned flags) { return flags ? INVALID : 0; }
API int hipRuntimeGetVersion(int* v) { return *v = 60000000, 0; }
API int hipGetDeviceCount(int* n) { return *n = 2, 0; }
API int hipGetDevice(int* d) { return *d = current, 0; }
API int hipSetDevice(int d) { return d < 0 || d > 1 ? INVALID : (current = d, 0); }
API int hipDeviceGetAttribute(int* value, int attribute, int device) {
    if (device < 0 || device > 1) return INVALID;
    // Device 0 has waves that the kernels are not for: the host must pass it over.
    switch (attribute) {
        case 87: return *value = device == 0 ? 32 : 64, 0;
        case 74: return *value = 65536, 0;
        case 63: return *value = 4, 0;
    }
    return INVALID;
}
API int hipDeviceGetName(char* name, int length, int device) {
    std::snprintf(name, size_t(length), "fiber harness %d", device);
    return 0;
}
API int hipGetDevicePropertiesR0600(void* properties, int device) {
    std::memset(properties, 0x20, 1472);
    std::strcpy(static_cast<char*>(properties) + 1160, device ? "gfx90a:sramecc+:xnack-" : "gfx1100");
    return 0;
}
API int hipMalloc(void** p, size_t bytes) { return current == 1 ? allocate(p, bytes) : NO_DEVICE; }
API int hipFree(void* p) { return release(p); }
API int hipHostMalloc(void** p, size_t bytes, unsigned flags) { return flags == 3 ? allocate(p, bytes) : INVALID; }
API int hipHostGetDevicePointer(void** out, void* p, unsigned flags) { return flags ? INVALID : (*out = p, 0); }
API int hipHostFree(void* p) { return release(p); }
API int hipMemcpyHtoD(void* to, void* from, size_t n) { return inside(to, n) ? std::memcpy(to, from, n), 0 : INVALID; }
API int hipMemcpyDtoH(void* to, void* from, size_t n) { return inside(from, n) ? std::memcpy(to, from, n), 0 : INVALID; }
API int hipMemcpyDtoDAsync(void* to, void* from, size_t n, void* stream) {
    return inside(to, n) && inside(from, n) && stream_lives(stream) ? std::memcpy(to, from, n), 0 : INVALID;
}
API int hipMemsetD8Async(void* to, unsigned char value, size_t n, void* stream) {
    return inside(to, n) && stream_lives(stream) ? std::memset(to, value, n), 0 : INVALID;
}
API int hipMemsetD32Async(void* to, int value, size_t n, void* stream) {
    if (!inside(to, 4 * n) || !stream_lives(stream)) return INVALID;
    for (size_t i = 0; i < n; ++i) static_cast<int*>(to)[i] = value;
    return 0;
}
API int hipDeviceSynchronize() { return 0; }
API int hipStreamCreateWithFlags(void** s, unsigned flags) { return flags ? INVALID : make(s, handles); }
API int hipStreamDestroy(void* s) { return drop(s, handles); }
API int hipStreamSynchronize(void* s) { return stream_lives(s) ? 0 : INVALID; }
API int hipEventCreateWithFlags(void** e, unsigned flags) { return flags ? INVALID : make(e, handles); }
API int hipEventDestroy(void* e) { return drop(e, handles); }
API int hipEventRecord(void* e, void* s) { return e && stream_lives(e) && stream_lives(s) ? 0 : INVALID; }
API int hipEventSynchronize(void* e) { return e && stream_lives(e) ? 0 : INVALID; }
API int hipEventElapsedTime(float* ms, void* a, void* b) {
    return a && b && stream_lives(a) && stream_lives(b) ? (*ms = 1.5f, 0) : INVALID;
}
API int hipModuleLoadData(void** m, const void* image) {
    return std::memcmp(image, CODE, sizeof CODE) == 0 ? make(m, modules) : INVALID;
}
API int hipModuleUnload(void* m) { return drop(m, modules); }
API int hipModuleGetFunction(void** f, void* m, const char* name) {
    std::lock_guard<std::mutex> hold(lock);
    if (!modules.count(m) || !simt_shared_bytes(name)) return NOT_FOUND;
    *f = const_cast<char*>(functions.insert(name).first->c_str());
    return 0;
}
API int hipModuleLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, void* stream, void** params, void** extra) {
    const char* name = static_cast<const char*>(f);
    if (!gx || gy != 1 || gz != 1 || bx != 256 || by != 1 || bz != 1 || extra || !stream_lives(stream)) return INVALID;
    if (shared > 65536 || shared < simt_shared_bytes(name)) return INVALID;
    std::lock_guard<std::mutex> hold(lock);
    return simt_launch(name, gx, shared, params[0], ++launches);
}

// The compiler: takes the source for what it is by its options, and counts how often it was asked.
API const char* hiprtcGetErrorString(int) { return "compilation failed"; }
API int hiprtcVersion(int* major, int* minor) { return *major = 1, *minor = 2, 0; }
API int hiprtcCreateProgram(void** p, const char* text, const char* name, int headers, const char**, const char**) {
    if (headers || std::strstr(text, "#include \"") || std::strcmp(name, "portable.cu")) return INVALID;
    return make(p, handles);
}
API int hiprtcCompileProgram(void*, int count, const char** options) {
    bool arch = false, smem = false;
    for (int i = 0; i < count; ++i) {
        arch |= !std::strcmp(options[i], "--offload-arch=gfx90a");
        smem |= !std::strcmp(options[i], "-DPOLYMLA_SMEM_KIB=64");
    }
    return arch && smem ? 0 : INVALID;
}
API int hiprtcGetProgramLogSize(void*, size_t* n) { return *n = 1, 0; }
API int hiprtcGetProgramLog(void*, char* log) { return *log = 0, 0; }
API int hiprtcGetCodeSize(void*, size_t* n) { return *n = sizeof CODE, 0; }
API int hiprtcGetCode(void*, char* code) { return std::memcpy(code, CODE, sizeof CODE), 0; }
API int hiprtcDestroyProgram(void** p) { return drop(*p, handles); }
