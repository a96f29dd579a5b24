// HIP's names for forward.cpp: gfx906, whose kernels multiply by plain FMA. Waves of 64 are two warps here, which the
// kernels do not notice: what they do across lanes stays within 32.
#pragma once

#define SHIM(name) SHIM_##name
#define SHIM_error_name hipGetErrorName
#define SHIM_error_string hipGetErrorString
#define SHIM_init hipInit
#define SHIM_version hipRuntimeGetVersion
#define SHIM_device_count hipGetDeviceCount
#define SHIM_get_device hipGetDevice
#define SHIM_set_device hipSetDevice
#define SHIM_device_attribute hipDeviceGetAttribute
#define SHIM_device_name hipDeviceGetName
#define SHIM_device_properties hipGetDevicePropertiesR0600
#define SHIM_alloc hipMalloc
#define SHIM_free hipFree
#define SHIM_host_alloc hipHostMalloc
#define SHIM_host_address hipHostGetDevicePointer
#define SHIM_host_free hipHostFree
#define SHIM_copy_to_device hipMemcpyHtoD
#define SHIM_copy_to_host hipMemcpyDtoH
#define SHIM_copy_on_device hipMemcpyDtoDAsync
#define SHIM_fill_bytes hipMemsetD8Async
#define SHIM_fill_words hipMemsetD32Async
#define SHIM_synchronize hipDeviceSynchronize
#define SHIM_stream_create hipStreamCreateWithFlags
#define SHIM_stream_destroy hipStreamDestroy
#define SHIM_stream_synchronize hipStreamSynchronize
#define SHIM_event_create hipEventCreateWithFlags
#define SHIM_event_destroy hipEventDestroy
#define SHIM_event_record hipEventRecord
#define SHIM_event_synchronize hipEventSynchronize
#define SHIM_event_elapsed hipEventElapsedTime
#define SHIM_module_load hipModuleLoadData
#define SHIM_module_unload hipModuleUnload
#define SHIM_module_function hipModuleGetFunction
#define SHIM_launch hipModuleLaunchKernel

#define SHIM_RTC(name) SHIM_RTC_##name
#define SHIM_RTC_error_string hiprtcGetErrorString
#define SHIM_RTC_version hiprtcVersion
#define SHIM_RTC_create hiprtcCreateProgram
#define SHIM_RTC_compile hiprtcCompileProgram
#define SHIM_RTC_log_size hiprtcGetProgramLogSize
#define SHIM_RTC_log hiprtcGetProgramLog
#define SHIM_RTC_binary_size hiprtcGetCodeSize
#define SHIM_RTC_binary hiprtcGetCode
#define SHIM_RTC_destroy hiprtcDestroyProgram

#define SHIM_WARP 64
#define SHIM_SHARED_KIB 64
#define SHIM_WARP_ATTRIBUTE 87
#define SHIM_SHARED_ATTRIBUTE 74
#define SHIM_PROCESSORS_ATTRIBUTE 63
#define SHIM_HOST_FLAGS 3
#define SHIM_ARCH_OPTION "--offload-arch="
// The name of the architecture stands somewhere in the struct.
#define SHIM_PROPERTIES(at) (std::memset(at, 0, 1472), std::strcpy(static_cast<char*>(at) + 1160, "gfx906:sramecc+"))

// Clang's builtins for AMD targets, as far as backends/hip uses them.
static const char* const SHIM_PRELUDE = R"(
#define amdgpu_flat_work_group_size(low, high) launch_bounds(high)
#define __builtin_amdgcn_workitem_id_x() threadIdx.x
#define __builtin_amdgcn_workgroup_id_x() blockIdx.x
#define __builtin_amdgcn_fence(order, scope)
#define __builtin_amdgcn_s_barrier() __syncthreads()
#define __builtin_amdgcn_ds_bpermute(at, x) __shfl_sync(0xffffffffu, x, ((at) / 4) & 31)
#define __ATOMIC_RELAXED 0
#define __atomic_fetch_min(at, x, order) atomicMin(at, x)
#define __builtin_exp2f(x) exp2f(x)
#define __builtin_log2f(x) log2f(x)
// IEEE half, by the instructions that convert it.
#define _Float16 ShimHalf
struct ShimHalf {
    unsigned short u;
    ShimHalf() = default;
    __device__ explicit ShimHalf(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(u) : "f"(x)); }
    __device__ operator float() const {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(u));
        return y;
    }
};
)";
