//! Vendors whose drivers have the shape of CUDA's: one table of functions, loaded at run time, and the portable kernels.
//!
//! | file | job |
//! |---|---|
//! | `table.rs` | the functions' signatures; loading; every code checked |
//! | `vendor.rs` | what differs from vendor to vendor |
//! | `hip.rs` | AMD and Hygon |
//! | `musa.rs`, `maca.rs`, `corex.rs` | Moore Threads, MetaX, Iluvatar |
//! | `cuda_style.rs` | names of drivers that are CUDA's under another prefix |
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
#[cfg(feature = "corex")]
mod corex;
#[cfg(any(feature = "musa", feature = "corex"))]
mod cuda_style;
mod device;
#[cfg(feature = "hip")]
mod hip;
#[cfg(feature = "hip-sys")]
mod hip_linked;
#[cfg(feature = "maca")]
mod maca;
#[cfg(feature = "musa")]
mod musa;
mod table;
mod vendor;

use std::path::PathBuf;

#[cfg(feature = "hip")]
pub use hip::{COMPILER_VARIABLE, LIBRARY_VARIABLE, NAME};
use vendor::Vendor;

use crate::backend::Unsupported;
pub use crate::device::{DeviceBuffer, Graph, HostPlan, OwnedStream, Stream};
use crate::error::{MlaError, Result};
use crate::kernels::Compilers;
pub use crate::kernels::{CACHE_VARIABLE, Compiled};
use crate::portable::{self, units};
pub use crate::portable::{MODULE_DIR_VARIABLE, PortableBackend, PortableSchedule};
use crate::problem::Problem;

/// The vendors of this build.
static VENDORS: &[&Vendor] = &[
    #[cfg(feature = "hip")]
    &hip::VENDOR,
    #[cfg(feature = "musa")]
    &musa::VENDOR,
    #[cfg(feature = "maca")]
    &maca::VENDOR,
    #[cfg(feature = "corex")]
    &corex::VENDOR,
];

fn vendor(name: &str) -> Result<&'static Vendor> {
    VENDORS.iter().find(|v| v.platform == name).copied().ok_or_else(|| {
        let built: Vec<_> = VENDORS.iter().map(|v| v.platform).collect();
        let reason = format!("this build has the kernels of {}", built.join(", "));
        MlaError::Absent { backend: name.into(), reason }
    })
}

/// Opens the first device of a vendor (`hip`, `musa`, `maca`, `corex`) that the kernels run on.
///
/// # Errors
/// [`MlaError::Absent`] with the reason: not in this build, no library (which were tried), no device, no way to get kernels.
pub fn open(name: &str) -> Result<PortableBackend> {
    backend::open(vendor(name)?, None)
}

/// Opens device `ordinal` of a vendor.
///
/// # Errors
/// As [`open`].
pub fn open_device(name: &str, ordinal: u32) -> Result<PortableBackend> {
    backend::open(vendor(name)?, Some(ordinal))
}

/// Opens the first device of HIP that the kernels run on.
///
/// # Errors
/// As [`open`].
#[cfg(feature = "hip")]
pub fn hip() -> Result<PortableBackend> {
    open(NAME)
}

/// Opens device `ordinal` of HIP.
///
/// # Errors
/// As [`open`].
#[cfg(feature = "hip")]
pub fn hip_device(ordinal: u32) -> Result<PortableBackend> {
    open_device(NAME, ordinal)
}

/// Whether the portable kernels can serve `problem` through the driver of a vendor.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub fn supports(name: &'static str, problem: &Problem) -> std::result::Result<(), Unsupported> {
    portable::supports(name, problem)
}

/// Every name that a vendor's library may have here, in the order of trying; none for a vendor that is not in this build.
pub fn library_candidates(name: &str) -> Vec<PathBuf> {
    vendor(name).map_or_else(|_| Vec::new(), Vendor::candidates)
}

/// The kernels' source for a vendor, self-contained, and how to compile it on a machine that has the compiler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSource {
    /// One file; it includes nothing.
    pub text: String,
    /// How the file's name ends, for the compiler to know its language.
    pub language: &'static str,
    /// The compiler, and the environment variable that names another.
    pub compiler: (&'static str, &'static str),
    /// For each binary: its file's name, and the compiler's options, but for input and output.
    pub binaries: Vec<(String, Vec<String>)>,
}

/// The kernels' source for one architecture of a vendor.
///
/// # Errors
/// [`MlaError::Unsupported`] for an architecture that is unknown; [`MlaError::Absent`] for a vendor that is not in this build.
pub fn kernel_source(name: &str, arch: &str) -> Result<KernelSource> {
    let vendor = vendor(name)?;
    let (kib, compile) = shape_of(name, arch)?;
    let binary = |(element, define): (&str, &str)| {
        let file = format!("{}.{}", units::binary_name(name, arch, kib, element), vendor.kernels.extension);
        let options = (vendor.kernels.options)(arch, kib, define);
        (file, options.into_iter().chain(compile.options.iter().map(|o| (*o).to_string())).collect())
    };
    let binaries = units::ELEMENTS.into_iter().map(binary).collect();
    let (language, compiler) = (compile.language, compile.compiler);
    Ok(KernelSource { text: vendor.kernels.source()?, language, compiler, binaries })
}

/// Compiles the kernels with the run-time compiler found here. Needs no device. Old versions of hiprtc abort the process on an
/// architecture that they do not know: ask in a process of its own.
///
/// # Errors
/// As [`kernel_source`]; [`MlaError::Platform`] with the compiler's log.
pub fn compile_kernels(name: &str, arch: &str) -> Result<Vec<(&'static str, Compiled)>> {
    let vendor = vendor(name)?;
    let compilers = Compilers::new(vendor.compiler, vendor.compilers(vendor.candidates()));
    vendor.kernels.compile(&compilers, arch, shape_of(name, arch)?.0)
}

/// How a vendor's compiler is called beside what decides the code.
struct Compile {
    language: &'static str,
    compiler: (&'static str, &'static str),
    options: &'static [&'static str],
}

/// The tile class of an architecture, in KiB, and how it is compiled for.
fn shape_of(name: &str, arch: &str) -> Result<(u32, Compile)> {
    let numbered = |prefix| {
        arch.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
    };
    let (kib, limit, compile) = match name {
        "hip" => (
            units::hip_class(arch),
            "gfx9 with two digits (waves of 64 lanes), such as gfx90a, gfx942, gfx936",
            Compile { language: "hip", compiler: ("hipcc", "HIPCC"), options: &units::CLANG_OPTIONS },
        ),
        // -x musa and --cuda-device-only are unconfirmed.
        "musa" => (
            units::musa_shape(arch).map(|(_, kib)| kib),
            "mp_21, mp_22 and mp_31",
            Compile { language: "mu", compiler: ("mcc", "MCC"), options: &["-x", "musa", "--cuda-device-only"] },
        ),
        "maca" => (
            numbered("xcore").then_some(64),
            "xcore with digits, such as xcore1000",
            Compile { language: "maca", compiler: ("mxcc", "MXCC"), options: &["-x", "maca", "-device-obj"] },
        ),
        _ => (
            numbered("ivcore").then_some(64),
            "ivcore with digits, such as ivcore11",
            Compile {
                language: "cu",
                compiler: ("clang++", "COREX_CXX"),
                options: &["-x", "cuda", "--cuda-device-only"],
            },
        ),
    };
    match kib {
        Some(kib) => Ok((kib, compile)),
        None => {
            let backend = vendor(name)?.platform;
            Err(Unsupported { backend, param: "arch", value: arch.into(), limit: limit.into() }.into())
        }
    }
}
