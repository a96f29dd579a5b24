//! The order in which a kernel's binary is looked for.
//!
//! What build.rs embedded, a file of the module folder, the disk cache, the run-time compilers one after the other. A
//! binary that the device refuses (made for a newer driver, for another chip) is passed over, and the next one is tried.

use std::path::PathBuf;
use std::sync::OnceLock;

use super::cache::{DiskCache, Key};
use super::rtc::{Compiled, Compiler, Names, Source};
use crate::error::{MlaError, Result};

/// One compilation, which makes one binary.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) backend: &'static str,
    pub(crate) unit: &'a str,
    pub(crate) source: Source<'a>,
    /// Architecture and defines: all that decides what comes out, beside the source and the compiler.
    pub(crate) options: &'a [String],
}

/// Where a module's binary came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Embedded,
    Folder,
    Cache,
    /// By the compiler of this name.
    Compiled(&'static str),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Embedded => f.write_str("embedded"),
            Origin::Folder => f.write_str("from the module folder"),
            Origin::Cache => f.write_str("from the disk cache"),
            Origin::Compiled(compiler) => write!(f, "compiled by {compiler}"),
        }
    }
}

/// The compilers of a platform, looked for when the first one is needed.
pub(crate) struct Compilers {
    names: &'static Names,
    candidates: Vec<PathBuf>,
    loaded: OnceLock<(Vec<Compiler>, Vec<String>)>,
}

impl Compilers {
    /// Compilers by these names in any of these libraries, best first.
    pub(crate) fn new(names: &'static Names, candidates: Vec<PathBuf>) -> Compilers {
        Compilers { names, candidates, loaded: OnceLock::new() }
    }

    /// Those that are here, and why the others are not.
    fn get(&self) -> (&[Compiler], &[String]) {
        let (found, missing) = self.loaded.get_or_init(|| {
            let (mut found, mut missing) = (Vec::new(), Vec::new());
            for candidate in &self.candidates {
                match Compiler::load(self.names, candidate) {
                    Ok(compiler) => found.push(compiler),
                    Err(e) => missing.push(e.to_string()),
                }
            }
            (found, missing)
        });
        (found, missing)
    }
}

/// Where a binary may come from.
pub(crate) struct Supplies<'a> {
    pub(crate) embedded: Option<&'a [u8]>,
    /// A file that holds it, if it is there.
    pub(crate) file: Option<PathBuf>,
    pub(crate) cache: Option<&'a DiskCache>,
    pub(crate) compilers: &'a Compilers,
}

impl Job<'_> {
    /// Compiles, with further options that do not change the binary.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with the compiler's log.
    pub(crate) fn compile(&self, compiler: &Compiler, extra: &[&str]) -> Result<Compiled> {
        let mut options = self.options.to_vec();
        options.extend(extra.iter().map(|o| (*o).to_string()));
        compiler.compile(&self.source, &options)
    }

    /// Compiles with the first compiler found.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with the compiler's log, or with everything that was tried.
    #[cfg(feature = "driver")]
    pub(crate) fn compile_with(&self, compilers: &Compilers) -> Result<Compiled> {
        let (found, missing) = compilers.get();
        let compiler = found
            .first()
            .ok_or_else(|| MlaError::Absent { backend: compilers.names.compiler.into(), reason: missing.join("; ") })?;
        self.compile(compiler, &[])
    }

    fn key(&self, compiler: &Compiler, names: &Names) -> Key {
        let (options, version) = (self.options.join("\0"), format!("{} {:?}", names.compiler, compiler.version()));
        let own = [self.source.text, &options, &version];
        let headers = self.source.headers.iter().flat_map(|(name, text)| [*name, *text]);
        Key::new(own.into_iter().chain(headers).map(str::as_bytes))
    }

    /// The first binary that `load` accepts.
    ///
    /// # Errors
    /// [`MlaError::Platform`] with everything that was tried.
    pub(crate) fn obtain<M>(&self, supplies: &Supplies<'_>, load: impl Fn(&[u8], Origin) -> Result<M>) -> Result<M> {
        let mut reasons = Vec::new();
        if let Some(binary) = supplies.embedded {
            match load(binary, Origin::Embedded) {
                Ok(module) => return Ok(module),
                Err(e) => reasons.push(format!("embedded: {e}")),
            }
        }
        if let Some(path) = &supplies.file {
            let read = std::fs::read(path).map_err(|e| e.to_string());
            match read.and_then(|binary| load(&binary, Origin::Folder).map_err(|e| e.to_string())) {
                Ok(module) => return Ok(module),
                Err(e) => reasons.push(format!("{}: {e}", path.display())),
            }
        }
        let (compilers, missing) = supplies.compilers.get();
        if compilers.is_empty() {
            reasons.extend(missing.iter().cloned());
        }
        for compiler in compilers {
            match self.compile_or_read(compiler, supplies, &load) {
                Ok(module) => return Ok(module),
                Err(e) => reasons.push(format!("{}: {e}", compiler.path().display())),
            }
        }
        let message = format!("unit {}: {}", self.unit, reasons.join("; "));
        Err(MlaError::Platform { backend: self.backend, call: "kernel loading", message })
    }

    fn compile_or_read<M>(
        &self,
        compiler: &Compiler,
        supplies: &Supplies<'_>,
        load: &impl Fn(&[u8], Origin) -> Result<M>,
    ) -> Result<M> {
        let names = supplies.compilers.names;
        let key = self.key(compiler, names);
        let name = format!("{}-{}", self.backend, self.unit);
        if let Some(binary) = supplies.cache.and_then(|cache| cache.read(&name, key)) {
            // A cached binary that is refused (the driver was changed) falls through to the compiler.
            if let Ok(module) = load(&binary, Origin::Cache) {
                return Ok(module);
            }
        }
        let compiled = self.compile(compiler, &[])?;
        let module = load(&compiled.binary, Origin::Compiled(names.compiler))?;
        if let Some(cache) = supplies.cache {
            cache.write(&name, key, &compiled.binary);
        }
        Ok(module)
    }
}
