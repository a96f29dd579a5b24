// MACA's names for forward.cpp: driver and run-time compiler are one library. Waves of 64 are two warps here, which the kernels
// do not notice: what they do across lanes stays within 32.
#pragma once

#define SHIM(name) SHIM_##name
#define SHIM_error_name mcGetErrorName
#define SHIM_error_string mcGetErrorString
#define SHIM_init mcInit
#define SHIM_version mcRuntimeGetVersion
#define SHIM_device_count mcGetDeviceCount
#define SHIM_get_device mcGetDevice
#define SHIM_set_device mcSetDevice
#define SHIM_device_attribute mcDeviceGetAttribute
#define SHIM_device_name mcDeviceGetName
#define SHIM_alloc mcMalloc
#define SHIM_free mcFree
#define SHIM_host_alloc mcMallocHost
#define SHIM_host_address mcHostGetDevicePointer
#define SHIM_host_free mcFreeHost
#define SHIM_copy_to_device mcMemcpyHtoD
#define SHIM_copy_to_host mcMemcpyDtoH
#define SHIM_copy_on_device mcMemcpyDtoDAsync
#define SHIM_fill_bytes mcMemsetD8Async
#define SHIM_fill_words mcMemsetD32Async
#define SHIM_synchronize mcDeviceSynchronize
#define SHIM_stream_create mcStreamCreateWithFlags
#define SHIM_stream_destroy mcStreamDestroy
#define SHIM_stream_synchronize mcStreamSynchronize
#define SHIM_event_create mcEventCreateWithFlags
#define SHIM_event_destroy mcEventDestroy
#define SHIM_event_record mcEventRecord
#define SHIM_event_synchronize mcEventSynchronize
#define SHIM_event_elapsed mcEventElapsedTime
#define SHIM_module_load mcModuleLoadData
#define SHIM_module_unload mcModuleUnload
#define SHIM_module_function mcModuleGetFunction
#define SHIM_launch mcModuleLaunchKernel

#define SHIM_RTC(name) SHIM_RTC_##name
#define SHIM_RTC_error_string mcrtcGetErrorString
#define SHIM_RTC_version mcrtcVersion
#define SHIM_RTC_create mcrtcCreateProgram
#define SHIM_RTC_compile mcrtcCompileProgram
#define SHIM_RTC_log_size mcrtcGetProgramLogSize
#define SHIM_RTC_log mcrtcGetProgramLog
#define SHIM_RTC_binary_size mcrtcGetBitcodeSize
#define SHIM_RTC_binary mcrtcGetBitcode
#define SHIM_RTC_destroy mcrtcDestroyProgram

#define SHIM_WARP 64
#define SHIM_SHARED_KIB 64
#define SHIM_WARP_ATTRIBUTE 9
#define SHIM_SHARED_ATTRIBUTE 7
#define SHIM_PROCESSORS_ATTRIBUTE 16
#define SHIM_CAPABILITY_ATTRIBUTES 21, 22
#define SHIM_CAPABILITY(minor) ((minor) ? 0 : 10)
#define SHIM_HOST_FLAGS 3
// The compiler is told no architecture.
#define SHIM_ARCH_OPTION "-std="
static const char* const SHIM_PRELUDE = "#define __shfl_xor(x, lanes, width) __shfl_xor_sync(0xffffffffu, x, lanes, width)\n";
