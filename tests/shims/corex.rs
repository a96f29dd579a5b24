//! CoreX, as tests stand in for it: CUDA's own names, with another word for the warps (64 lanes, which are two of NVIDIA's; what the
//! kernels do across lanes stays within 32) and for the architecture (ivcore11). Without this our host code refuses NVIDIA's
//! libcuda, as it must. The compiler's names are here for the stand-in of NVRTC: CoreX has none, and its kernels come from the
//! module folder.

use super::vendor::{Arch, Device, Vendor};

vendor! {
    driver {
        error_name = "cuGetErrorName";
        error_string = "cuGetErrorString";
        init = "cuInit";
        version = "cuDriverGetVersion";
        device_count = "cuDeviceGetCount";
        device_attribute = "cuDeviceGetAttribute";
        device_name = "cuDeviceGetName";
        alloc = "cuMemAlloc_v2";
        free = "cuMemFree_v2";
        host_alloc = "cuMemHostAlloc";
        host_address = "cuMemHostGetDevicePointer_v2";
        host_free = "cuMemFreeHost";
        copy_to_device = "cuMemcpyHtoD_v2";
        copy_to_host = "cuMemcpyDtoH_v2";
        copy_on_device = "cuMemcpyDtoDAsync_v2";
        fill_bytes = "cuMemsetD8Async";
        fill_words = "cuMemsetD32Async";
        synchronize = "cuCtxSynchronize";
        stream_create = "cuStreamCreate";
        stream_destroy = "cuStreamDestroy_v2";
        stream_synchronize = "cuStreamSynchronize";
        event_create = "cuEventCreate";
        event_destroy = "cuEventDestroy_v2";
        event_record = "cuEventRecord";
        event_synchronize = "cuEventSynchronize";
        event_elapsed = "cuEventElapsedTime";
        module_load = "cuModuleLoadData";
        module_unload = "cuModuleUnload";
        module_function = "cuModuleGetFunction";
        launch = "cuLaunchKernel";
        device_get = "cuDeviceGet";
        retain_context = "cuDevicePrimaryCtxRetain";
        get_context = "cuCtxGetCurrent";
        set_context = "cuCtxSetCurrent";
    }
    compiler {
        error_string = "nvrtcGetErrorString";
        version = "nvrtcVersion";
        create = "nvrtcCreateProgram";
        compile = "nvrtcCompileProgram";
        log_size = "nvrtcGetProgramLogSize";
        log = "nvrtcGetProgramLog";
        binary_size = "nvrtcGetCUBINSize";
        binary = "nvrtcGetCUBIN";
        destroy = "nvrtcDestroyProgram";
    }
    Vendor {
        contexts: true,
        compiler: false,
        warp_attribute: 10,
        shared_attribute: 8,
        processors_attribute: 16,
        arch: Arch::Capability([75, 76]),
        host_flags: 3,
        arch_option: "",
        prelude: "",
        devices: &[Device { warp: 64, shared_kib: 128, capability: [1, 1] }],
    }
}
