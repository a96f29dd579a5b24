//! Lists the kernel sources of the enabled backends, and compiles them where a compiler is found: nvcc by itself, a HIP
//! compiler where it is named.
//!
//! Without them the crate builds all the same: kernels are then compiled on the user's machine at run time.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Name, source file, defines: the same table that the crate loads kernels by.
type Unit = (&'static str, &'static str, &'static [&'static str]);
#[path = "src/cuda/sm90/units.rs"]
mod sm90;

#[path = "src/portable/units.rs"]
mod portable_units;

/// Names hipcc, or DTK's or another clang that knows HIP: kernels are then compiled with it and embedded.
const HIPCC_VARIABLE: &str = "POLYMLA_HIPCC";
/// The architectures to embed kernels for, separated by commas.
const HIP_ARCHS_VARIABLE: &str = "POLYMLA_HIP_ARCHS";

/// The architectures to embed portable CUDA kernels for, separated by commas: `sm_80,sm_90`. None by default: NVRTC
/// compiles them at first use.
const CUDA_ARCHS_VARIABLE: &str = "POLYMLA_CUDA_ARCHS";

/// Names nvcc; empty or `none` means that none is to be used.
const NVCC_VARIABLE: &str = "POLYMLA_NVCC";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let has = |feature: &str| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if has("DRIVER") || has("CUDA") {
        portable();
    }
    for vendor in ["musa", "maca", "corex"] {
        if has(&vendor.to_uppercase()) {
            let text = files(&backend_dir(vendor));
            fs::write(out_dir().join(format!("{vendor}_kernels.rs")), text).expect("OUT_DIR can be written");
        }
    }
    if has("HIP") {
        hip();
    }
    if has("CUDA") {
        cuda();
    }
    if has("SM90") {
        kernels("sm90", "compute_90a", "sm_90a", sm90::UNITS);
    }
}

/// Writes `<backend>_kernels.rs` into OUT_DIR: `FILES`, the sources, and `EMBEDDED`, the cubins.
fn kernels(backend: &str, virtual_arch: &str, arch: &str, units: &[Unit]) {
    let out = out_dir();
    let folder = backend_dir(backend);
    println!("cargo:rerun-if-changed=src/cuda/{backend}/units.rs");

    let mut text = files(&folder);
    text.push_str("pub(crate) const EMBEDDED: &[(&str, &[u8])] = &[\n");
    for (unit, cubin) in compile(&folder, &out.join(backend), virtual_arch, arch, units) {
        writeln!(text, "    ({unit:?}, include_bytes!({:?})),", cubin.display().to_string()).expect("to a string");
    }
    text.push_str("];\n");
    fs::write(out.join(format!("{backend}_kernels.rs")), text).expect("OUT_DIR can be written");
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"))
}

fn backend_dir(backend: &str) -> PathBuf {
    PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("backends").join(backend)
}

/// `FILES`: name and text of every kernel source of a folder, as Rust.
fn files(folder: &Path) -> String {
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default();
    files.retain(|path| path.extension().is_some_and(|e| e == "cu" || e == "h"));
    files.sort();
    let mut text = String::from("pub(crate) const FILES: &[(&str, &str)] = &[\n");
    for path in &files {
        let name = path.file_name().expect("a listed file").to_string_lossy();
        writeln!(text, "    ({name:?}, include_str!({:?})),", path.display().to_string()).expect("to a string");
    }
    text.push_str("];\n");
    text
}

/// Writes `portable_kernels.rs`: the sources that every dialect shares.
fn portable() {
    println!("cargo:rerun-if-changed=src/portable/units.rs");
    fs::write(out_dir().join("portable_kernels.rs"), files(&backend_dir("portable"))).expect("OUT_DIR can be written");
}

/// Writes `cuda_kernels.rs`: the dialect, and the cubins of the architectures named.
fn cuda() {
    println!("cargo:rerun-if-env-changed={CUDA_ARCHS_VARIABLE}");
    let dialect = backend_dir("cuda");
    let mut text = files(&dialect);
    text.push_str("pub(crate) const EMBEDDED: &[(&str, &[u8])] = &[\n");
    let archs = env::var(CUDA_ARCHS_VARIABLE).unwrap_or_default();
    for arch in archs.split(',').filter(|arch| !arch.is_empty()) {
        let Some(kib) = portable_units::cuda_class(arch) else {
            panic!("{CUDA_ARCHS_VARIABLE}: {arch} is unknown; such as sm_80,sm_90 is expected");
        };
        let nvcc = find_nvcc().unwrap_or_else(|| panic!("{CUDA_ARCHS_VARIABLE} names {arch}, and nvcc was not found"));
        for (element, define) in portable_units::ELEMENTS {
            let mut command = Command::new(&nvcc);
            command.args(portable_units::options(kib, define)).args(["-cubin", "-gencode"]);
            command.arg(format!("arch={},code={arch}", arch.replace("sm_", "compute_")));
            embed(&mut text, command, &dialect, &portable_units::binary_name("cuda", arch, kib, element));
        }
    }
    text.push_str("];\n");
    fs::write(out_dir().join("cuda_kernels.rs"), text).expect("OUT_DIR can be written");
}

