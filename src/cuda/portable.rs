//! The portable kernels on NVIDIA devices: `backends/portable/` in the CUDA dialect, compiled by NVRTC or embedded.

use std::ffi::c_void;
use std::sync::Arc;

use super::context::{Context, DeviceFacts};
use super::driver::Driver;
use super::nvrtc;
use crate::backend::{Evidence, Unsupported};
use crate::device::Api;
use crate::error::{MlaError, Result};
use crate::kernels::Compilers;
use crate::portable::{self, Dialect, Kernels, TileClass, units};
pub use crate::portable::{MODULE_DIR_VARIABLE, PortableBackend, PortableSchedule};
use crate::problem::Problem;

/// The backend's name.
pub const NAME: &str = "cuda";

/// The lowest compute capability that the dialect is written for.
const COMPUTE_CAPABILITY: (u32, u32) = (7, 5);

mod built {
    include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));
}

static DIALECT: Dialect = Dialect {
    platform: NAME,
    files: built::FILES,
    embedded: built::EMBEDDED,
    options: units::nvrtc_options,
    extension: "cubin",
    // What has less is Turing, for which the dialect multiplies by plain FMA.
    pieces_from_kib: Some(99),
};

fn absent(reason: String) -> MlaError {
    MlaError::Absent { backend: NAME.into(), reason }
}

/// Whether the portable kernels can serve `problem` on NVIDIA devices.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub fn supports(problem: &Problem) -> std::result::Result<(), Unsupported> {
    portable::supports(NAME, problem)
}

/// Opens the first device that the kernels run on, in its primary context.
///
/// # Errors
/// [`MlaError::Absent`] with the reason: no driver, no such device, no way to get kernels.
pub fn first_device() -> Result<PortableBackend> {
    let driver = Driver::get().map_err(absent)?;
    let mut count = 0;
    // SAFETY: a pointer to a local.
    unsafe { driver.cuDeviceGetCount(&raw mut count) }.map_err(|e| absent(e.to_string()))?;
    let mut reasons = Vec::new();
    for ordinal in 0..count.unsigned_abs() {
        match Context::primary(driver, ordinal).and_then(open) {
            Ok(backend) => return Ok(backend),
            Err(e) => reasons.push(format!("device {ordinal}: {e}")),
        }
    }
    Err(absent(if reasons.is_empty() { "no device".into() } else { reasons.join("; ") }))
}

/// Opens device `ordinal` in its primary context, the one that the CUDA runtime, PyTorch and cudarc use.
///
/// # Errors
/// As [`first_device`].
pub fn with_device(ordinal: u32) -> Result<PortableBackend> {
    let driver = Driver::get().map_err(absent)?;
    open(Context::primary(driver, ordinal).map_err(|e| absent(e.to_string()))?)
}

/// Works in a context (`CUcontext`) that the caller owns.
///
/// # Errors
/// As [`first_device`].
///
/// # Safety
/// `context` must be a live context, and outlive the backend and all that it makes.
pub unsafe fn from_context(context: *mut c_void) -> Result<PortableBackend> {
    let driver = Driver::get().map_err(absent)?;
    // SAFETY: the caller's promise.
    open(unsafe { Context::borrowed(driver, context.cast()) }.map_err(|e| absent(e.to_string()))?)
}

/// The tile class for a device. CoreX's driver has the names of NVIDIA's; its warps are 64 lanes wide.
fn class_of(facts: &DeviceFacts) -> Result<TileClass> {
    let (major, minor) = facts.compute_capability;
    let refuse = |param, value: String, limit: &str| {
        absent(Unsupported { backend: NAME, param, value, limit: limit.into() }.to_string())
    };
    if facts.warp_size != units::CUDA_WARP {
        return Err(refuse("warp size", facts.warp_size.to_string(), &units::CUDA_WARP.to_string()));
    }
    if facts.compute_capability < COMPUTE_CAPABILITY {
        return Err(refuse("compute capability", format!("{major}.{minor}"), "7.5 and later"));
    }
    TileClass::of(units::CUDA_WARP, facts.shared_memory_per_block)
        .ok_or_else(|| refuse("shared memory a block", facts.shared_memory_per_block.to_string(), "64 KiB or more"))
}

fn open(context: Arc<Context>) -> Result<PortableBackend> {
    let facts = context.facts().clone();
    let (major, minor) = facts.compute_capability;
    let class = class_of(&facts)?;
    let compilers = Compilers::new(&nvrtc::NAMES, nvrtc::candidates(context.driver().version().0));
    let device: Arc<dyn Api> = context;
    let kernels = Kernels::new(&device, &DIALECT, units::cuda_arch(major, minor), class, compilers)?;
    let words = format!("{} (sm_{major}{minor}), {} SMs", facts.name, facts.multiprocessors);
    PortableBackend::new(device, NAME, &words, facts.multiprocessors, kernels, Evidence::T5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_devices_with_nvidia_s_warps_are_taken() {
        let h200 = DeviceFacts {
            name: "H200".into(),
            ordinal: 0,
            compute_capability: (9, 0),
            multiprocessors: 132,
            warp_size: 32,
            shared_memory_per_block: 227 * 1024,
        };
        assert_eq!(class_of(&h200).expect("a class").kib, 227);
        let corex = DeviceFacts { warp_size: 64, ..h200.clone() };
        assert!(class_of(&corex).expect_err("CoreX's").to_string().contains("warp size 64"));
        let old = DeviceFacts { compute_capability: (7, 0), ..h200.clone() };
        assert!(class_of(&old).expect_err("too old").to_string().contains("compute capability 7.0"));
        let small = DeviceFacts { shared_memory_per_block: 48 * 1024, ..h200 };
        assert!(class_of(&small).is_err());
    }
}
