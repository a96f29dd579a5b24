// A vendor's driver and run-time compiler by NVIDIA's: a shared library with the vendor's names that forwards to libcuda
// and NVRTC, so that our host code and our kernels in that vendor's dialect run on a GPU (tier T4). Test-only, never
// shipped. It proves our calls and our kernels, not the vendor's ABI.
//
//   c++ -std=c++17 -shared -fPIC -DSHIM_VENDOR_HEADER='"hip.h"' -o libamdhip64.so forward.cpp -ldl
//
// Where vendors differ (names, numbers of attributes, how a device says what it is, what the compiler has to be told) is
// in the vendor's header:
//   SHIM(name)             the vendor's name of a driver function, by our own name for it (src/driver/table.rs)
//   SHIM_RTC(name)         of a function of the run-time compiler (src/kernels/rtc.rs)
//   SHIM_WARP, SHIM_SHARED_KIB, SHIM_WARP_ATTRIBUTE, SHIM_SHARED_ATTRIBUTE, SHIM_PROCESSORS_ATTRIBUTE
//   SHIM_PROPERTIES        fills the vendor's struct of properties; or
//   SHIM_CAPABILITY(minor), SHIM_CAPABILITY_ATTRIBUTES     the compute capability and the numbers of its attributes
//   SHIM_NO_COMPILER       defined where it has no run-time compiler; then nothing of one is asked of the header
//   SHIM_CONTEXTS          defined where the vendor's driver has CUDA's contexts and CUDA's way with words of codes
//   SHIM_ARCH_OPTION       how its compiler is told the architecture: must be there
//   SHIM_PRELUDE           source before ours: the vendor's builtins in CUDA's words
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

typedef void* Handle;

// A function of a library that must have it.
template <class F>
F find(const std::vector<const char*>& libraries, const char* name) {
    for (const char* library : libraries) {
        void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
        if (!handle) continue;
        if (void* symbol = dlsym(handle, name)) return reinterpret_cast<F>(symbol);
    }
    std::fprintf(stderr, "shim: no %s in any of %s, ...\n", name, libraries[0]);
    std::abort();
}
const std::vector<const char*> DRIVER = {"libcuda.so.1", "libcuda.so"};
[[maybe_unused]] const std::vector<const char*> COMPILER = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so",
                                                            "/usr/local/cuda/lib64/libnvrtc.so"};

#define FORWARD(name, ...)                                                                          \
    static const auto function = find<int (*)(__VA_ARGS__)>(DRIVER, #name);                         \
    if (int code = enter()) return code;                                                            \
    return function

// CUDA wants a context where these drivers have a current device: the primary one, made current by every call.
thread_local int current = 0;
#ifdef SHIM_CONTEXTS
int enter() { return 0; }
#else
int enter() {
    static std::mutex lock;
    static std::map<int, Handle> contexts;
    static const auto retain = find<int (*)(Handle*, int)>(DRIVER, "cuDevicePrimaryCtxRetain");
    static const auto set = find<int (*)(Handle)>(DRIVER, "cuCtxSetCurrent");
    std::lock_guard<std::mutex> hold(lock);
    Handle& context = contexts[current];
    if (!context)
        if (int code = retain(&context, current)) return code;
    return set(context);
}
#endif

int device_attribute(int* value, int attribute, int device) {
    static const auto get = find<int (*)(int*, int, int)>(DRIVER, "cuDeviceGetAttribute");
    return get(value, attribute, device);
}

const char* text(int code, const char* function) {
    const char* words = nullptr;
    const auto get = find<int (*)(int, const char**)>(DRIVER, function);
    return get(code, &words) == 0 ? words : nullptr;
}

}  // namespace

#include SHIM_VENDOR_HEADER

// What runs through here proves tier T4.
API int polymla_stand_in_tier() { return 4; }

