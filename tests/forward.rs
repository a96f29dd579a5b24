//! The forwarding libraries of tier T4 (`tests/shims/forward`) without a GPU: our host code over a vendor's names, over them, over a
//! libcuda and NVRTC that are the fiber harness. It proves what is handed on, and under which name; not NVIDIA's ABI. With
//! `POLYMLA_TEST_NVRTC` (the last of its list) the kernels are compiled for sm_90, too, each in its vendor's dialect.

#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod shims;

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use polymla::driver::{self, PortableBackend};
use polymla::{Device, Evidence, HostBackend, MlaBackend, MlaError, Problem, RepeatedInputs, ScheduleOptions, Timing};
use shims::Case;
use shims::vendor::{Device as Described, Vendor};

type Handle = *mut c_void;

/// NVIDIA's own, as the harness plays it: CUDA's names are those in CoreX's file. Its device is what the vendor's has to have.
fn nvidia(case: &Case) -> Case {
    let described = Described { capability: [9, 0], ..case.vendor.devices[case.device] };
    let devices: &'static [Described] = Box::leak(Box::new([described]));
    let vendor = Vendor { compiler: true, arch_option: "--gpu-architecture=sm_90", devices, ..shims::corex::VENDOR };
    Case { vendor, device: 0, driver: shims::corex::DRIVER, compiler: shims::corex::COMPILER, ..*case }
}

/// The forwarding library of a vendor's device, by the crate's feature for it.
fn forwarding(feature: &str, folder: &Path) -> PathBuf {
    // Every feature's build has the same name.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("forward");
    let output = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--quiet", "--features", feature, "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shims/forward/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{feature}: {}", String::from_utf8_lossy(&output.stderr));
    let path = folder.join("vendor.so");
    std::fs::copy(target.join("release/libpolymla_forward.so"), &path).expect("the library was built");
    path
}

/// What a process of its own has to know: which test, and where the libraries are.
const CASE: &str = "POLYMLA_TEST_FORWARD";

/// Runs `test` of this file with a vendor's library in place. A process loads a driver once, and looks for libraries where it was told
/// to when it began.
fn in_a_process(test: &str, case: &Case, folder: &Path, library: &Path) {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(CASE, case.arch);
    let old = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let paths = std::iter::once(folder.into()).chain(std::env::split_paths(&old));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(paths).expect("no colon in the target folder"));
    command.envs(case.variables.map(|variable| (variable, library)));
    command.env(driver::CACHE_VARIABLE, folder.join("cache")).env(driver::MODULE_DIR_VARIABLE, folder.join("modules"));
    let output = command.output().expect("this test starts");
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words);
    assert!(output.status.success() && words.contains("1 passed"), "{} {}: {words}", case.name, output.status);
}

fn forwards(case: &Case, feature: &str) {
    let folder = shims::scratch(&format!("{feature}-forward"));
    let library = forwarding(feature, &folder);
    let [cuda, nvrtc] = ["libcuda.so.1", "libnvrtc.so.13"].map(|name| folder.join(name));
    // Files that are no libraries hide what this machine may have under these names.
    for name in ["libcuda.so.1", "libcuda.so"] {
        std::fs::write(folder.join(name), "no library").expect("the target folder");
    }
    in_a_process("without_libcuda", case, &folder, &library);
    std::fs::remove_file(&cuda).expect("it was written");
    shims::build(&cuda, &nvidia(case), case.vendor.devices[case.device].warp, "#define SHIM_NVIDIA\n");
    std::os::unix::fs::symlink(&cuda, &nvrtc).expect("the target folder");
    in_a_process("over_the_harness", case, &folder, &library);
    let real = std::env::var("POLYMLA_TEST_NVRTC").unwrap_or_default();
    match real.rsplit(':').next().filter(|path| case.vendor.compiler && !path.is_empty()) {
        Some(real) => {
            // NVRTC looks for libcuda by its first name, and is not to find this one.
            std::fs::rename(&cuda, folder.join("libcuda.so")).expect("it was built");
            std::fs::write(&cuda, "no library").expect("the target folder");
            std::fs::remove_file(&nvrtc).expect("it was linked");
            std::os::unix::fs::symlink(real, nvrtc).expect("the target folder");
            in_a_process("kernels_compile", case, &folder, &library);
        }
        None if case.vendor.compiler => eprintln!("SKIP {feature} by NVRTC: POLYMLA_TEST_NVRTC is not set"),
        None => {}
    }
    let _ = std::fs::remove_dir_all(&folder);
}

