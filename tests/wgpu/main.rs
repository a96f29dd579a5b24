//! The WGSL backend: its shaders, its limits, its errors. Results on the default adapter are checked by `golden` and
//! `random` like any backend's; here every path and the limits of a browser are.

mod device;
mod limits;
#[cfg(feature = "cli")]
mod mutants;
mod range;
mod refused;
mod shaders;

use polymla::wgpu::WgpuBackend;
use polymla::wgpu::shaders::Path;

/// The matrix paths, or the one that the environment names: for tests that start a test.
const ONE_PATH: &str = "POLYMLA_TEST_PATH";
fn matrix_paths() -> Vec<Path> {
    let one = std::env::var(ONE_PATH).unwrap_or_default();
    let named = |path: &Path| one.is_empty() || path.name() == one;
    Path::ALL.into_iter().filter(|path| path.is_matrix() && named(path)).collect()
}

/// Runs `test` by each of these paths that the adapter has, says aloud which it lacks, and counts; `None` without an adapter.
fn by_paths(paths: impl IntoIterator<Item = Path>, mut test: impl FnMut(Path, &WgpuBackend)) -> Option<usize> {
    let mut taken = 0;
    for path in paths {
        let backend = backend(WgpuBackend::new)?;
        if backend.has(path) {
            test(path, &backend.with_path(path).unwrap());
            taken += 1;
        } else {
            eprintln!("SKIP path {}: the adapter lacks it", path.name());
            let name = &polymla::MlaBackend::info(&backend).device_name;
            let proof = name.contains("llvmpipe") && (path.is_emulated() || !path.is_matrix());
            assert!(!proof, "{} was to be checked on Mesa's software Vulkan, which always had it: {name}", path.name());
            assert!(backend.with_path(path).is_err());
        }
    }
    Some(taken)
}

/// The default adapter; `None`, aloud, where there is none and `POLYMLA_REQUIRE` does not list `wgpu`.
fn backend(open: fn() -> polymla::Result<WgpuBackend>) -> Option<WgpuBackend> {
    match open() {
        Ok(backend) => Some(backend),
        Err(reason) => {
            let required = polymla::conformance::required().expect("names of backends");
            assert!(!required.iter().any(|name| name == "wgpu"), "{reason}");
            eprintln!("SKIP wgpu: {reason}");
            None
        }
    }
}
