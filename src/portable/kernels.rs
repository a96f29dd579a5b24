//! The portable kernels in one dialect, on one device.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::source::{Files, ROOT, self_contained};
use super::tiles::{Decode, TileClass};
use super::units::{ELEMENTS, binary_name};
use crate::device::{Api, Module};
use crate::error::{MlaError, Result};
#[cfg(feature = "driver")]
use crate::kernels::Compiled;
use crate::kernels::{Compilers, DiskCache, Job, Source, Supplies, sources_of_environment};
use crate::tensor::DType;

/// Names a folder of binaries to load kernels from: what `polymla kernels` gives the command for.
pub const MODULE_DIR_VARIABLE: &str = "POLYMLA_MODULE_DIR";

/// A vendor's dialect, and what was compiled of it when this crate was built.
pub(crate) struct Dialect {
    /// The platform's name: of `backends/<platform>/`, of binaries, in errors.
    pub(crate) platform: &'static str,
    /// What lies in its folder.
    pub(crate) files: Files<'static>,
    /// Binaries by [`binary_name`].
    pub(crate) embedded: &'static [(&'static str, &'static [u8])],
    /// How the run-time compiler is asked: architecture, tile class, element type.
    pub(crate) options: fn(&str, u32, &str) -> Vec<String>,
    /// How a binary's file name ends.
    pub(crate) extension: &'static str,
    /// The smallest tile class whose kernels leave partial results as pieces (`backends/portable/pieces.h`).
    pub(crate) pieces_from_kib: Option<u32>,
}

impl Dialect {
    /// The kernels' source in one piece.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with the file that is missing.
    pub(crate) fn source(&self) -> Result<String> {
        self_contained(self.files, super::FILES).map_err(|message| self.error(message))
    }

    fn error(&self, message: String) -> MlaError {
        MlaError::Platform { backend: self.platform, call: "kernel source", message }
    }

    /// Compiles the kernels of both element types with the first run-time compiler found.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with the compiler's log.
    #[cfg(feature = "driver")]
    pub(crate) fn compile(&self, compilers: &Compilers, arch: &str, kib: u32) -> Result<Vec<(&'static str, Compiled)>> {
        let text = self.source()?;
        let one = |(element, define): (&'static str, &str)| {
            let options = (self.options)(arch, kib, define);
            Ok((element, self.job(element, &text, &options).compile_with(compilers)?))
        };
        ELEMENTS.into_iter().map(one).collect()
    }

    fn job<'a>(&self, unit: &'a str, text: &'a str, options: &'a [String]) -> Job<'a> {
        Job { backend: self.platform, unit, source: Source { name: ROOT, text, headers: &[] }, options }
    }
}

/// The binaries for one device, each loaded when it is first needed.
pub(crate) struct Kernels {
    device: Arc<dyn Api>,
    dialect: &'static Dialect,
    arch: String,
    class: TileClass,
    text: String,
    /// Whether the text is the one that embedded binaries were made of.
    built_in: bool,
    cache: Option<DiskCache>,
    compilers: Compilers,
    modules: [OnceLock<Arc<Module>>; 2],
}

impl Kernels {
    /// # Errors
    /// [`MlaError::Platform`] where the sources cannot be put together.
    pub(crate) fn new(
        device: &Arc<dyn Api>,
        dialect: &'static Dialect,
        arch: String,
        class: TileClass,
        compilers: Compilers,
    ) -> Result<Kernels> {
        let folder = sources_of_environment(dialect.platform)?;
        let text = match &folder {
            None => dialect.source()?,
            Some(files) => {
                let files: Vec<_> = files.iter().map(|(name, text)| (&**name, &**text)).collect();
                self_contained(&files, &[]).map_err(|message| dialect.error(message))?
            }
        };
        Ok(Kernels {
            device: device.clone(),
            dialect,
            arch,
            class,
            text,
            built_in: folder.is_none(),
            cache: DiskCache::of_environment(),
            compilers,
            modules: [const { OnceLock::new() }; 2],
        })
    }

    /// The tile class that the kernels are compiled for.
    pub(crate) fn class(&self) -> &TileClass {
        &self.class
    }

    /// Whether a decode kernel leaves partial results as pieces, which the merge kernel takes, not the combine kernel.
    pub(crate) fn leaves_pieces(&self, decode: Decode) -> bool {
        decode.is_tuned() && self.dialect.pieces_from_kib.is_some_and(|kib| self.class.kib >= kib)
    }

    /// The kernels of an element type.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with everything that was tried.
    pub(crate) fn module(&self, dtype: DType) -> Result<Arc<Module>> {
        let index = usize::from(dtype != DType::Bf16);
        let cell = &self.modules[index];
        if let Some(module) = cell.get() {
            return Ok(module.clone());
        }
        let (element, define) = ELEMENTS[index];
        let name = binary_name(self.dialect.platform, &self.arch, self.class.kib, element);
        let folder = std::env::var_os(MODULE_DIR_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        let embedded = self.dialect.embedded.iter().find(|(n, _)| self.built_in && *n == name);
        let supplies = Supplies {
            embedded: embedded.map(|(_, binary)| *binary),
            file: folder.map(|folder| folder.join(format!("{name}.{}", self.dialect.extension))),
            cache: self.cache.as_ref(),
            compilers: &self.compilers,
        };
        let options = (self.dialect.options)(&self.arch, self.class.kib, define);
        let load = |binary: &[u8], origin| Module::load(&self.device, binary, origin);
        // Two threads may load the same one; the first stays.
        let module = Arc::new(self.dialect.job(&name, &self.text, &options).obtain(&supplies, load)?);
        Ok(cell.get_or_init(|| module).clone())
    }
}
