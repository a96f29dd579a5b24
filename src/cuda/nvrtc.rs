//! NVRTC, the run-time compiler: its functions' names, and where to look for the library.
//!
//! cudarc looks for the library of one CUDA major version only; machines have 12 or 13.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::kernels::Names;

/// Names one NVRTC library to use, and no other.
pub const NVRTC_VARIABLE: &str = "POLYMLA_NVRTC";

/// Majors that are looked for, newest first.
const MAJORS: [u32; 2] = [13, 12];

/// What nvrtc.h calls them.
pub(crate) static NAMES: Names = Names {
    compiler: "NVRTC",
    version: c"nvrtcVersion",
    error_string: c"nvrtcGetErrorString",
    create: c"nvrtcCreateProgram",
    compile: c"nvrtcCompileProgram",
    log_size: c"nvrtcGetProgramLogSize",
    log: c"nvrtcGetProgramLog",
    binary_size: c"nvrtcGetCUBINSize",
    binary: c"nvrtcGetCUBIN",
    destroy: c"nvrtcDestroyProgram",
};

/// Every name the library may have here, best first: what [`NVRTC_VARIABLE`] says and nothing else, or the loader's
/// path, then the usual places of a toolkit. The driver's own major comes first, because a driver refuses what a
/// newer major compiled.
pub(crate) fn candidates(driver_major: u32) -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os(NVRTC_VARIABLE).filter(|v| !v.is_empty()) {
        return vec![named.into()];
    }
    let mut majors = MAJORS.to_vec();
    majors.sort_by_key(|m| (*m != driver_major, *m > driver_major));
    let names: Vec<String> = if cfg!(windows) {
        majors.iter().map(|m| format!("nvrtc64_{m}0_0.dll")).collect()
    } else {
        majors.iter().map(|m| format!("libnvrtc.so.{m}")).chain(["libnvrtc.so".to_string()]).collect()
    };
    let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).filter(|v| !v.is_empty());
    let roots = roots.chain(cfg!(unix).then(|| OsString::from("/usr/local/cuda"))).map(PathBuf::from);
    let folders = roots.flat_map(|root| ["lib64", "lib", "bin"].map(|folder| root.join(folder)));
    let in_folders: Vec<_> = folders.flat_map(|f| names.iter().map(move |n| f.join(n))).collect();
    names.iter().map(PathBuf::from).chain(in_folders.into_iter().filter(|path| path.exists())).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::kernels::Compiler;

    #[test]
    fn drivers_major_is_tried_first() {
        let file = |major| candidates(major)[0].to_string_lossy().into_owned();
        if std::env::var_os(NVRTC_VARIABLE).is_none() && cfg!(unix) {
            assert_eq!(file(12), "libnvrtc.so.12");
            assert_eq!(file(13), "libnvrtc.so.13");
        }
    }

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let path = Path::new("/nowhere/libnvrtc.so.12");
        let error = Compiler::load(&NAMES, path).err().expect("there is none").to_string();
        assert!(error.contains("/nowhere/libnvrtc.so.12"), "{error}");
    }
}
