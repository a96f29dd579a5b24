//! Drivers whose functions are CUDA's driver functions under another prefix: contexts are made current, not devices, and words
//! of codes are stored through a pointer.

/// The names, by the prefix: `mu` for MUSA, `cu` for CoreX.
macro_rules! cuda_style_symbols {
    ($prefix:literal) => {
        Symbols {
            get_device: &[],
            set_device: &[],
            device_properties: &[],
            device_get: &[concat!($prefix, "DeviceGet")],
            retain_context: &[concat!($prefix, "DevicePrimaryCtxRetain")],
            get_context: &[concat!($prefix, "CtxGetCurrent")],
            set_context: &[concat!($prefix, "CtxSetCurrent")],
            error_name: &[concat!($prefix, "GetErrorName")],
            error_string: &[concat!($prefix, "GetErrorString")],
            init: &[concat!($prefix, "Init")],
            version: &[concat!($prefix, "DriverGetVersion")],
            device_count: &[concat!($prefix, "DeviceGetCount")],
            device_attribute: &[concat!($prefix, "DeviceGetAttribute")],
            device_name: &[concat!($prefix, "DeviceGetName")],
            alloc: &[concat!($prefix, "MemAlloc_v2")],
            free: &[concat!($prefix, "MemFree_v2")],
            host_alloc: &[concat!($prefix, "MemHostAlloc")],
            host_address: &[concat!($prefix, "MemHostGetDevicePointer_v2")],
            host_free: &[concat!($prefix, "MemFreeHost")],
            copy_to_device: &[concat!($prefix, "MemcpyHtoD_v2")],
            copy_to_host: &[concat!($prefix, "MemcpyDtoH_v2")],
            copy_on_device: &[concat!($prefix, "MemcpyDtoDAsync_v2")],
            fill_bytes: &[concat!($prefix, "MemsetD8Async")],
            fill_words: &[concat!($prefix, "MemsetD32Async")],
            synchronize: &[concat!($prefix, "CtxSynchronize")],
            stream_create: &[concat!($prefix, "StreamCreate")],
            stream_destroy: &[concat!($prefix, "StreamDestroy_v2")],
            stream_synchronize: &[concat!($prefix, "StreamSynchronize")],
            event_create: &[concat!($prefix, "EventCreate")],
            event_destroy: &[concat!($prefix, "EventDestroy_v2")],
            event_record: &[concat!($prefix, "EventRecord")],
            event_synchronize: &[concat!($prefix, "EventSynchronize")],
            event_elapsed: &[concat!($prefix, "EventElapsedTime")],
            module_load: &[concat!($prefix, "ModuleLoadData")],
            module_unload: &[concat!($prefix, "ModuleUnload")],
            module_function: &[concat!($prefix, "ModuleGetFunction")],
            launch: &[concat!($prefix, "LaunchKernel")],
        }
    };
}
pub(super) use cuda_style_symbols;

/// CUDA's numbers of WARP_SIZE, MULTIPROCESSOR_COUNT, MAX_SHARED_MEMORY_PER_BLOCK, and of the compute capability.
pub(super) const ATTRIBUTES: super::vendor::Attributes =
    super::vendor::Attributes { warp_size: 10, multiprocessors: 16, shared_memory_per_block: 8 };
pub(super) const CAPABILITY: [std::ffi::c_int; 2] = [75, 76];
/// PORTABLE | DEVICEMAP.
pub(super) const HOST_ALLOC_FLAGS: u32 = 0x1 | 0x2;
