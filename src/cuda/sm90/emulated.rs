//! The kernels of `backends/sm90` on this CPU: every thread a fiber, tensor cores and copies emulated (`tests/sm90/`). What they
//! are told comes from the same functions as on a device; golden files, random problems and bad input are what a device gets, too.
//! `mutants` plants faults in copies of the sources.

use std::ffi::{c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[path = "../../../tests/common/cpp.rs"]
mod cpp;
mod mutants;

use libloading::Library;

use super::params::{DecodeParams, ScheduleParams};
use super::plan::{MAX_PARTS, schedule_params, workspace_layout};
use super::run::params;
use super::variant::Variant;
use crate::backend::{BackendInfo, Evidence, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::conformance::random::{Limits, random_call, random_options};
use crate::conformance::{
    Call, LAYOUTS, Layout, POLICIES, check_call, check_with, golden, marks_only, with_bad_request,
};
use crate::device::{Plan, PlanAddresses, STATUS_OK};
use crate::error::{MlaError, Result};
use crate::host::{HostBackend, RepeatedInputs, Timing};
use crate::problem::Problem;
use crate::schedule::{PartMetadata, ScheduleOptions, num_sm_parts};
use crate::tensor::{DType, Device};

/// Multiprocessors of the device that is emulated: few, because each costs 512 fibers whether it has work or not.
const MULTIPROCESSORS: usize = 6;
/// Blocks of the combine kernel.
const COMBINE_BLOCKS: c_int = 4;

/// The four tensor maps, as emulate.cpp makes them.
#[repr(C, align(64))]
struct Maps([u8; 512]);

type ScheduleFn = unsafe extern "C" fn(*const ScheduleParams, *mut c_void) -> c_int;
type MapsFn = unsafe extern "C" fn(*const DecodeParams, c_int, c_int, *mut Maps) -> c_int;
type DecodeFn =
    unsafe extern "C" fn(*const DecodeParams, *const Maps, c_int, c_int, c_int, c_int, *mut c_void) -> c_int;

struct Emulated {
    info: BackendInfo,
    schedule: ScheduleFn,
    maps: MapsFn,
    decode: DecodeFn,
    _library: Library,
}

/// One launch at a time: the emulator has one set of fibers and one shared memory. Also while it is built.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Folders of sources, below the project's or (`mutants`) a copy's root.
const FOLDERS: [&str; 3] = ["backends/sm90", "tests/sm90", "tests/simt"];
/// Names the root of a copy.
const ROOT_VARIABLE: &str = "POLYMLA_EMULATED_ROOT";

/// Whether what runs is a copy, so that the first failure is enough.
fn planted() -> bool {
    std::env::var_os(ROOT_VARIABLE).is_some()
}

fn sources(root: &Path) -> Vec<PathBuf> {
    let folders = FOLDERS.map(|folder| fs::read_dir(root.join(folder)).expect("sources"));
    let mut files: Vec<PathBuf> =
        folders.into_iter().flatten().map(|entry| entry.expect("an entry").path()).filter(|p| p.is_file()).collect();
    files.sort();
    files
}

/// Compiles where this build of these sources is not there yet.
fn build() -> PathBuf {
    let root = std::env::var_os(ROOT_VARIABLE).map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let dir = Path::new(concat!(env!("OUT_DIR"), "/sm90-emulated"));
    fs::create_dir_all(dir).expect("a folder for the library");
    let path = dir.join(format!("{:016x}.so", cpp::fingerprint(sources(&root))));
    cpp::library(&path, if planted() { 1 } else { 2 }, |command| {
        // `extern thread_local` is shared memory.
        command.args(["-w", "-fno-extern-tls-init"]);
        command.arg("-DPOLYMLA_EMULATED=\"../../tests/sm90/emulate.h\"").arg(root.join("tests/sm90/emulate.cpp"));
    });
    path
}

impl Emulated {
    fn open() -> Emulated {
        let _turn = alone();
        let path = build();
        // SAFETY: the library is our own; loading it runs no code but the C++ runtime's.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // SAFETY: emulate.cpp defines the three with these signatures; `_library` keeps them loaded.
        let (schedule, maps, decode) = unsafe {
            (
                *library.get::<ScheduleFn>(b"pm_schedule\0").expect("pm_schedule"),
                *library.get::<MapsFn>(b"pm_maps\0").expect("pm_maps"),
                *library.get::<DecodeFn>(b"pm_decode\0").expect("pm_decode"),
            )
        };
        let info = BackendInfo {
            name: "sm90-emulated",
            device_name: "sm90 on this CPU".into(),
            device: Device::Host,
            evidence: Evidence::T3,
        };
        Emulated { info, schedule, maps, decode, _library: library }
    }
}

impl HostBackend for Emulated {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        super::supports(problem)
    }

    fn decode(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
    ) -> Result<()> {
        super::supports(problem)?;
        inputs.validate(problem, self.info.device)?;
        outputs.validate(problem, inputs, self.info.device)?;
        let plan = Plan::new(problem, options, num_sm_parts(MULTIPROCESSORS, problem), MAX_PARTS)?;
        let mut parts = vec![PartMetadata::default(); plan.num_parts() + 1];
        let (mut num_splits, mut scratch) = (vec![-7i32; problem.b() + 1], vec![-7i64; problem.b() + 1]);
        let mut status = STATUS_OK;
        // The kernels read a part as one of 32 aligned bytes.
        let parts_at = parts.as_mut_ptr() as u64;
        let at = PlanAddresses {
            parts: parts_at.next_multiple_of(32),
            num_splits: num_splits.as_mut_ptr() as u64,
            scratch: scratch.as_mut_ptr() as u64,
            status: (&raw mut status) as u64,
        };
        let lens = inputs.cache_seqlens.address().unwrap_or(0);
        let schedule = schedule_params(problem, &plan, &at, lens);
        let mut decode = params(problem, &plan, &at, inputs, outputs)?;
        if problem.rows() == 0 {
            return Ok(());
        }
        // NaN, so that what is read without having been written shows.
        let (out_bytes, row_bytes) = workspace_layout(problem, &plan);
        let mut workspace = vec![f32::NAN; (out_bytes + row_bytes) / 4 + 32];
        decode.partial_out = (workspace.as_mut_ptr() as u64).next_multiple_of(128);
        decode.partial_rows = decode.partial_out + out_bytes as u64;
        let (f16, rope) = (c_int::from(problem.dtype() == DType::F16), c_int::from(problem.rope() > 0));
        let mut maps = Maps([0; 512]);
        let _turn = alone();
        // SAFETY: the kernels' parameters with addresses of host memory: inputs and outputs, validated above, and buffers of
        // this function with the sizes that a device's have.
        unsafe {
            assert_eq!((self.schedule)(&raw const schedule, std::ptr::null_mut()), 0);
            assert_eq!((self.maps)(&raw const decode, f16, rope, &raw mut maps), 0);
            let form = Variant::of_call(problem, &decode).form as c_int;
            let none = std::ptr::null_mut();
            assert_eq!((self.decode)(&raw const decode, &raw const maps, f16, rope, form, COMBINE_BLOCKS, none), 0);
        }
        match status {
            STATUS_OK => Ok(()),
            request => Err(MlaError::DeviceCheck { request: request as usize, reason: super::plan::FAILURE }),
        }
    }

    fn time(
        &self,
        _: &Problem,
        _: &ScheduleOptions,
        _: &RepeatedInputs<'_>,
        _: Timing,
    ) -> Result<Vec<std::time::Duration>> {
        unreachable!("nobody times an emulator")
    }
}

#[test]
fn golden_files() {
    let backend = Emulated::open();
    let files = golden::list(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).expect("golden files");
    assert!(files.len() >= 14, "{} golden files", files.len());
    let mut failures = Vec::new();
    for file in files {
        let call = golden::load(file).expect("a golden file");
        let bad = check_call(&backend, &call, &LAYOUTS).into_iter().filter(|check| !check.passed());
        failures.extend(bad.map(|c| format!("{} {} {:?}: {}", c.call, c.layout, c.policy, c.failure())));
        if planted() && !failures.is_empty() {
            break;
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

fn small() -> Limits {
    Limits { max_b: 6, max_s_q: 4, max_work: 3_000_000, ..Limits::deepseek() }
}

#[test]
fn random_problems() {
    let backend = Emulated::open();
    let mut failures = Vec::new();
    let count = std::env::var("POLYMLA_TEST_RANDOM").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    for seed in 0..count {
        let call = random_call(seed, &small()).expect("a valid problem");
        let outcome = check_with(&backend, &call, Layout::Given, &random_options(seed));
        if !outcome.passed() {
            failures.push(format!("{} {:?}: {}", call.name, random_options(seed), outcome.failure()));
            if planted() {
                break;
            }
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

/// Requests of one block and of none follow one another in one part: roles that have nothing to do there must not run ahead.
#[test]
fn short_and_empty_requests_in_one_part() {
    let backend = Emulated::open();
    for few in [true, false] {
        let wanted = |call: &Call| {
            let (p, lens) = (&call.problem, call.cache_seqlens());
            let found = |range: std::ops::RangeInclusive<i32>| lens.iter().any(|n| range.contains(n));
            (p.s_q() * p.heads_per_kv() <= 16) == few && lens.len() > 2 && found(0..=0) && found(1..=64)
        };
        let calls = (3000..).map(|seed| random_call(seed, &small()).expect("a valid problem")).filter(wanted);
        for call in calls.take(8) {
            let options = ScheduleOptions { num_sm_parts: Some(1), policy: POLICIES[0] };
            let outcome = check_with(&backend, &call, Layout::Given, &options);
            assert!(outcome.passed(), "{}: {}", call.name, outcome.failure());
        }
    }
}

/// One request's table entry or length is bad: it is named and its results are NaN, and the others' are right.
#[test]
fn bad_tables_and_lengths() {
    let backend = Emulated::open();
    let several = |call: &Call| call.problem.b() > 2 && call.cache_seqlens().iter().any(|n| *n > 100);
    let calls = (2000..).map(|seed| random_call(seed, &small()).expect("a valid problem")).filter(several);
    for (i, call) in calls.take(16).enumerate() {
        let (bad, victim) = with_bad_request(&call, i).expect("a long request");
        for policy in POLICIES {
            let options = ScheduleOptions { num_sm_parts: None, policy };
            let mut results = call.poisoned_outputs().expect("outputs");
            let mut outputs = results.outputs().expect("outputs");
            let done = backend.decode(&bad.problem, &options, &bad.inputs().expect("inputs"), &mut outputs);
            assert!(
                matches!(done, Err(MlaError::DeviceCheck { request, .. }) if request == victim),
                "{} victim {victim}: {done:?}",
                call.name
            );
            marks_only(&call, victim, &results).unwrap_or_else(|e| panic!("{policy:?} victim {victim}: {e}"));
        }
    }
}
