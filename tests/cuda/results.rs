//! What a device computes: golden files, random problems, the same bits again, and bad input.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Call, LAYOUTS, Layout, check_call, check_with, golden, marks_only, with_bad_request};
use polymla::cuda::Stream;
use polymla::schedule::PartMetadata;
use polymla::{MlaError, ScheduleOptions, SplitPolicy};

use crate::device::{Placed, Results, Tested, backend, enqueue, rebuilt};

fn golden_calls() -> Vec<Call> {
    // The test may run on another machine than it was built on, from the root of the repository.
    let folders = [concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"), "tests/golden"];
    let folder = folders.iter().find(|f| Path::new(f).is_dir()).expect("the folder of golden files");
    let files = golden::list(folder).expect("golden files");
    assert!(files.len() >= 14, "{} golden files", files.len());
    files.iter().map(|file| golden::load(file).expect("a golden file")).collect()
}

pub fn golden_files<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    let mut failures = Vec::new();
    for call in golden_calls() {
        let bad = check_call(&backend, &call, &LAYOUTS).into_iter().filter(|check| !check.passed());
        failures.extend(bad.map(|c| format!("{} {} {:?}: {}", c.call, c.layout, c.policy, c.failure())));
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

pub fn random_problems<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    let count = std::env::var("POLYMLA_TEST_RANDOM").ok().and_then(|n| n.parse().ok()).unwrap_or(1000u64);
    let (next, failures) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    // The reference takes the time: one seed a thread at once.
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        break;
                    }
                    let limits = Limits { max_s_q: 16, ..Limits::deepseek() };
                    let call = random_call(seed, &limits).expect("a valid problem");
                    let outcome = check_with(&backend, &call, Layout::Given, &random_options(seed));
                    if !outcome.passed() {
                        let text = format!("{} {:?}: {}", call.name, random_options(seed), outcome.failure());
                        failures.lock().expect("no thread panics while it holds this").push(text);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no thread panics while it holds this");
    assert!(failures.is_empty(), "{} of {count} failed:\n{}", failures.len(), failures.join("\n"));
}

/// Calls with several requests, whose outputs a test compares bit by bit.
fn batches(count: usize) -> Vec<Call> {
    // Small, because the reference's values come with every call.
    let limits = Limits { max_b: 12, max_work: 20_000_000, ..Limits::deepseek() };
    let wanted = |call: &Call| call.problem.b() > 2 && call.cache_seqlens().iter().any(|n| *n > 100);
    // The reference takes the time: one seed a thread at once.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let (limits, mut calls) = (&limits, Vec::new());
    for first in (1000..).step_by(threads as usize) {
        std::thread::scope(|scope| {
            let seeds = first..first + threads;
            let made: Vec<_> =
                seeds.map(|seed| scope.spawn(move || random_call(seed, limits).expect("a valid problem"))).collect();
            calls.extend(made.into_iter().map(|call| call.join().expect("a call")).filter(wanted));
        });
        if calls.len() >= count {
            break;
        }
    }
    calls.truncate(count);
    calls
}

pub fn repeated_runs_give_the_same_bits<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    for call in batches(20) {
        for policy in [SplitPolicy::default(), SplitPolicy::BatchInvariant { split_blocks: 2 }] {
            let options = ScheduleOptions { num_sm_parts: None, policy };
            let placed = Placed::new(&backend, &call);
            let bits = || {
                let mut results = Results::new(&backend, call.poisoned_outputs().expect("outputs"));
                let (schedule, _scratch) =
                    enqueue(&backend, &call, &options, &placed.inputs(), &mut results).expect("run");
                backend.finish(&schedule, Stream::default()).expect("finish");
                results.read()
            };
            let first = bits();
            for again in 0..5 {
                assert!(bits() == first, "{} {policy:?}: run {again} differs", call.name);
            }
        }
    }
}

