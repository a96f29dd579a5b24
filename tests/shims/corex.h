// CoreX's names for forward.cpp, which are CUDA's: libcuda itself with another word for its warps (64 lanes, which are two of the
// device's; what the kernels do across lanes stays within 32) and for its architecture (ivcore11). Without this library our
// host code refuses libcuda, as it must. There is no run-time compiler: kernels come from the module folder.
#pragma once

#define SHIM_CONTEXTS
#define SHIM(name) SHIM_##name
#define SHIM_error_name cuGetErrorName
#define SHIM_error_string cuGetErrorString
#define SHIM_init cuInit
#define SHIM_version cuDriverGetVersion
#define SHIM_device_count cuDeviceGetCount
#define SHIM_device_attribute cuDeviceGetAttribute
#define SHIM_device_name cuDeviceGetName
#define SHIM_alloc cuMemAlloc_v2
#define SHIM_free cuMemFree_v2
#define SHIM_host_alloc cuMemHostAlloc
#define SHIM_host_address cuMemHostGetDevicePointer_v2
#define SHIM_host_free cuMemFreeHost
#define SHIM_copy_to_device cuMemcpyHtoD_v2
#define SHIM_copy_to_host cuMemcpyDtoH_v2
#define SHIM_copy_on_device cuMemcpyDtoDAsync_v2
#define SHIM_fill_bytes cuMemsetD8Async
#define SHIM_fill_words cuMemsetD32Async
#define SHIM_synchronize cuCtxSynchronize
#define SHIM_stream_create cuStreamCreate
#define SHIM_stream_destroy cuStreamDestroy_v2
#define SHIM_stream_synchronize cuStreamSynchronize
#define SHIM_event_create cuEventCreate
#define SHIM_event_destroy cuEventDestroy_v2
#define SHIM_event_record cuEventRecord
#define SHIM_event_synchronize cuEventSynchronize
#define SHIM_event_elapsed cuEventElapsedTime
#define SHIM_module_load cuModuleLoadData
#define SHIM_module_unload cuModuleUnload
#define SHIM_module_function cuModuleGetFunction
#define SHIM_launch cuLaunchKernel
#define SHIM_device_get cuDeviceGet
#define SHIM_retain_context cuDevicePrimaryCtxRetain
#define SHIM_get_context cuCtxGetCurrent
#define SHIM_set_context cuCtxSetCurrent

#define SHIM_NO_COMPILER
#define SHIM_WARP 64
#define SHIM_SHARED_KIB 128
#define SHIM_WARP_ATTRIBUTE 10
#define SHIM_SHARED_ATTRIBUTE 8
#define SHIM_PROCESSORS_ATTRIBUTE 16
#define SHIM_CAPABILITY_ATTRIBUTES 75, 76
#define SHIM_CAPABILITY(minor) 1
#define SHIM_HOST_FLAGS 3
