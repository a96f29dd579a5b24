//! From kernel sources to functions on the device.
//!
//! A *unit* is one source file with one set of defines; it makes one cubin. Where it comes from is the business of
//! [`crate::kernels`]: embedded where build.rs found nvcc, the disk cache, NVRTC.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{CUfunction, CUfunction_attribute, CUmodule};

use super::context::Context;
use super::nvrtc;
use crate::error::{MlaError, Result};
use crate::kernels::{Compiled, Compiler, Compilers, DiskCache, Job, Origin, Source, Supplies};

/// Names a folder to read kernel sources from instead of those built in. Saves rebuilding Rust while tuning.
pub const KERNEL_DIR_VARIABLE: &str = "POLYMLA_KERNEL_DIR";

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
        let Some(folder) = std::env::var_os(KERNEL_DIR_VARIABLE).filter(|v| !v.is_empty()) else {
            let built_in = self.files.iter().map(|(name, text)| (Cow::Borrowed(*name), Cow::Borrowed(*text)));
            return Ok((built_in.collect(), true));
        };
        let read = || -> std::io::Result<Vec<File>> {
            let mut files = Vec::new();
            for entry in std::fs::read_dir(&folder)? {
                let path = entry?.path();
                if let (Some(name), Some("cu" | "h")) =
                    (path.file_name().and_then(|n| n.to_str()), path.extension().and_then(|e| e.to_str()))
                {
                    files.push((name.to_string().into(), std::fs::read_to_string(&path)?.into()));
                }
            }
            // The order of a folder is no property of its files, and the key of the cache is made of all of them.
            files.sort();
            Ok(files)
        };
        let files = read().map_err(|e| self.error(KERNEL_DIR_VARIABLE, format!("{}: {e}", folder.display())))?;
        Ok((files, false))
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

/// A cubin loaded into a context.
pub(crate) struct Module {
    context: Arc<Context>,
    handle: CUmodule,
    origin: Origin,
}

// SAFETY: module and function handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    fn load(context: &Arc<Context>, cubin: &[u8], origin: Origin) -> Result<Module> {
        let _current = context.enter()?;
        let mut handle: CUmodule = std::ptr::null_mut();
        // The driver reads the length from the file's own header: it must at least have one.
        if !cubin.starts_with(b"\x7fELF") || cubin.len() < 64 {
            return Err(MlaError::Platform {
                backend: "cuda",
                call: "cuModuleLoadData",
                message: "not a cubin".into(),
            });
        }
        // SAFETY: a cubin made by a compiler, whole by checksum where it comes from the disk.
        unsafe { context.driver().cuModuleLoadData(&raw mut handle, cubin.as_ptr().cast())? };
        Ok(Module { context: context.clone(), handle, origin })
    }

    /// Where the binary came from.
    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let current = self.context.enter();
        // SAFETY: unloaded once, by the last of its functions.
        let _ = current.and_then(|_current| unsafe { self.context.driver().cuModuleUnload(self.handle) });
    }
}

/// A kernel, with the shared memory it may use.
pub(crate) struct Function {
    module: Arc<Module>,
    handle: CUfunction,
    shared_bytes: u32,
}

// SAFETY: as for `Module`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// The kernel of this name, allowed `shared_bytes` of dynamic shared memory.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(crate) fn new(module: &Arc<Module>, name: &str, shared_bytes: u32) -> Result<Function> {
        let context = &module.context;
        let _current = context.enter()?;
        let mut handle: CUfunction = std::ptr::null_mut();
        let lookup = CString::new(name).unwrap_or_default();
        // SAFETY: a live module and a null-terminated name.
        unsafe { context.driver().cuModuleGetFunction(&raw mut handle, module.handle, lookup.as_ptr()) }.map_err(
            |e| match e {
                MlaError::Platform { backend, call, message } => {
                    MlaError::Platform { backend, call, message: format!("{name}: {message}") }
                }
                other => other,
            },
        )?;
        // Above 48 KiB a kernel has to be told.
        if shared_bytes > 48 * 1024 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a live function.
            unsafe { context.driver().cuFuncSetAttribute(handle, attribute, shared_bytes as i32)? };
        }
        Ok(Function { module: module.clone(), handle, shared_bytes })
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.module.context
    }
    pub(crate) fn handle(&self) -> CUfunction {
        self.handle
    }
    pub(crate) fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }
}

/// The modules of a kernel set in one context, each loaded when it is first needed.
pub(crate) struct Loader {
    context: Arc<Context>,
    set: &'static KernelSet,
    files: Vec<File>,
    use_embedded: bool,
    cache: Option<DiskCache>,
    compilers: Compilers,
    modules: Mutex<BTreeMap<&'static str, Arc<Module>>>,
}

impl Loader {
    /// # Errors
    /// [`MlaError::Platform`] where the folder of [`KERNEL_DIR_VARIABLE`] cannot be read.
    pub(crate) fn new(context: &Arc<Context>, set: &'static KernelSet) -> Result<Loader> {
        let (files, use_embedded) = set.files()?;
        Ok(Loader {
            context: context.clone(),
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
        let load = |cubin: &[u8], origin| Module::load(&self.context, cubin, origin);
        self.set.with_job(&self.files, unit, |job| job.obtain(&supplies, load))
    }
}