#[test]
#[cfg(feature = "hip")]
fn hip_forwards() {
    forwards(&shims::HIP, "hip");
}
#[test]
#[cfg(feature = "musa")]
fn musa_forwards() {
    forwards(&shims::MUSA, "musa");
}
#[test]
#[cfg(feature = "musa")]
fn musa_of_32_lanes_forwards() {
    forwards(&shims::MUSA32, "musa32");
}
#[test]
#[cfg(feature = "maca")]
fn maca_forwards() {
    forwards(&shims::MACA, "maca");
}
#[test]
#[cfg(feature = "corex")]
fn corex_forwards() {
    forwards(&shims::COREX, "corex");
}

/// The case of this process, which a test above started.
fn case() -> Option<Case> {
    let arch = std::env::var(CASE).ok()?;
    [shims::HIP, shims::MUSA, shims::MUSA32, shims::MACA, shims::COREX].into_iter().find(|case| case.arch == arch)
}

/// The vendor's name of one of our functions.
fn name_of(case: &Case, ours: &str) -> &'static str {
    case.driver.iter().find(|(name, _)| *name == ours).expect(ours).1
}

#[test]
#[ignore = "the tests above start it in processes of its own"]
fn without_libcuda() {
    let case = case().expect(CASE);
    match driver::open(case.name) {
        Err(MlaError::Absent { reason, .. }) => {
            let init = name_of(&case, "init");
            assert!(reason.contains(&format!("{init}: libcuda cannot be loaded (code 500)")), "{reason}");
        }
        other => panic!("{}: {other:?}", case.name),
    }
}

/// NVIDIA's own compiler takes the vendor's dialect behind the vendor's builtins.
#[test]
#[ignore = "the tests above start it in processes of its own"]
fn kernels_compile() {
    let case = case().expect(CASE);
    for (element, compiled) in driver::compile_kernels(case.name, case.arch).expect(case.arch) {
        assert!(compiled.binary.starts_with(b"\x7fELF"), "{element}: {} bytes of no code", compiled.binary.len());
    }
}

#[test]
#[ignore = "the tests above start it in processes of its own"]
fn over_the_harness() {
    let case = case().expect(CASE);
    let vendor = case.name;
    let modules = PathBuf::from(std::env::var_os(driver::MODULE_DIR_VARIABLE).expect("set"));
    let fill = |code: &[u8]| {
        std::fs::create_dir_all(&modules).expect("the target folder");
        for (name, _) in driver::kernel_source(vendor, case.arch).expect(vendor).binaries {
            std::fs::write(modules.join(name), [code, &[0; 64]].concat()).expect("the target folder");
        }
    };
    // What the driver does not take is passed over; without a compiler nothing is left then.
    fill(b"\x7fELF of something else");
    let opened = driver::open_device(vendor, 1);
    let backend = if case.vendor.compiler {
        opened.expect("the compiler")
    } else {
        let error = opened.expect_err("no kernels").to_string();
        let call = name_of(&case, "module_load");
        assert!(error.contains(&format!("{call} failed: invalid argument (InvalidValue, code 1)")), "{error}");
        fill(shims::CODE);
        driver::open_device(vendor, 1).expect("the module folder")
    };
    let info = MlaBackend::info(&backend);
    assert_eq!(info.device, Device::Accelerator { platform: info.name, ordinal: 1 });
    let described = format!("fiber harness 1 standing in ({}), 4 multiprocessors, ", case.arch);
    let origin = if case.vendor.compiler { "compiled by" } else { "module folder" };
    assert!(info.device_name.contains(&described) && info.device_name.contains(origin), "{info:?}");
    assert_eq!(info.evidence, Evidence::T3, "libcuda, too, is stood in for");

    // Codes come through with their words: there is no device 7, and device 0 of the harness has no memory.
    let error = driver::open_device(vendor, 7).expect_err("two devices").to_string();
    assert!(error.contains("invalid argument (InvalidValue, code 1)"), "{error}");
    let error = driver::open_device(vendor, 0).and_then(|other| other.alloc(16).map(drop)).expect_err("no memory");
    let call = name_of(&case, "alloc");
    assert!(error.to_string().contains(&format!("{call} failed: another error (OtherError, code 100)")), "{error}");

    memory(&backend);
    called_by_name(&case, &backend);
    streams_and_events(&backend);
    shims::golden_files(&backend);
}

