//! What differs from vendor to vendor: names, numbers, search paths. One static value each.

use std::ffi::c_int;
use std::path::PathBuf;
use std::sync::OnceLock;

use super::table::{Driver, Symbols};
use crate::kernels::Names;
use crate::portable::{Dialect, TileClass};

/// A vendor whose programming interface has the shape of [`super::table`].
pub(super) struct Vendor {
    /// The platform's name: of the backend, of [`crate::Device::Accelerator`], in errors.
    pub(super) platform: &'static str,
    /// Whose it is, in words.
    pub(super) words: &'static str,
    /// Names one library to use, and no other.
    pub(super) library_variable: &'static str,
    /// The driver's library under its names, best first.
    pub(super) libraries: &'static [&'static str],
    /// Folders to look in beside the loader's path: an environment variable with its default, and what follows it.
    pub(super) folders: &'static [(&'static str, &'static str, &'static str)],
    pub(super) symbols: &'static Symbols,
    /// The kernels in this vendor's dialect, and the lanes of a warp that it may be compiled for.
    pub(super) kernels: Dialect,
    pub(super) warps: &'static [u32],
    /// The tile class for lanes of a warp and bytes of shared memory a block.
    pub(super) class: fn(u32, u32) -> Option<TileClass>,
    pub(super) attributes: Attributes,
    /// Flags of a host allocation that kernels can reach, from every context.
    pub(super) host_alloc_flags: u32,
    /// The run-time compiler's functions and libraries. It is looked for in the driver's own library last.
    pub(super) compiler: &'static Names,
    pub(super) compiler_variable: &'static str,
    pub(super) compiler_libraries: &'static [&'static str],
    /// How a device says what it is.
    pub(super) arch: Arch,
    /// How a binary begins; empty where that is not known.
    pub(super) magics: &'static [&'static [u8]],
    /// The functions for the words of a code store a pointer to them, instead of returning it.
    pub(super) text_by_pointer: bool,
    /// Most threads of a launch, all blocks together.
    pub(super) max_grid_threads: u64,
    /// The driver of this process; made by the first call.
    pub(super) driver: OnceLock<std::result::Result<Driver, String>>,
    /// How the driver is had.
    pub(super) open: fn(&'static Vendor) -> std::result::Result<Driver, String>,
}

/// Where the name of a device's architecture comes from.
#[allow(dead_code, reason = "a build may have vendors of one kind only")]
pub(super) enum Arch {
    /// It stands in the struct of properties, and begins like this.
    InProperties(&'static str),
    /// This, with the digits of the compute capability, whose attributes have these numbers.
    Capability(&'static str, [c_int; 2]),
}

/// The vendor's numbers of device attributes.
pub(super) struct Attributes {
    pub(super) warp_size: c_int,
    pub(super) multiprocessors: c_int,
    pub(super) shared_memory_per_block: c_int,
}

impl Vendor {
    /// The driver of this process, loaded and initialised on the first call.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub(super) fn get(&'static self) -> std::result::Result<&'static Driver, String> {
        self.driver.get_or_init(|| (self.open)(self)).as_ref().map_err(Clone::clone)
    }

    /// Every name the driver's library may have here, best first.
    pub(super) fn candidates(&self) -> Vec<PathBuf> {
        self.search(self.library_variable, self.libraries)
    }

    /// Every name the run-time compiler's library may have here, best first; the driver's libraries are the last.
    pub(super) fn compilers(&self, drivers: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
        let mut candidates = self.search(self.compiler_variable, self.compiler_libraries);
        candidates.extend(drivers);
        candidates
    }

    /// What `variable` names and nothing else; or the names on the loader's path, then those that exist in the folders.
    fn search(&self, variable: &str, names: &[&str]) -> Vec<PathBuf> {
        let set = |variable: &str| std::env::var_os(variable).filter(|v| !v.is_empty());
        if let Some(named) = set(variable) {
            return vec![named.into()];
        }
        let roots = self.folders.iter().filter_map(|(variable, default, below)| {
            let root = set(variable).map(PathBuf::from).or_else(|| (!default.is_empty()).then(|| default.into()))?;
            Some(root.join(below))
        });
        let in_folders = roots.flat_map(|folder| names.iter().map(move |name| folder.join(name)));
        names.iter().map(PathBuf::from).chain(in_folders.filter(|path| path.exists())).collect()
    }
}
