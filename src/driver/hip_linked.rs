//! HIP's functions from the linked library (feature `hip-sys`).
//!
//! hip-sys declares what functions return as an enum of the codes of ROCm 5.4; a newer library's code in such an enum
//! would be undefined behaviour. So its functions are called through the table's pointers, which return integers; that the
//! rest of each signature agrees is what the tests below have the compiler check.

use hip_sys::hiprt as hip;

use super::table::Table;

/// A linked function as a pointer of the table's type.
macro_rules! linked {
    ($name:ident) => {
        // SAFETY: a function. The types of arguments agree in the calling convention (enums of 32 bits for integers, pointers
        // for addresses and handles), as the tests check.
        unsafe { pointer_to(hip::$name as *const ()) }
    };
}

/// # Safety
/// `F` must be a type of function pointers, by which the function at `address` may be called.
unsafe fn pointer_to<F: Copy>(address: *const ()) -> F {
    const { assert!(size_of::<F>() == size_of::<*const ()>(), "not a function pointer") };
    // SAFETY: of the same size, and of the caller's choice.
    unsafe { std::mem::transmute_copy(&address) }
}

pub(super) fn table() -> Table {
    Table {
        error_name: linked!(hipGetErrorName),
        error_string: linked!(hipGetErrorString),
        init: linked!(hipInit),
        version: linked!(hipRuntimeGetVersion),
        device_count: linked!(hipGetDeviceCount),
        get_device: Some(linked!(hipGetDevice)),
        set_device: Some(linked!(hipSetDevice)),
        device_get: None,
        retain_context: None,
        get_context: None,
        set_context: None,
        device_attribute: linked!(hipDeviceGetAttribute),
        device_name: linked!(hipDeviceGetName),
        device_properties: Some(linked!(hipGetDeviceProperties)),
        alloc: linked!(hipMalloc),
        free: linked!(hipFree),
        host_alloc: linked!(hipHostMalloc),
        host_address: linked!(hipHostGetDevicePointer),
        host_free: linked!(hipHostFree),
        copy_to_device: linked!(hipMemcpyHtoD),
        copy_to_host: linked!(hipMemcpyDtoH),
        copy_on_device: linked!(hipMemcpyDtoDAsync),
        fill_bytes: linked!(hipMemsetD8Async),
        fill_words: linked!(hipMemsetD32Async),
        synchronize: linked!(hipDeviceSynchronize),
        stream_create: linked!(hipStreamCreateWithFlags),
        stream_destroy: linked!(hipStreamDestroy),
        stream_synchronize: linked!(hipStreamSynchronize),
        event_create: linked!(hipEventCreateWithFlags),
        event_destroy: linked!(hipEventDestroy),
        event_record: linked!(hipEventRecord),
        event_synchronize: linked!(hipEventSynchronize),
        event_elapsed: linked!(hipEventElapsedTime),
        module_load: linked!(hipModuleLoadData),
        module_unload: linked!(hipModuleUnload),
        module_function: linked!(hipModuleGetFunction),
        launch: linked!(hipModuleLaunchKernel),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};

    use super::*;
    use crate::device::Handle;
    use crate::driver::hip::{ATTRIBUTES, SYMBOLS};
    use crate::driver::table::Code;

    type Error = hip::hipError_t;

    /// Two types that a register holds alike.
    const fn alike<A, B>() {
        assert!(size_of::<A>() == size_of::<B>() && align_of::<A>() == align_of::<B>());
    }

    /// hip-sys's signatures, spelt with its own types: a change there does not compile. Beside each of its types, the
    /// table's.
    #[test]
    fn signatures_agree() {
        let _: unsafe extern "C" fn(Error) -> *const c_char = hip::hipGetErrorName;
        let _: unsafe extern "C" fn(Error) -> *const c_char = hip::hipGetErrorString;
        let _: unsafe extern "C" fn(c_uint) -> Error = hip::hipInit;
        let _: unsafe extern "C" fn(*mut c_int) -> Error = hip::hipRuntimeGetVersion;
        let _: unsafe extern "C" fn(*mut c_int) -> Error = hip::hipGetDeviceCount;
        let _: unsafe extern "C" fn(*mut c_int) -> Error = hip::hipGetDevice;
        let _: unsafe extern "C" fn(c_int) -> Error = hip::hipSetDevice;
        let _: unsafe extern "C" fn(*mut c_int, hip::hipDeviceAttribute_t, c_int) -> Error = hip::hipDeviceGetAttribute;
        let _: unsafe extern "C" fn(*mut c_char, c_int, hip::hipDevice_t) -> Error = hip::hipDeviceGetName;
        let _: unsafe extern "C" fn(*mut hip::hipDeviceProp_t, c_int) -> Error = hip::hipGetDeviceProperties;
        let _: unsafe extern "C" fn(*mut *mut c_void, usize) -> Error = hip::hipMalloc;
        let _: unsafe extern "C" fn(*mut c_void) -> Error = hip::hipFree;
        let _: unsafe extern "C" fn(*mut *mut c_void, usize, c_uint) -> Error = hip::hipHostMalloc;
        let _: unsafe extern "C" fn(*mut *mut c_void, *mut c_void, c_uint) -> Error = hip::hipHostGetDevicePointer;
        let _: unsafe extern "C" fn(*mut c_void) -> Error = hip::hipHostFree;
        let _: unsafe extern "C" fn(hip::hipDeviceptr_t, *mut c_void, usize) -> Error = hip::hipMemcpyHtoD;
        let _: unsafe extern "C" fn(*mut c_void, hip::hipDeviceptr_t, usize) -> Error = hip::hipMemcpyDtoH;
        let _: unsafe extern "C" fn(hip::hipDeviceptr_t, hip::hipDeviceptr_t, usize, hip::hipStream_t) -> Error =
            hip::hipMemcpyDtoDAsync;
        let _: unsafe extern "C" fn(hip::hipDeviceptr_t, c_uchar, usize, hip::hipStream_t) -> Error =
            hip::hipMemsetD8Async;
        let _: unsafe extern "C" fn(hip::hipDeviceptr_t, c_int, usize, hip::hipStream_t) -> Error =
            hip::hipMemsetD32Async;
        let _: unsafe extern "C" fn() -> Error = hip::hipDeviceSynchronize;
        let _: unsafe extern "C" fn(*mut hip::hipStream_t, c_uint) -> Error = hip::hipStreamCreateWithFlags;
        let _: unsafe extern "C" fn(hip::hipStream_t) -> Error = hip::hipStreamDestroy;
        let _: unsafe extern "C" fn(hip::hipStream_t) -> Error = hip::hipStreamSynchronize;
        let _: unsafe extern "C" fn(*mut hip::hipEvent_t, c_uint) -> Error = hip::hipEventCreateWithFlags;
        let _: unsafe extern "C" fn(hip::hipEvent_t) -> Error = hip::hipEventDestroy;
        let _: unsafe extern "C" fn(hip::hipEvent_t, hip::hipStream_t) -> Error = hip::hipEventRecord;
        let _: unsafe extern "C" fn(hip::hipEvent_t) -> Error = hip::hipEventSynchronize;
        let _: unsafe extern "C" fn(*mut f32, hip::hipEvent_t, hip::hipEvent_t) -> Error = hip::hipEventElapsedTime;
        let _: unsafe extern "C" fn(*mut hip::hipModule_t, *const c_void) -> Error = hip::hipModuleLoadData;
        let _: unsafe extern "C" fn(hip::hipModule_t) -> Error = hip::hipModuleUnload;
        let _: unsafe extern "C" fn(*mut hip::hipFunction_t, hip::hipModule_t, *const c_char) -> Error =
            hip::hipModuleGetFunction;
        let _: unsafe extern "C" fn(
            hip::hipFunction_t,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            hip::hipStream_t,
            *mut *mut c_void,
            *mut *mut c_void,
        ) -> Error = hip::hipModuleLaunchKernel;
        alike::<Error, Code>();
        alike::<hip::hipDeviceAttribute_t, c_int>();
        alike::<hip::hipDevice_t, c_int>();
        alike::<hip::hipDeviceptr_t, u64>();
        alike::<*mut c_void, u64>();
        alike::<hip::hipStream_t, Handle>();
        alike::<hip::hipEvent_t, Handle>();
        alike::<hip::hipModule_t, Handle>();
        alike::<hip::hipFunction_t, Handle>();
        assert!(size_of::<hip::hipDeviceProp_t>() <= 16 * 1024);
    }

    #[test]
    fn constants_agree() {
        use hip::hipDeviceAttribute_t as Attribute;
        assert_eq!(ATTRIBUTES.warp_size, Attribute::hipDeviceAttributeWarpSize as c_int);
        assert_eq!(ATTRIBUTES.multiprocessors, Attribute::hipDeviceAttributeMultiprocessorCount as c_int);
        assert_eq!(ATTRIBUTES.shared_memory_per_block, Attribute::hipDeviceAttributeMaxSharedMemoryPerBlock as c_int);
        assert_eq!(crate::driver::hip::VENDOR.host_alloc_flags, hip::hipHostMallocPortable | hip::hipHostMallocMapped);
        assert_eq!(Error::hipSuccess as Code, 0);
    }

    /// Every linked function is the one that loading by name would find.
    #[test]
    fn names_lead_to_the_linked_functions() {
        let linked = table();
        // SAFETY: this process's own symbols, and the library that it is linked with.
        let loaded = unsafe { Table::load(&libloading::os::unix::Library::this().into(), &SYMBOLS) };
        let loaded = loaded.expect("every name is there");
        let addresses = |t: &Table| {
            [t.init as usize, t.alloc as usize, t.launch as usize, t.module_load as usize, t.event_elapsed as usize]
        };
        assert_eq!(addresses(&linked), addresses(&loaded));
    }
}
