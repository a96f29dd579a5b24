// MUSA's names for forward.cpp, whose driver is CUDA's under another prefix: contexts are made current, and words of codes are
// stored through a pointer. SHIM_WARP chooses the device: 128 lanes and 28 KiB as mp_22, or 32 lanes and 192 KiB as mp_31.
#pragma once

#define SHIM_CONTEXTS
#define SHIM(name) SHIM_##name
#define SHIM_error_name muGetErrorName
#define SHIM_error_string muGetErrorString
#define SHIM_init muInit
#define SHIM_version muDriverGetVersion
#define SHIM_device_count muDeviceGetCount
#define SHIM_device_attribute muDeviceGetAttribute
#define SHIM_device_name muDeviceGetName
#define SHIM_alloc muMemAlloc_v2
#define SHIM_free muMemFree_v2
#define SHIM_host_alloc muMemHostAlloc
#define SHIM_host_address muMemHostGetDevicePointer_v2
#define SHIM_host_free muMemFreeHost
#define SHIM_copy_to_device muMemcpyHtoD_v2
#define SHIM_copy_to_host muMemcpyDtoH_v2
#define SHIM_copy_on_device muMemcpyDtoDAsync_v2
#define SHIM_fill_bytes muMemsetD8Async
#define SHIM_fill_words muMemsetD32Async
#define SHIM_synchronize muCtxSynchronize
#define SHIM_stream_create muStreamCreate
#define SHIM_stream_destroy muStreamDestroy_v2
#define SHIM_stream_synchronize muStreamSynchronize
#define SHIM_event_create muEventCreate
#define SHIM_event_destroy muEventDestroy_v2
#define SHIM_event_record muEventRecord
#define SHIM_event_synchronize muEventSynchronize
#define SHIM_event_elapsed muEventElapsedTime
#define SHIM_module_load muModuleLoadData
#define SHIM_module_unload muModuleUnload
#define SHIM_module_function muModuleGetFunction
#define SHIM_launch muLaunchKernel
#define SHIM_device_get muDeviceGet
#define SHIM_retain_context muDevicePrimaryCtxRetain
#define SHIM_get_context muCtxGetCurrent
#define SHIM_set_context muCtxSetCurrent

#define SHIM_RTC(name) SHIM_RTC_##name
#define SHIM_RTC_error_string mtrtcGetErrorString
#define SHIM_RTC_version mtrtcVersion
#define SHIM_RTC_create mtrtcCreateProgram
#define SHIM_RTC_compile mtrtcCompileProgram
#define SHIM_RTC_log_size mtrtcGetProgramLogSize
#define SHIM_RTC_log mtrtcGetProgramLog
#define SHIM_RTC_binary_size mtrtcGetFatBinSize
#define SHIM_RTC_binary mtrtcGetFatBin
#define SHIM_RTC_destroy mtrtcDestroyProgram

#ifndef SHIM_WARP
#define SHIM_WARP 128
#endif
#define SHIM_SHARED_KIB (SHIM_WARP == 128 ? 28 : 192)
#define SHIM_WARP_ATTRIBUTE 10
#define SHIM_SHARED_ATTRIBUTE 8
#define SHIM_PROCESSORS_ATTRIBUTE 16
#define SHIM_CAPABILITY_ATTRIBUTES 75, 76
#define SHIM_CAPABILITY(minor) (SHIM_WARP == 128 ? 2 : (minor) ? 1 : 3)
#define SHIM_HOST_FLAGS 3
#define SHIM_ARCH_OPTION "--offload-arch=mp_"
static const char* const SHIM_PRELUDE = "";
