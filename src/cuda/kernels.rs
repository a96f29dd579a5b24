//! From kernel sources to functions on the device.
//!
//! A *unit* is one source file with one set of defines; it makes one cubin. Where it comes from is the business of
//! [`crate::kernels`]: embedded where build.rs found nvcc, the disk cache, NVRTC.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::context::Context;
use super::nvrtc;
use crate::device::{Api, Module};
use crate::error::{MlaError, Result};
use crate::kernels::{Compiled, Compiler, Compilers, DiskCache, Job, Source, Supplies, sources_of_environment};

/// Name, source file, defines.
pub(crate) type Unit = (&'static str, &'static str, &'static [&'static str]);

/// The kernels of one backend, as they were when this crate was built.
pub(crate) struct KernelSet {
    /// The backend.
    pub(crate) backend: &'static str,
    /// What is compiled for: `sm_90a`.
    pub(crate) arch: &'static str,
    /// Sources and headers, by file name.
    pub(crate) files: &'static [(&'static str, &'static str)],
    pub(crate) units: &'static [Unit],
    /// Cubins by unit name; empty where build.rs found no nvcc.
    pub(crate) embedded: &'static [(&'static str, &'static [u8])],
}

type File = (Cow<'static, str>, Cow<'static, str>);

impl KernelSet {
    fn unit(&self, name: &str) -> Result<Unit> {
        self.units.iter().find(|(n, ..)| *n == name).copied().ok_or_else(|| self.error("unit", format!("no {name}")))
    }

    fn error(&self, call: &'static str, message: String) -> MlaError {
        MlaError::Platform { backend: self.backend, call, message }
    }

    /// The files to compile, and whether they are the ones that the embedded cubins were made of.
    fn files(&self) -> Result<(Vec<File>, bool)> {
        Ok(match sources_of_environment(self.backend)? {
            Some(files) => (files.into_iter().map(|(name, text)| (name.into(), text.into())).collect(), false),
            None => (self.files.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect(), true),
        })
    }

    fn options(&self, defines: &[&str]) -> Vec<String> {
        let mut options = vec!["-std=c++17".to_string(), format!("--gpu-architecture={}", self.arch)];
        options.extend(defines.iter().map(|d| format!("-D{d}")));
        options
    }

    /// Hands `body` the compilation that makes a unit.
    fn with_job<R>(&self, files: &[File], unit: Unit, body: impl FnOnce(&Job<'_>) -> Result<R>) -> Result<R> {
        let (name, file, defines) = unit;
        let headers: Vec<(&str, &str)> =
            files.iter().filter(|(name, _)| name.ends_with(".h")).map(|(n, t)| (&**n, &**t)).collect();
        let found = files.iter().find(|(name, _)| name == file);
        let (_, text) = found.ok_or_else(|| self.error("unit", format!("source {file} is missing")))?;
        let source = Source { name: file, text, headers: &headers };
        body(&Job { backend: self.backend, unit: name, source, options: &self.options(defines) })
    }

    /// Compiles every unit with the NVRTC library of this path, with the compiler's resource report in each log.
    ///
    /// # Errors
    /// [`MlaError::Platform`], with the unit and the log.
    pub(crate) fn compile_all(&self, library: &Path) -> Result<CompiledKernels> {
        let nvrtc = Compiler::load(&nvrtc::NAMES, library)?;
        let (files, _) = self.files()?;
        let one = |unit: &Unit| {
            let compiled = self.with_job(&files, *unit, |job| job.compile(&nvrtc, &["--ptxas-options=-v"]))?;
            Ok((unit.0, compiled))
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let chunk = self.units.len().div_ceil(threads).max(1);
        let all: Result<Vec<_>> = std::thread::scope(|scope| {
            let work = self.units.chunks(chunk).map(|units| scope.spawn(|| units.iter().map(one).collect()));
            let joined: Vec<_> = work.collect::<Vec<_>>().into_iter().map(|thread| thread.join()).collect();
            let panicked = |_| Err(self.error("compile", "the thread panicked".into()));
            let lists: Result<Vec<Vec<_>>> = joined.into_iter().map(|r| r.unwrap_or_else(panicked)).collect();
            Ok(lists?.into_iter().flatten().collect())
        });
        Ok(CompiledKernels { version: nvrtc.version(), units: all? })
    }
}

/// What one compiler made of all kernels of a backend.
#[derive(Debug, Clone)]
pub struct CompiledKernels {
    /// The compiler's version: major, minor.
    pub version: (i32, i32),
    /// Each kernel's name, binary and log.
    pub units: Vec<(&'static str, Compiled)>,
}

/// The modules of a kernel set in one context, each loaded when it is first needed.
pub(crate) struct Loader {
    device: Arc<dyn Api>,
    set: &'static KernelSet,
    files: Vec<File>,
    use_embedded: bool,
    cache: Option<DiskCache>,
    compilers: Compilers,
    modules: Mutex<BTreeMap<&'static str, Arc<Module>>>,
}

impl Loader {
    /// # Errors
    /// [`MlaError::Platform`] where the folder of [`KERNEL_DIR_VARIABLE`](crate::kernels::KERNEL_DIR_VARIABLE) cannot be read.
    pub(crate) fn new(context: &Arc<Context>, set: &'static KernelSet) -> Result<Loader> {
        let (files, use_embedded) = set.files()?;
        Ok(Loader {
            device: context.clone(),
            set,
            files,
            use_embedded,
            cache: DiskCache::of_environment(),
            compilers: Compilers::new(&nvrtc::NAMES, nvrtc::candidates(context.driver().version().0)),
            modules: Mutex::default(),
        })
    }

    /// The module of a unit, loaded or compiled if it was not yet.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with everything that was tried.
    pub(crate) fn module(&self, unit: &str) -> Result<Arc<Module>> {
        let unit = self.set.unit(unit)?;
        let loaded = || self.modules.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(module) = loaded().get(unit.0) {
            return Ok(module.clone());
        }
        // Not under the lock, so that units compile in parallel. Two threads may load the same one; the first stays.
        let module = Arc::new(self.load(unit)?);
        Ok(loaded().entry(unit.0).or_insert(module).clone())
    }

    /// The modules of several units, compiled in parallel where they have to be.
    ///
    /// # Errors
    /// As [`module`](Self::module).
    pub(crate) fn modules(&self, units: &[&str]) -> Result<Vec<Arc<Module>>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = units.iter().map(|unit| scope.spawn(|| self.module(unit))).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|r| r.unwrap_or_else(|_| Err(self.set.error("compile", "the thread panicked".into())))).collect()
        })
    }

    fn load(&self, unit: Unit) -> Result<Module> {
        let embedded = self.set.embedded.iter().find(|(name, _)| self.use_embedded && *name == unit.0);
        let supplies = Supplies {
            embedded: embedded.map(|(_, cubin)| *cubin),
            file: None,
            cache: self.cache.as_ref(),
            compilers: &self.compilers,
        };
        let load = |cubin: &[u8], origin| Module::load(&self.device, cubin, origin);
        self.set.with_job(&self.files, unit, |job| job.obtain(&supplies, load))
    }
}
