//! MUSA, as tests stand in for it: CUDA's driver under another prefix. One device has 128 lanes and 28 KiB as mp_22, the other 32
//! lanes and 192 KiB as mp_31.

use super::vendor::{Arch, Device, Vendor};

vendor! {
    driver {
        error_name = "muGetErrorName";
        error_string = "muGetErrorString";
        init = "muInit";
        version = "muDriverGetVersion";
        device_count = "muDeviceGetCount";
        device_attribute = "muDeviceGetAttribute";
        device_name = "muDeviceGetName";
        alloc = "muMemAlloc_v2";
        free = "muMemFree_v2";
        host_alloc = "muMemHostAlloc";
        host_address = "muMemHostGetDevicePointer_v2";
        host_free = "muMemFreeHost";
        copy_to_device = "muMemcpyHtoD_v2";
        copy_to_host = "muMemcpyDtoH_v2";
        copy_on_device = "muMemcpyDtoDAsync_v2";
        fill_bytes = "muMemsetD8Async";
        fill_words = "muMemsetD32Async";
        synchronize = "muCtxSynchronize";
        stream_create = "muStreamCreate";
        stream_destroy = "muStreamDestroy_v2";
        stream_synchronize = "muStreamSynchronize";
        event_create = "muEventCreate";
        event_destroy = "muEventDestroy_v2";
        event_record = "muEventRecord";
        event_synchronize = "muEventSynchronize";
        event_elapsed = "muEventElapsedTime";
        module_load = "muModuleLoadData";
        module_unload = "muModuleUnload";
        module_function = "muModuleGetFunction";
        launch = "muLaunchKernel";
        device_get = "muDeviceGet";
        retain_context = "muDevicePrimaryCtxRetain";
        get_context = "muCtxGetCurrent";
        set_context = "muCtxSetCurrent";
    }
    compiler {
        error_string = "mtrtcGetErrorString";
        version = "mtrtcVersion";
        create = "mtrtcCreateProgram";
        compile = "mtrtcCompileProgram";
        log_size = "mtrtcGetProgramLogSize";
        log = "mtrtcGetProgramLog";
        binary_size = "mtrtcGetFatBinSize";
        binary = "mtrtcGetFatBin";
        destroy = "mtrtcDestroyProgram";
    }
    Vendor {
        contexts: true,
        compiler: true,
        warp_attribute: 10,
        shared_attribute: 8,
        processors_attribute: 16,
        arch: Arch::Capability([75, 76]),
        host_flags: 3,
        arch_option: "--offload-arch=mp_",
        prelude: "",
        devices: &[
            Device { warp: 128, shared_kib: 28, capability: [2, 2] },
            Device { warp: 32, shared_kib: 192, capability: [3, 1] },
        ],
    }
}
