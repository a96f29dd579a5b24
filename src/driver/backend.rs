//! Opening the portable backend through a vendor's driver.

use std::sync::Arc;

use super::device::Accelerator;
use super::vendor::Vendor;
use crate::backend::Unsupported;
use crate::error::{MlaError, Result};
use crate::kernels::Compilers;
use crate::portable::{Kernels, PortableBackend};

/// Opens a device, or the first that the kernels run on.
///
/// # Errors
/// [`MlaError::Absent`] with the reason: no library, no device, no way to get kernels.
pub(super) fn open(vendor: &'static Vendor, ordinal: Option<u32>) -> Result<PortableBackend> {
    let absent = |reason: String| MlaError::Absent { backend: vendor.platform.into(), reason };
    let driver = vendor.get().map_err(absent)?;
    let mut count = 0;
    // SAFETY: a pointer to a local.
    unsafe { driver.device_count(&raw mut count) }.map_err(|e| absent(e.to_string()))?;
    let candidates = ordinal.map_or(0..count.unsigned_abs(), |o| o..o.saturating_add(1));
    let mut reasons = Vec::new();
    for ordinal in candidates {
        match Accelerator::open(driver, ordinal).and_then(on) {
            Ok(backend) => return Ok(backend),
            Err(e) => reasons.push(format!("device {ordinal}: {e}")),
        }
    }
    Err(absent(if reasons.is_empty() { "no device".into() } else { reasons.join("; ") }))
}

fn on(device: Arc<Accelerator>) -> Result<PortableBackend> {
    let (driver, facts) = (device.driver, device.facts.clone());
    let vendor = driver.vendor;
    let refuse = |param, value: String, limit: &str| {
        MlaError::from(Unsupported { backend: vendor.platform, param, value, limit: limit.into() })
    };
    if !vendor.warps.contains(&facts.warp_size) {
        let limit: Vec<_> = vendor.warps.iter().map(ToString::to_string).collect();
        return Err(refuse("warp size", facts.warp_size.to_string(), &limit.join(" or ")));
    }
    let class = (vendor.class)(facts.warp_size, facts.shared_memory_per_block).ok_or_else(|| {
        refuse(
            "shared memory a block",
            facts.shared_memory_per_block.to_string(),
            "64 KiB or more; 28 where warps have 128 lanes",
        )
    })?;
    let compilers = Compilers::new(vendor.compiler, vendor.compilers([driver.library.clone().into()]));
    let device: Arc<dyn crate::device::Api> = device;
    let kernels = Kernels::new(&device, &vendor.kernels, facts.arch.clone(), class, compilers)?;
    let words = format!(
        "{} ({}), {} multiprocessors, {} version {}",
        facts.name, facts.arch, facts.multiprocessors, driver.library, driver.version
    );
    PortableBackend::new(device, vendor.platform, &words, facts.multiprocessors, kernels, driver.evidence)
}
