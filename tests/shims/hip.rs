//! HIP, as tests stand in for it: gfx906, whose kernels multiply by plain FMA. Waves of 64 lanes are two warps of NVIDIA's devices,
//! which the kernels do not notice: what they do across lanes stays within 32.

use super::vendor::{Arch, Device, Vendor};

vendor! {
    driver {
        error_name = "hipGetErrorName";
        error_string = "hipGetErrorString";
        init = "hipInit";
        version = "hipRuntimeGetVersion";
        device_count = "hipGetDeviceCount";
        get_device = "hipGetDevice";
        set_device = "hipSetDevice";
        device_attribute = "hipDeviceGetAttribute";
        device_name = "hipDeviceGetName";
        device_properties = "hipGetDevicePropertiesR0600";
        alloc = "hipMalloc";
        free = "hipFree";
        host_alloc = "hipHostMalloc";
        host_address = "hipHostGetDevicePointer";
        host_free = "hipHostFree";
        copy_to_device = "hipMemcpyHtoD";
        copy_to_host = "hipMemcpyDtoH";
        copy_on_device = "hipMemcpyDtoDAsync";
        fill_bytes = "hipMemsetD8Async";
        fill_words = "hipMemsetD32Async";
        synchronize = "hipDeviceSynchronize";
        stream_create = "hipStreamCreateWithFlags";
        stream_destroy = "hipStreamDestroy";
        stream_synchronize = "hipStreamSynchronize";
        event_create = "hipEventCreateWithFlags";
        event_destroy = "hipEventDestroy";
        event_record = "hipEventRecord";
        event_synchronize = "hipEventSynchronize";
        event_elapsed = "hipEventElapsedTime";
        module_load = "hipModuleLoadData";
        module_unload = "hipModuleUnload";
        module_function = "hipModuleGetFunction";
        launch = "hipModuleLaunchKernel";
    }
    compiler {
        error_string = "hiprtcGetErrorString";
        version = "hiprtcVersion";
        create = "hiprtcCreateProgram";
        compile = "hiprtcCompileProgram";
        log_size = "hiprtcGetProgramLogSize";
        log = "hiprtcGetProgramLog";
        binary_size = "hiprtcGetCodeSize";
        binary = "hiprtcGetCode";
        destroy = "hiprtcDestroyProgram";
    }
    Vendor {
        contexts: false,
        compiler: true,
        warp_attribute: 87,
        shared_attribute: 74,
        processors_attribute: 63,
        arch: Arch::Properties { bytes: 1472, at: 1160, name: "gfx906:sramecc+" },
        host_flags: 3,
        arch_option: "--offload-arch=",
        prelude: PRELUDE,
        devices: &[Device { warp: 64, shared_kib: 64, capability: [0, 0] }],
    }
}

/// Clang's builtins for AMD targets, as far as `backends/hip` uses them.
const PRELUDE: &str = r#"
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
"#;