// ---- driver -------------------------------------------------------------------------------------
#ifdef SHIM_CONTEXTS
API int SHIM(error_name)(int code, const char** words) { return (*words = text(code, "cuGetErrorName")) ? 0 : 1; }
API int SHIM(error_string)(int code, const char** words) { return (*words = text(code, "cuGetErrorString")) ? 0 : 1; }
#else
API const char* SHIM(error_name)(int code) { return text(code, "cuGetErrorName"); }
API const char* SHIM(error_string)(int code) { return text(code, "cuGetErrorString"); }
#endif
API int SHIM(init)(unsigned flags) {
    static const auto function = find<int (*)(unsigned)>(DRIVER, "cuInit");
    return function(flags);
}
API int SHIM(version)(int* version) {
    static const auto function = find<int (*)(int*)>(DRIVER, "cuDriverGetVersion");
    return function(version);
}
API int SHIM(device_count)(int* count) {
    static const auto function = find<int (*)(int*)>(DRIVER, "cuDeviceGetCount");
    return function(count);
}
#ifdef SHIM_CONTEXTS
// The host makes contexts current by itself; here they are CUDA's own.
API int SHIM(device_get)(int* device, int ordinal) {
    static const auto function = find<int (*)(int*, int)>(DRIVER, "cuDeviceGet");
    return function(device, ordinal);
}
API int SHIM(retain_context)(Handle* context, int device) {
    static const auto function = find<int (*)(Handle*, int)>(DRIVER, "cuDevicePrimaryCtxRetain");
    return function(context, device);
}
API int SHIM(get_context)(Handle* context) {
    static const auto function = find<int (*)(Handle*)>(DRIVER, "cuCtxGetCurrent");
    return function(context);
}
API int SHIM(set_context)(Handle context) {
    static const auto function = find<int (*)(Handle)>(DRIVER, "cuCtxSetCurrent");
    return function(context);
}
#else
API int SHIM(get_device)(int* device) { return *device = current, 0; }
API int SHIM(set_device)(int device) {
    int count = 0;
    if (int code = SHIM(device_count)(&count)) return code;
    if (device < 0 || device >= count) return 101;
    current = device;
    return 0;
}
#endif
API int SHIM(device_attribute)(int* value, int attribute, int device) {
    switch (attribute) {
        case SHIM_WARP_ATTRIBUTE: return *value = SHIM_WARP, 0;
        case SHIM_SHARED_ATTRIBUTE: return *value = SHIM_SHARED_KIB * 1024, 0;
        case SHIM_PROCESSORS_ATTRIBUTE: return device_attribute(value, 16, device);
    }
#ifdef SHIM_CAPABILITY
    const int capability[] = {SHIM_CAPABILITY_ATTRIBUTES};
    for (int minor = 0; minor < 2; ++minor)
        if (attribute == capability[minor]) return *value = SHIM_CAPABILITY(minor), 0;
#endif
    return 1;
}
API int SHIM(device_name)(char* name, int length, int device) {
    static const auto function = find<int (*)(char*, int, int)>(DRIVER, "cuDeviceGetName");
    char real[128] = "";
    if (int code = function(real, sizeof real, device)) return code;
    std::snprintf(name, size_t(length), "%s standing in", real);
    return 0;
}
#ifdef SHIM_PROPERTIES
API int SHIM(device_properties)(void* properties, int) {
    SHIM_PROPERTIES(properties);
    return 0;
}
#endif
API int SHIM(alloc)(uint64_t* address, size_t bytes) { FORWARD(cuMemAlloc_v2, uint64_t*, size_t)(address, bytes); }
API int SHIM(free)(uint64_t address) { FORWARD(cuMemFree_v2, uint64_t)(address); }
API int SHIM(host_alloc)(void** p, size_t bytes, unsigned flags) {
    if (flags != SHIM_HOST_FLAGS) return 1;
    FORWARD(cuMemHostAlloc, void**, size_t, unsigned)(p, bytes, 3);
}
API int SHIM(host_address)(uint64_t* address, void* p, unsigned flags) {
    FORWARD(cuMemHostGetDevicePointer_v2, uint64_t*, void*, unsigned)(address, p, flags);
}
API int SHIM(host_free)(void* p) { FORWARD(cuMemFreeHost, void*)(p); }
API int SHIM(copy_to_device)(uint64_t to, const void* from, size_t n) {
    FORWARD(cuMemcpyHtoD_v2, uint64_t, const void*, size_t)(to, from, n);
}
API int SHIM(copy_to_host)(void* to, uint64_t from, size_t n) {
    FORWARD(cuMemcpyDtoH_v2, void*, uint64_t, size_t)(to, from, n);
}
API int SHIM(copy_on_device)(uint64_t to, uint64_t from, size_t n, Handle stream) {
    FORWARD(cuMemcpyDtoDAsync_v2, uint64_t, uint64_t, size_t, Handle)(to, from, n, stream);
}
API int SHIM(fill_bytes)(uint64_t to, unsigned char value, size_t n, Handle stream) {
    FORWARD(cuMemsetD8Async, uint64_t, unsigned char, size_t, Handle)(to, value, n, stream);
}
API int SHIM(fill_words)(uint64_t to, int value, size_t n, Handle stream) {
    FORWARD(cuMemsetD32Async, uint64_t, int, size_t, Handle)(to, value, n, stream);
}
API int SHIM(synchronize)() {
    static const auto function = find<int (*)()>(DRIVER, "cuCtxSynchronize");
    if (int code = enter()) return code;
    return function();
}
API int SHIM(stream_create)(Handle* s, unsigned flags) { FORWARD(cuStreamCreate, Handle*, unsigned)(s, flags); }
API int SHIM(stream_destroy)(Handle s) { FORWARD(cuStreamDestroy_v2, Handle)(s); }
API int SHIM(stream_synchronize)(Handle s) { FORWARD(cuStreamSynchronize, Handle)(s); }
API int SHIM(event_create)(Handle* e, unsigned flags) { FORWARD(cuEventCreate, Handle*, unsigned)(e, flags); }
API int SHIM(event_destroy)(Handle e) { FORWARD(cuEventDestroy_v2, Handle)(e); }
API int SHIM(event_record)(Handle e, Handle s) { FORWARD(cuEventRecord, Handle, Handle)(e, s); }
API int SHIM(event_synchronize)(Handle e) { FORWARD(cuEventSynchronize, Handle)(e); }
API int SHIM(event_elapsed)(float* ms, Handle a, Handle b) { FORWARD(cuEventElapsedTime, float*, Handle, Handle)(ms, a, b); }
API int SHIM(module_load)(Handle* m, const void* image) { FORWARD(cuModuleLoadData, Handle*, const void*)(m, image); }
API int SHIM(module_unload)(Handle m) { FORWARD(cuModuleUnload, Handle)(m); }
API int SHIM(module_function)(Handle* f, Handle m, const char* name) {
    static const auto get = find<int (*)(Handle*, Handle, const char*)>(DRIVER, "cuModuleGetFunction");
    static const auto set = find<int (*)(Handle, int, int)>(DRIVER, "cuFuncSetAttribute");
    if (int code = enter()) return code;
    if (int code = get(f, m, name)) return code;
    return set(*f, 8, SHIM_SHARED_KIB * 1024);      // what these drivers need not be asked for
}
API int SHIM(launch)(Handle f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, Handle stream, void** params, void** extra) {
    if (shared > SHIM_SHARED_KIB * 1024) return 1;
    FORWARD(cuLaunchKernel, Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
            void**)(f, gx, gy, gz, bx, by, bz, shared, stream, params, extra);
}

