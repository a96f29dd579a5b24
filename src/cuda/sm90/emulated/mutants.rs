//! Faults put into the Hopper kernels on purpose: each must be noticed by the emulated kernels' tests, as a wrong result or as a wait
//! that does not end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use super::{ROOT_VARIABLE, sources};

/// What is wrong, in which file, what is replaced there (all of it), by what, and the test that has to notice.
type Mutant = (&'static str, &'static str, &'static str, &'static str, &'static str);

const GOLDEN: &str = "golden_files";
const RANDOM: &str = "random_problems";
const SHORT: &str = "short_and_empty_requests_in_one_part";
const BAD: &str = "bad_tables_and_lengths";

const MUTANTS: [Mutant; 22] = [
    // Who waits for whom.
    ("a record is given back one warp early", "tile.h", "SEG_READERS = 15;", "SEG_READERS = 14;", RANDOM),
    (
        "factors are written without waiting",
        "decode_qk.h",
        "mbar_wait(smem + Smem::inv_empty, (seg & 1) ^ 1);",
        "",
        RANDOM,
    ),
    (
        "few rows: factors are written without waiting",
        "decode_few.h",
        "mbar_wait(smem + Smem::inv_empty, (seg & 1) ^ 1);",
        "",
        SHORT,
    ),
    ("a stage is given back by one half", "decode.cu", ": in_bytes(4, 8, 8, 8,", ": in_bytes(4, 4, 4, 4,", RANDOM),
    (
        "a pair's stage goes back to the wrong CTA",
        "decode_pv.h",
        "arrive_empty(smem, stage, 1, cluster_size() - 1);",
        "arrive_empty(smem, stage, 1, 0);",
        GOLDEN,
    ),
    (
        "O goes through a stage that was given back",
        "decode_pv.h",
        "const bool held = left == 0 && ld_shared(rec + SEG_SLOT) < 0;",
        "const bool held = false;",
        RANDOM,
    ),
    (
        "one lane says that Q is read before the others have looked",
        "decode_qk.h",
        "__syncwarp();
            if (arrives(opaque(threadIdx.x) % 32)) mbar_arrive(smem + Smem::done_q);",
        "if (arrives(opaque(threadIdx.x) % 32)) mbar_arrive(smem + Smem::done_q);",
        RANDOM,
    ),
    (
        "late columns are multiplied before they land",
        "decode_qk.h",
        "mbar_wait(smem + Smem::full_tail + buf * 8, (item >> 1) & 1);",
        "",
        GOLDEN,
    ),
    (
        "late columns are loaded over those in use",
        "decode_load.h",
        "mbar_wait(smem + Smem::empty_tail + buf * 8, ((item >> 1) & 1) ^ 1);",
        "",
        GOLDEN,
    ),
    ("Q is loaded over the one in use", "decode_load.h", "mbar_wait(smem + Smem::done_q, (seg & 1) ^ 1);", "", RANDOM),
    // What is computed.
    ("V is read past the end", "decode_pv.h", "if (valid < BLOCK) zero_tail(v, valid, half);", "", GOLDEN),
    (
        "few rows: V is read past the end",
        "decode_few.h",
        "if (valid < BLOCK) Pv::zero_tail(v, valid, half);",
        "",
        GOLDEN,
    ),
    ("a key too many is seen", "decode_qk.h", "if (tok + 8 * i >= limit0)", "if (tok + 8 * i > limit0)", RANDOM),
    (
        "O is not rescaled",
        "decode_pv.h",
        "if (fresh && ld_shared_i8(smem + Smem::rescale + buf * 4 + warp)) {",
        "if (false) {",
        GOLDEN,
    ),
    (
        "weights are trusted whatever they add up to",
        "decode_qk.h",
        "SUM_LIMIT = 4096.0f;",
        "SUM_LIMIT = 3e38f;",
        GOLDEN,
    ),
    (
        "few rows: a warp's own maxima",
        "decode_few.h",
        "for (u32 w = 0; w < 4; ++w) top[j]",
        "for (u32 w = 0; w < 1; ++w) top[j]",
        GOLDEN,
    ),
    (
        "few rows: a warp's own sums",
        "decode_few.h",
        "for (u32 w = 0; w < 4; ++w) total",
        "for (u32 w = 0; w < 3; ++w) total",
        GOLDEN,
    ),
    ("a part begins one block late", "schedule.cu", "k += int(take);", "k += int(take) + 1;", GOLDEN),
    (
        "pieces are added as if of one maximum",
        "combine.cu",
        "const float f = power_of_two(others_max[k] - max[k]);",
        "const float f = 1.0f;",
        GOLDEN,
    ),
    ("the tree loses a level", "combine.cu", "half > 0; half /= 2) {", "half > 1; half /= 2) {", GOLDEN),
    // What is not to be trusted.
    ("table entries are not checked", "decode_load.h", "if (u32(page) >= u32(p.num_pages)) {", "if (false) {", BAD),
    (
        "lengths are not checked",
        "decode_walk.h",
        "const bool bad = len < 0 || i64(len) > ",
        "const bool bad = i64(len) > 0 && i64(len) < ",
        BAD,
    ),
];

/// A copy of the sources with the mutant in it.
fn plant(dir: &Path, (name, file, from, to, _): &Mutant) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut planted = false;
    for source in sources(root) {
        let below = source.strip_prefix(root).expect("a path below the root");
        let copy = dir.join(below);
        fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder for the copy");
        let mut text = fs::read_to_string(&source).expect("a source");
        if below == Path::new("backends/sm90").join(file) {
            planted = text.contains(from);
            text = text.replace(from, to);
        }
        fs::write(copy, text).expect("a copy");
    }
    assert!(planted, "{name}: {file} does not contain {from:?}");
}

/// Starts one of the other tests on the sources below `root`.
fn start(root: &Path, test: &str) -> Child {
    let mut command = Command::new(env::current_exe().expect("this test"));
    command.args(["--exact", &format!("cuda::sm90::emulated::{test}"), "--nocapture"]).env(ROOT_VARIABLE, root);
    command.env("POLYMLA_TEST_RANDOM", "200").stdout(Stdio::null());
    command.stderr(fs::File::create(root.join("stderr")).expect("a file for its words")).spawn().expect("it starts")
}

/// Whether it failed; a wait that does not end is one that fails.
fn fails(child: &mut Child) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(300) {
        if let Some(status) = child.try_wait().expect("its status") {
            return !status.success();
        }
        thread::sleep(Duration::from_millis(50));
    }
    child.kill().expect("it can be ended");
    child.wait().expect("its status");
    true
}

#[test]
fn each_fault_is_noticed() {
    let at: PathBuf = Path::new(env!("OUT_DIR")).join("sm90-mutants");
    let _ = fs::remove_dir_all(&at);
    let next = AtomicUsize::new(0);
    let unnoticed = Mutex::new(Vec::new());
    let work = || {
        while let Some(mutant @ &(name, file, .., test)) = MUTANTS.get(next.fetch_add(1, Ordering::Relaxed)) {
            let root = at.join(format!("{file} {name}").replace(' ', "-"));
            plant(&root, mutant);
            let noticed = fails(&mut start(&root, test));
            // One that does not compile would be no proof.
            let words = fs::read_to_string(root.join("stderr")).unwrap_or_default();
            assert!(!words.contains(": error: "), "{name}: {words}");
            if !noticed {
                unnoticed.lock().expect("the list").push(name);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let unnoticed = unnoticed.into_inner().expect("the list");
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}
