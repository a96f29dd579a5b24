//! Kernel sources from a folder instead of those built in.

use crate::error::{MlaError, Result};

/// Names a folder to read kernel sources from instead of those built in: all files of a backend, headers too, side by side.
/// Saves rebuilding Rust while tuning.
pub const KERNEL_DIR_VARIABLE: &str = "POLYMLA_KERNEL_DIR";

/// The `.cu` and `.h` files of the folder that the variable names: name and text. `None` where it is not set.
///
/// # Errors
/// [`MlaError::Platform`] where the folder cannot be read.
pub(crate) fn sources_of_environment(backend: &'static str) -> Result<Option<Vec<(String, String)>>> {
    let Some(folder) = std::env::var_os(KERNEL_DIR_VARIABLE).filter(|v| !v.is_empty()) else { return Ok(None) };
    let read = || -> std::io::Result<Vec<(String, String)>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if let (Some(name), Some("cu" | "h")) =
                (path.file_name().and_then(|n| n.to_str()), path.extension().and_then(|e| e.to_str()))
            {
                files.push((name.to_string(), std::fs::read_to_string(&path)?));
            }
        }
        // The order of a folder is no property of its files, and the key of the cache is made of all of them.
        files.sort();
        Ok(files)
    };
    read().map(Some).map_err(|e| {
        let message = format!("{}: {e}", folder.display());
        MlaError::Platform { backend, call: KERNEL_DIR_VARIABLE, message }
    })
}
