//! The portable kernels of a vendor's dialect, on a device.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::device::Accelerator;
use super::module::Module;
use super::vendor::Vendor;
use crate::error::{MlaError, Result};
use crate::kernels::{Compiled, Compilers, DiskCache, Job, Source, Supplies};
use crate::portable::units::{ELEMENTS, binary_name, options};
use crate::portable::{Files, ROOT, TileClass, self_contained};
use crate::tensor::DType;

/// Names a folder of binaries to load kernels from: what `polymla kernels` gives the command for.
pub const MODULE_DIR_VARIABLE: &str = "POLYMLA_MODULE_DIR";

/// A vendor's dialect, and what was compiled of it when this crate was built.
pub(super) struct Dialect {
    /// `backends/<vendor>/`.
    pub(super) files: Files,
    /// Lanes of a warp that the dialect is written for.
    pub(super) warp: u32,
    /// Binaries by [`binary_name`].
    pub(super) embedded: &'static [(&'static str, &'static [u8])],
    /// The compiler's option that names the architecture, up to the name.
    pub(super) arch_option: &'static str,
}

impl Vendor {
    /// The kernels' source in one piece.
    pub(super) fn source(&self) -> Result<String> {
        self_contained(self.kernels.files, crate::portable::FILES).map_err(|message| MlaError::Platform {
            backend: self.platform,
            call: "kernel source",
            message,
        })
    }

    /// Compiles the kernels of both element types with the first run-time compiler found.
    pub(super) fn compile(&self, arch: &str, kib: u32) -> Result<Vec<(&'static str, Compiled)>> {
        let compilers = Compilers::new(self.compiler, self.compilers(self.candidates()));
        let text = self.source()?;
        let one = |(element, define): (&'static str, &str)| {
            let options = self.options(arch, kib, define);
            Ok((element, self.job(element, &text, &options).compile_with(&compilers)?))
        };
        ELEMENTS.into_iter().map(one).collect()
    }

    fn options(&self, arch: &str, kib: u32, define: &str) -> Vec<String> {
        let mut options = options(kib, define);
        options.push(format!("{}{arch}", self.kernels.arch_option));
        options
    }

    fn job<'a>(&self, unit: &'a str, text: &'a str, options: &'a [String]) -> Job<'a> {
        Job { backend: self.platform, unit, source: Source { name: ROOT, text, headers: &[] }, options }
    }
}

/// The binaries for one device, each loaded when it is first needed.
pub(super) struct Kernels {
    device: Arc<Accelerator>,
    class: TileClass,
    text: String,
    cache: Option<DiskCache>,
    compilers: Compilers,
    modules: [OnceLock<Arc<Module>>; 2],
}

impl Kernels {
    pub(super) fn new(device: &Arc<Accelerator>, class: TileClass) -> Result<Kernels> {
        let vendor = device.driver.vendor;
        Ok(Kernels {
            device: device.clone(),
            class,
            text: vendor.source()?,
            cache: DiskCache::of_environment(),
            compilers: Compilers::new(vendor.compiler, vendor.compilers([device.driver.library.clone().into()])),
            modules: [const { OnceLock::new() }; 2],
        })
    }

    /// The tile class that the kernels are compiled for.
    pub(super) fn class(&self) -> &TileClass {
        &self.class
    }

    /// The kernels of an element type.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with everything that was tried.
    pub(super) fn module(&self, dtype: DType) -> Result<Arc<Module>> {
        let index = usize::from(dtype != DType::Bf16);
        let cell = &self.modules[index];
        if let Some(module) = cell.get() {
            return Ok(module.clone());
        }
        let (element, define) = ELEMENTS[index];
        let (vendor, arch) = (self.device.driver.vendor, &self.device.facts.arch);
        let name = binary_name(vendor.platform, arch, self.class.kib, element);
        let folder = std::env::var_os(MODULE_DIR_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        let supplies = Supplies {
            embedded: vendor.kernels.embedded.iter().find(|(n, _)| *n == name).map(|(_, binary)| *binary),
            file: folder.map(|folder| folder.join(format!("{name}.co"))),
            cache: self.cache.as_ref(),
            compilers: &self.compilers,
        };
        let options = vendor.options(arch, self.class.kib, define);
        let load = |binary: &[u8], origin| Module::load(&self.device, binary, origin);
        // Two threads may load the same one; the first stays.
        let module = Arc::new(vendor.job(&name, &self.text, &options).obtain(&supplies, load)?);
        Ok(cell.get_or_init(|| module).clone())
    }
}
