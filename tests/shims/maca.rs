//! MACA, as tests stand in for it: driver and run-time compiler are one library. Waves of 64 lanes are two warps of NVIDIA's devices,
//! which the kernels do not notice: what they do across lanes stays within 32.

use super::vendor::{Arch, Device, Vendor};

vendor! {
    driver {
        error_name = "mcGetErrorName";
        error_string = "mcGetErrorString";
        init = "mcInit";
        version = "mcRuntimeGetVersion";
        device_count = "mcGetDeviceCount";
        get_device = "mcGetDevice";
        set_device = "mcSetDevice";
        device_attribute = "mcDeviceGetAttribute";
        device_name = "mcDeviceGetName";
        alloc = "mcMalloc";
        free = "mcFree";
        host_alloc = "mcMallocHost";
        host_address = "mcHostGetDevicePointer";
        host_free = "mcFreeHost";
        copy_to_device = "mcMemcpyHtoD";
        copy_to_host = "mcMemcpyDtoH";
        copy_on_device = "mcMemcpyDtoDAsync";
        fill_bytes = "mcMemsetD8Async";
        fill_words = "mcMemsetD32Async";
        synchronize = "mcDeviceSynchronize";
        stream_create = "mcStreamCreateWithFlags";
        stream_destroy = "mcStreamDestroy";
        stream_synchronize = "mcStreamSynchronize";
        event_create = "mcEventCreateWithFlags";
        event_destroy = "mcEventDestroy";
        event_record = "mcEventRecord";
        event_synchronize = "mcEventSynchronize";
        event_elapsed = "mcEventElapsedTime";
        module_load = "mcModuleLoadData";
        module_unload = "mcModuleUnload";
        module_function = "mcModuleGetFunction";
        launch = "mcModuleLaunchKernel";
    }
    compiler {
        error_string = "mcrtcGetErrorString";
        version = "mcrtcVersion";
        create = "mcrtcCreateProgram";
        compile = "mcrtcCompileProgram";
        log_size = "mcrtcGetProgramLogSize";
        log = "mcrtcGetProgramLog";
        binary_size = "mcrtcGetBitcodeSize";
        binary = "mcrtcGetBitcode";
        destroy = "mcrtcDestroyProgram";
    }
    Vendor {
        contexts: false,
        compiler: true,
        warp_attribute: 9,
        shared_attribute: 7,
        processors_attribute: 16,
        arch: Arch::Capability([21, 22]),
        host_flags: 3,
        // The compiler is told no architecture.
        arch_option: "-std=",
        prelude: "#define __shfl_xor(x, lanes, width) __shfl_xor_sync(0xffffffffu, x, lanes, width)",
        devices: &[Device { warp: 64, shared_kib: 64, capability: [10, 0] }],
    }
}
