//! Vendors whose drivers have the shape of CUDA's: one table of functions, loaded at run time, and the portable kernels.
//!
//! | file | job |
//! |---|---|
//! | `table.rs` | the functions' signatures; loading; every code checked |
//! | `vendor.rs` | what differs from vendor to vendor |
//! | `hip.rs` | AMD and Hygon |
//! | `hip_linked.rs` | the same table from linked symbols (feature `hip-sys`) |
//! | `device.rs` | a device, what is asked of it, the guard that makes it current |
//! | `api.rs` | memory, streams, launches, for `src/device` |
//! | `backend.rs` | the portable backend on such a device |
//!
//! # Adding a vendor
//! One file beside `hip.rs` (names, numbers, search order), one dialect header under `backends/`, one row in the
//! registry.

mod api;
mod backend;
mod device;
mod hip;
#[cfg(feature = "hip-sys")]
mod hip_linked;
mod table;
mod vendor;

use std::path::PathBuf;

pub use hip::{COMPILER_VARIABLE, LIBRARY_VARIABLE, NAME};

use crate::backend::Unsupported;
pub use crate::device::{DeviceBuffer, Graph, HostPlan, OwnedStream, Stream};
use crate::error::{MlaError, Result};
use crate::kernels::Compilers;
pub use crate::kernels::{CACHE_VARIABLE, Compiled};
use crate::portable::{self, units};
pub use crate::portable::{MODULE_DIR_VARIABLE, PortableBackend, PortableSchedule};
use crate::problem::Problem;

/// Opens the first device of HIP that the kernels run on.
///
/// # Errors
/// [`MlaError::Absent`] with the reason: no library (which were tried), no device, no way to get kernels.
pub fn hip() -> Result<PortableBackend> {
    backend::open(&hip::VENDOR, None)
}

/// Opens device `ordinal` of HIP.
///
/// # Errors
/// As [`hip`].
pub fn hip_device(ordinal: u32) -> Result<PortableBackend> {
    backend::open(&hip::VENDOR, Some(ordinal))
}

/// Whether the portable kernels can serve `problem` through HIP.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub fn supports(problem: &Problem) -> std::result::Result<(), Unsupported> {
    portable::supports(NAME, problem)
}

/// Every name that the HIP library may have here, in the order of trying.
pub fn library_candidates() -> Vec<PathBuf> {
    hip::VENDOR.candidates()
}

/// The kernels' source for HIP, self-contained, and how to compile it on a machine that has the compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSource {
    /// One file; it includes nothing.
    pub text: String,
    /// For each binary: its name without `.co`, and the compiler's options, but for input and output.
    pub binaries: Vec<(String, Vec<String>)>,
}

/// The kernels' source for one architecture of HIP.
///
/// # Errors
/// [`MlaError::Unsupported`] for an architecture whose waves are not 64 lanes wide or that is unknown.
pub fn kernel_source(arch: &str) -> Result<KernelSource> {
    let kib = class_of(arch)?;
    let binary = |(element, define): (&str, &str)| {
        let options = units::options(kib, define).into_iter().chain(units::clang_options(arch));
        (units::binary_name(NAME, arch, kib, element), options.collect())
    };
    Ok(KernelSource {
        text: hip::VENDOR.kernels.source()?,
        binaries: units::ELEMENTS.into_iter().map(binary).collect(),
    })
}

/// Compiles the kernels with the run-time compiler found here. Needs no device. Old versions of the compiler abort the
/// process on an architecture that they do not know: ask in a process of its own.
///
/// # Errors
/// As [`kernel_source`]; [`MlaError::Platform`] with the compiler's log.
pub fn compile_kernels(arch: &str) -> Result<Vec<(&'static str, Compiled)>> {
    let vendor = &hip::VENDOR;
    let compilers = Compilers::new(vendor.compiler, vendor.compilers(vendor.candidates()));
    vendor.kernels.compile(&compilers, arch, class_of(arch)?)
}

fn class_of(arch: &str) -> Result<u32> {
    units::hip_class(arch).ok_or_else(|| {
        let limit = "gfx9 with two digits (waves of 64 lanes), such as gfx90a, gfx942, gfx936".into();
        MlaError::from(Unsupported { backend: NAME, param: "arch", value: arch.into(), limit })
    })
}
