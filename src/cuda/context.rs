//! A device, the context its memory and kernels live in, and the guard that makes it current for a call.

use std::ffi::{CStr, c_char, c_int};
use std::sync::Arc;

use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute as Attribute};

use super::driver::{Driver, PLATFORM};
use crate::error::Result;
use crate::tensor::Device;

/// What is asked of a device once.
#[derive(Debug, Clone)]
pub(crate) struct DeviceFacts {
    pub(crate) name: String,
    pub(crate) ordinal: u32,
    pub(crate) compute_capability: (u32, u32),
    pub(crate) multiprocessors: u32,
    #[cfg(feature = "cuda")]
    pub(crate) warp_size: u32,
    /// What a block may ask for.
    #[cfg(feature = "cuda")]
    pub(crate) shared_memory_per_block: u32,
}

/// A context on one device. Everything allocated in it holds an [`Arc`] of it.
pub(crate) struct Context {
    driver: &'static Driver,
    handle: CUcontext,
    /// The device whose primary context is to be released in the end; `None` where the context is the caller's.
    retained: Option<CUdevice>,
    facts: DeviceFacts,
}

// SAFETY: a context may be used from any thread; handles are plain values to the driver, which locks for itself.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of a device: the one the CUDA runtime, PyTorch and cudarc use.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub(crate) fn primary(driver: &'static Driver, ordinal: u32) -> Result<Arc<Context>> {
        let mut device: CUdevice = 0;
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: pointers to locals; an ordinal out of range is an error code.
        unsafe { driver.cuDeviceGet(&raw mut device, ordinal)? };
        let facts = DeviceFacts::read(driver, device)?;
        let mut handle: CUcontext = std::ptr::null_mut();
        // SAFETY: `device` came from the driver. The retain is matched by a release in `drop`.
        unsafe { driver.cuDevicePrimaryCtxRetain(&raw mut handle, device)? };
        Ok(Arc::new(Context { driver, handle, retained: Some(device), facts }))
    }

    /// A context that the caller owns.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    ///
    /// # Safety
    /// `handle` must be a live context, and outlive everything made in it.
    pub(crate) unsafe fn borrowed(driver: &'static Driver, handle: CUcontext) -> Result<Arc<Context>> {
        let mut device: CUdevice = 0;
        {
            // SAFETY: the caller's promise.
            let _current = unsafe { Guard::push(driver, handle)? };
            // SAFETY: a context is current.
            unsafe { driver.cuCtxGetDevice(&raw mut device)? };
        }
        let facts = DeviceFacts::read(driver, device)?;
        Ok(Arc::new(Context { driver, handle, retained: None, facts }))
    }

    /// The driver's functions.
    pub(crate) fn driver(&self) -> &'static Driver {
        self.driver
    }
    /// What the device is.
    pub(crate) fn facts(&self) -> &DeviceFacts {
        &self.facts
    }
    /// The device in the contract's terms.
    pub(crate) fn device(&self) -> Device {
        Device::Accelerator { platform: PLATFORM, ordinal: self.facts.ordinal }
    }

    /// Makes this context current on this thread until the guard is dropped, then what was current before.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub(crate) fn enter(&self) -> Result<Guard> {
        // SAFETY: the context is alive: retained, or by the promise of `borrowed`.
        unsafe { Guard::push(self.driver, self.handle) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.retained {
            // SAFETY: matches the retain of `primary`. A failure means that the driver is gone, and the context too.
            let _ = unsafe { self.driver.cuDevicePrimaryCtxRelease_v2(device) };
        }
    }
}

/// A context that is current on this thread. It stays on the thread that made it.
pub(crate) struct Guard {
    driver: &'static Driver,
    pushed: bool,
    not_send: std::marker::PhantomData<*const ()>,
}

impl Guard {
    /// # Safety
    /// `handle` must be a live context.
    unsafe fn push(driver: &'static Driver, handle: CUcontext) -> Result<Guard> {
        let mut current: CUcontext = std::ptr::null_mut();
        // SAFETY: a pointer to a local.
        unsafe { driver.cuCtxGetCurrent(&raw mut current)? };
        let pushed = current != handle;
        if pushed {
            // SAFETY: the caller's promise.
            unsafe { driver.cuCtxPushCurrent_v2(handle)? };
        }
        Ok(Guard { driver, pushed, not_send: std::marker::PhantomData })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped: CUcontext = std::ptr::null_mut();
            // SAFETY: this thread pushed a context, and guards nest.
            let _ = unsafe { self.driver.cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}

impl DeviceFacts {
    fn read(driver: &Driver, device: CUdevice) -> Result<DeviceFacts> {
        let mut name = [0 as c_char; 128];
        // SAFETY: the buffer and its length; the driver ends the string with a null.
        unsafe { driver.cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device)? };
        // SAFETY: as above.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let attribute = |attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: a pointer to a local; `device` came from the driver.
            unsafe { driver.cuDeviceGetAttribute(&raw mut value, attribute, device)? };
            Ok(value.unsigned_abs())
        };
        Ok(DeviceFacts {
            name,
            // The driver hands out devices as their ordinals.
            ordinal: device.unsigned_abs(),
            compute_capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            #[cfg(feature = "cuda")]
            warp_size: attribute(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE)?,
            #[cfg(feature = "cuda")]
            shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    }
}