pub fn batch_invariant_rows_have_the_same_bits_alone<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    for call in batches(20) {
        for split_blocks in [1, 3, 16] {
            let options = ScheduleOptions { num_sm_parts: None, policy: SplitPolicy::BatchInvariant { split_blocks } };
            let placed = Placed::new(&backend, &call);
            let dense = || Call { output_strides: None, ..call.clone() };
            let mut together = Results::new(&backend, dense().poisoned_outputs().expect("outputs"));
            let (schedule, _scratch) =
                enqueue(&backend, &call, &options, &placed.inputs(), &mut together).expect("run");
            backend.finish(&schedule, Stream::default()).expect("finish");
            let (out, lse) = together.read();
            let b = call.problem.b();
            for request in 0..b {
                let alone = Call { problem: rebuilt(&call.problem, 1, call.problem.num_pages()), ..dense() };
                let mut results = Results::new(&backend, alone.poisoned_outputs().expect("outputs"));
                let inputs = placed.first_requests(1, request);
                let (schedule, _scratch) = enqueue(&backend, &alone, &options, &inputs, &mut results).expect("run");
                backend.finish(&schedule, Stream::default()).expect("finish");
                let (out_alone, lse_alone) = results.read();
                let part = |all: &[u8]| all[all.len() / b * request..][..all.len() / b].to_vec();
                assert!(part(&out) == out_alone, "{} request {request}: out differs alone", call.name);
                assert!(part(&lse) == lse_alone, "{} request {request}: lse differs alone", call.name);
            }
        }
    }
}

pub fn schedules_cover_every_block_once<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    for call in batches(60) {
        let options = random_options(call.name.len() as u64 + u64::from(call.cache_seqlens()[0].unsigned_abs()));
        let placed = Placed::new(&backend, &call);
        let schedule =
            backend.schedule(&call.problem, &options, &placed.inputs(), Stream::default()).expect("schedule");
        let plan = B::plan(&schedule).expect("the plan");
        let mut covered: Vec<usize> = vec![0; call.problem.b()];
        let blocks = |r: usize| (call.cache_seqlens()[r] as usize).div_ceil(64);
        let worked = |part: &&PartMetadata| part.begin_req <= part.end_req && (part.begin_req as usize) < covered.len();
        let parts: Vec<_> = plan.tile_scheduler_metadata.iter().filter(worked).copied().collect();
        for part in &parts {
            let (first, last) = (part.begin_req as usize, part.end_req as usize);
            for (r, covered) in covered.iter_mut().enumerate().take(last + 1).skip(first) {
                let begin = if r == first { part.begin_block as usize } else { 0 };
                assert_eq!(begin, *covered, "{}: request {r} has a gap or an overlap: {parts:?}", call.name);
                *covered = if r == last { part.end_block as usize } else { blocks(r) };
            }
        }
        let all: Vec<usize> = (0..call.problem.b()).map(blocks).collect();
        assert_eq!(covered, all, "{}: {parts:?}", call.name);
        assert_eq!(plan.num_splits[0], 0);
        assert!(plan.num_splits.windows(2).all(|w| w[1] > w[0]), "{}: {:?}", call.name, plan.num_splits);
    }
}

pub fn bad_tables_and_lengths_mark_their_request_only<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    for (i, call) in batches(24).into_iter().enumerate() {
        let (bad, victim) = with_bad_request(&call, i).expect("a long request");
        for policy in [SplitPolicy::default(), SplitPolicy::BatchInvariant { split_blocks: 1 }] {
            let options = ScheduleOptions { num_sm_parts: None, policy };
            let placed = Placed::new(&backend, &bad);
            let mut results = Results::new(&backend, call.poisoned_outputs().expect("outputs"));
            let (schedule, _scratch) = enqueue(&backend, &bad, &options, &placed.inputs(), &mut results).expect("run");
            let error = backend.finish(&schedule, Stream::default()).expect_err("the check must report it");
            assert!(
                matches!(error, MlaError::DeviceCheck { request, .. } if request == victim),
                "{} victim {victim}: {error}",
                call.name
            );
            assert!(!B::has_failed(&schedule), "reported once");
            results.read();
            marks_only(&call, victim, &results.host).unwrap_or_else(|e| panic!("{policy:?} victim {victim}: {e}"));
        }
        // The host form refuses the same input before anything runs.
        let mut untouched = bad.poisoned_outputs().expect("outputs");
        let inputs = bad.inputs().expect("inputs");
        let refused = backend.decode(
            &bad.problem,
            &ScheduleOptions::default(),
            &inputs,
            &mut untouched.outputs().expect("outputs"),
        );
        assert!(refused.is_err() && untouched.untouched(), "{}: {refused:?}", call.name);
    }
}