/// Copies there, on the device and back.
fn memory(backend: &PortableBackend) {
    let mut buffer = backend.alloc(1000).expect("memory");
    buffer.write(0, b"abcdefg").expect("a copy");
    buffer.repeat(7).expect("copies on the device");
    let mut found = vec![0; 993];
    buffer.read(7, &mut found).expect("a copy back");
    assert!(found.iter().zip(b"abcdefg".iter().cycle()).all(|(a, b)| a == b), "{found:?}");
}

/// What the host code asks for in one way only: words other than zero, devices that it has not counted.
fn called_by_name(case: &Case, backend: &PortableBackend) {
    let mut buffer = backend.alloc(64).expect("memory");
    buffer.write(0, &[7; 64]).expect("a copy");
    let library = std::env::var_os(case.variables[0]).expect("set");
    // SAFETY: the library is loaded already; its functions have the driver table's signatures, and get pointers to locals.
    let fill = unsafe {
        let library = libloading::Library::new(library).expect("the library");
        let find = |ours| name_of(case, ours).as_bytes();
        if case.vendor.contexts {
            let get = library.get::<unsafe extern "C" fn(*mut c_int, c_int) -> c_int>(find("device_get")).unwrap();
            let retain =
                library.get::<unsafe extern "C" fn(*mut Handle, c_int) -> c_int>(find("retain_context")).unwrap();
            let set = library.get::<unsafe extern "C" fn(Handle) -> c_int>(find("set_context")).unwrap();
            let (mut device, mut context) = (0, std::ptr::null_mut());
            assert_ne!(get(&raw mut device, 2), 0, "there is no device 2");
            assert_eq!((get(&raw mut device, 1), retain(&raw mut context, device), set(context)), (0, 0, 0));
        } else {
            let set = library.get::<unsafe extern "C" fn(c_int) -> c_int>(find("set_device")).unwrap();
            assert_eq!([set(-1), set(2), set(1)], [101, 101, 0], "there are devices 0 and 1");
        }
        let fill = library.get::<unsafe extern "C" fn(u64, c_int, usize, Handle) -> c_int>(find("fill_words")).unwrap();
        [17, 8].map(|count| fill(buffer.address(), 0x0102_0304, count, std::ptr::null_mut()))
    };
    assert_eq!(fill, [1, 0], "17 words do not fit, 8 do");
    let mut found = [0; 64];
    buffer.read(0, &mut found).expect("a copy back");
    assert_eq!(found, *[[4, 3, 2, 1].repeat(8), vec![7; 32]].concat(), "8 words of the buffer");
}

/// A stream of its own; and a timed run between events, which are always as far apart in the harness.
fn streams_and_events(backend: &PortableBackend) {
    let stream = backend.create_stream().expect("a stream");
    stream.synchronize().expect("nothing to wait for");
    let problem = Problem::builder(2).h_q(3).num_pages(4).max_pages_per_seq(2).build().expect("valid");
    let inputs = RepeatedInputs { q: &[0; 2], k_cache: &[0; 2], block_table: &[0, 1, 2, 3], cache_seqlens: &[100, 1] };
    let timing = Timing { warmups: 0, repeats: 2, flush: true };
    let times = HostBackend::time(backend, &problem, &ScheduleOptions::default(), &inputs, timing);
    assert_eq!(times, Ok(vec![Duration::from_micros(1500); 2]));
}