/// Writes `hip_kernels.rs`: the dialect, and the binaries of the architectures named, where a compiler is named.
fn hip() {
    for variable in [HIPCC_VARIABLE, HIP_ARCHS_VARIABLE] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let dialect = backend_dir("hip");
    let mut text = files(&dialect);
    text.push_str("pub(crate) const EMBEDDED: &[(&str, &[u8])] = &[\n");
    let archs = env::var(HIP_ARCHS_VARIABLE).unwrap_or_else(|_| "gfx90a,gfx942".into());
    let hipcc = env::var_os(HIPCC_VARIABLE).filter(|v| !v.is_empty());
    for arch in archs.split(',').filter(|_| hipcc.is_some()) {
        let Some(kib) = portable_units::hip_class(arch) else {
            println!("cargo:warning={HIP_ARCHS_VARIABLE}: {arch} is unknown or has no waves of 64 lanes: not embedded");
            continue;
        };
        for (element, define) in portable_units::ELEMENTS {
            let mut command = Command::new(hipcc.as_ref().expect("filtered"));
            command.args(portable_units::hiprtc_options(arch, kib, define)).args(portable_units::CLANG_OPTIONS);
            embed(&mut text, command, &dialect, &portable_units::binary_name("hip", arch, kib, element));
        }
    }
    text.push_str("];\n");
    fs::write(out_dir().join("hip_kernels.rs"), text).expect("OUT_DIR can be written");
}

/// Compiles the portable kernels and adds them to `text`. Whoever names a compiler or an architecture means it to work:
/// embedding nothing would be found out on another machine.
fn embed(text: &mut String, mut command: Command, dialect: &Path, name: &str) {
    let (sources, binary) = (backend_dir("portable"), out_dir().join(name));
    command.arg("-I").arg(dialect).arg("-I").arg(&sources).arg("-o").arg(&binary).arg(sources.join("portable.cu"));
    let compiler = command.get_program().display().to_string();
    match command.output() {
        Ok(output) if output.status.success() => {
            writeln!(text, "    ({name:?}, include_bytes!({:?})),", binary.display().to_string()).expect("to a string");
        }
        Ok(output) => panic!("{compiler}: {name}: {}", String::from_utf8_lossy(&output.stderr)),
        Err(e) => panic!("{compiler}: {e}"),
    }
}

/// The cubins of the units that nvcc could compile.
fn compile(folder: &Path, out: &Path, virtual_arch: &str, arch: &str, units: &[Unit]) -> Vec<(&'static str, PathBuf)> {
    let Some(nvcc) = find_nvcc() else {
        println!("cargo:warning=nvcc not found: no kernels are embedded, NVRTC compiles them at first use");
        return Vec::new();
    };
    fs::create_dir_all(out).expect("OUT_DIR can be written");
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).clamp(1, units.len().max(1));
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((name, file, defines)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let cubin = out.join(format!("{name}.cubin"));
                    let result = Command::new(&nvcc)
                        .args(["-std=c++17", "-O3", "-cubin", "-gencode"])
                        .arg(format!("arch={virtual_arch},code={arch}"))
                        .args(defines.iter().map(|d| format!("-D{d}")))
                        .arg("-o")
                        .arg(&cubin)
                        .arg(folder.join(file))
                        .output();
                    let result = match result {
                        Ok(output) if output.status.success() => Ok(cubin),
                        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
                        Err(e) => Err(e.to_string()),
                    };
                    done.lock().expect("no thread panics while it holds this").push((*name, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no thread panics while it holds this");
    done.sort_by_key(|(name, _)| *name);
    let mut cubins = Vec::new();
    for (name, result) in done {
        match result {
            Ok(cubin) => cubins.push((name, cubin)),
            Err(why) => {
                let first = why.lines().find(|line| line.contains("error")).or(why.lines().next()).unwrap_or("");
                println!("cargo:warning={} did not compile {name}, which is not embedded: {first}", nvcc.display());
            }
        }
    }
    cubins
}

fn find_nvcc() -> Option<PathBuf> {
    for variable in [NVCC_VARIABLE, "CUDA_HOME", "CUDA_PATH", "PATH", "DOCS_RS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("DOCS_RS").is_some() {
        return None;
    }
    let set = |variable| env::var_os(variable).filter(|v| !v.is_empty());
    if let Some(named) = env::var_os(NVCC_VARIABLE) {
        if named.is_empty() || named == "none" {
            return None;
        }
        let path = PathBuf::from(named);
        if !path.exists() {
            println!("cargo:warning={NVCC_VARIABLE} names {}, which is not there", path.display());
        }
        return path.exists().then_some(path);
    }
    let name = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).map(|home| PathBuf::from(home).join("bin"));
    let path = set("PATH").unwrap_or_default();
    homes.chain(env::split_paths(&path)).map(|folder| folder.join(name)).find(|nvcc| nvcc.is_file())
}