// ---- run-time compiler ----------------------------------------------------------------------------
#ifndef SHIM_NO_COMPILER
#define COMPILE(name, ...)                                                         \
    static const auto function = find<int (*)(__VA_ARGS__)>(COMPILER, "nvrtc" #name); \
    return function

API const char* SHIM_RTC(error_string)(int code) {
    static const auto function = find<const char* (*)(int)>(COMPILER, "nvrtcGetErrorString");
    return function(code);
}
API int SHIM_RTC(version)(int* major, int* minor) { COMPILE(Version, int*, int*)(major, minor); }
API int SHIM_RTC(create)(Handle* p, const char* source, const char* name, int headers, const char** texts,
                         const char** names) {
    const std::string all = std::string(SHIM_PRELUDE) + "\n#line 1\n" + source;
    COMPILE(CreateProgram, Handle*, const char*, const char*, int, const char**, const char**)
    (p, all.c_str(), name, headers, texts, names);
}
API int SHIM_RTC(compile)(Handle p, int count, const char** options) {
    // The vendor's options, with its architecture for the device's own and without what NVRTC does not know.
    std::vector<const char*> ours;
    bool arch = false;
    for (int i = 0; i < count; ++i) {
        const bool is_arch = std::strncmp(options[i], SHIM_ARCH_OPTION, std::strlen(SHIM_ARCH_OPTION)) == 0;
        arch |= is_arch;
        const bool keep = !is_arch || std::strncmp(options[i], "-std=", 5) == 0;
        if (keep && std::strcmp(options[i], "-O3") != 0) ours.push_back(options[i]);
    }
    if (!arch) return 5;        // NVRTC_ERROR_INVALID_OPTION
    int major = 0, minor = 0;
    if (device_attribute(&major, 75, current) || device_attribute(&minor, 76, current)) return 11;
    const std::string real = "--gpu-architecture=sm_" + std::to_string(major) + std::to_string(minor);
    ours.push_back(real.c_str());
    COMPILE(CompileProgram, Handle, int, const char* const*)(p, int(ours.size()), ours.data());
}
API int SHIM_RTC(log_size)(Handle p, size_t* n) { COMPILE(GetProgramLogSize, Handle, size_t*)(p, n); }
API int SHIM_RTC(log)(Handle p, char* log) { COMPILE(GetProgramLog, Handle, char*)(p, log); }
API int SHIM_RTC(binary_size)(Handle p, size_t* n) { COMPILE(GetCUBINSize, Handle, size_t*)(p, n); }
API int SHIM_RTC(binary)(Handle p, char* code) { COMPILE(GetCUBIN, Handle, char*)(p, code); }
API int SHIM_RTC(destroy)(Handle* p) { COMPILE(DestroyProgram, Handle*)(p); }
#endif
