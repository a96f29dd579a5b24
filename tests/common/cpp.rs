//! C++ that tests compile for this CPU, as libraries. Included by the crate's own tests too.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A number for the contents of these files, for the name of what is made of them.
#[allow(dead_code, reason = "not every test keeps what it compiles")]
pub fn fingerprint(files: impl IntoIterator<Item = PathBuf>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for file in files {
        std::fs::read(file).expect("a source").hash(&mut hasher);
    }
    hasher.finish()
}

/// Compiles a library where it is not there yet; `sources` adds them, with options of their own. One process may do so at
/// a time for a path.
pub fn library(path: &Path, opt_level: u32, sources: impl FnOnce(&mut Command)) {
    if path.exists() {
        return;
    }
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut build = cc::Build::new();
    let compiler = build.cpp(true).target(&target).host(&target).opt_level(opt_level).warnings(false).get_compiler();
    let mut command = compiler.to_command();
    // Fibers jump between stacks, which the fortified longjmp takes for a mistake.
    command.args(["-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"]);
    sources(&mut command);
    // Renamed when it is whole: a build that was stopped must not be taken for one that is done.
    let unfinished = path.with_extension(format!("{}.part", std::process::id()));
    let output = command.arg("-o").arg(&unfinished).output().expect("a C++ compiler is needed (g++)");
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&unfinished, path).expect("the folder can be written");
}
