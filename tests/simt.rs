//! Tier T3 of the portable kernels: the source that every vendor compiles, run on this CPU by a fiber harness
//! (tests/simt) at warp widths 32, 64 and 128, its matrix instructions emulated lane by lane.

#![cfg(all(target_os = "linux", target_env = "gnu", feature = "cpu"))]

#[path = "simt/host.rs"]
mod host;
#[path = "simt/library.rs"]
mod library;
#[path = "simt/pieces.rs"]
mod pieces;

use std::path::Path;
use std::process::Command;

use host::{STATUS_OK, SimtBackend, policy};
use library::by_name;
use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Call, Layout, POLICIES, check, check_with, golden};
use polymla::{DType, HostBackend, MlaBackend, MlaError, ScheduleOptions, SplitPolicy, get_mla_metadata};

/// Golden files that are small enough for emulation, with the traps that the others have too.
const GOLDEN: [&str; 7] = [
    "dense_bf16_b1_sq1_hq16_sk64",
    "dense_bf16_b2_sq1_hq6_hkv2",
    "dense_bf16_b2_sq4_hq9_shorter_than_sq",
    "dense_bf16_b6_sq2_hq16_zero_len",
    "dense_bf16_b2_sq2_hq16_peaked_rising",
    "dense_fp16_b1_sq3_hq20_peaked_rising",
    "dense_fp16_b2_sq4_hq16_causal",
];

fn golden_files(name: &str) {
    let backend = SimtBackend::new(by_name(name));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut failures = Vec::new();
    for file in GOLDEN {
        let call = golden::load(root.join(file).with_extension("safetensors")).unwrap();
        for (layout, policy) in
            [(Layout::Fused, POLICIES[0]), (Layout::Split, POLICIES[2]), (Layout::Fused, POLICIES[1])]
        {
            let outcome = check(&backend, &call, layout, policy);
            if !outcome.passed() {
                failures.push(format!("{file} {layout} {policy:?}: {}", outcome.failure()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn random_problems(name: &str, cases: u64, limits: &Limits) {
    let backend = SimtBackend::new(by_name(name));
    let mut failures = Vec::new();
    for seed in 0..cases {
        let call = random_call(seed, limits).unwrap();
        let outcome = check_with(&backend, &call, Layout::Given, &random_options(seed));
        if !outcome.passed() {
            failures.push(format!("{}: {}", call.name, outcome.failure()));
        }
    }
    assert!(failures.is_empty(), "{} of {cases}:\n{}", failures.len(), failures.join("\n"));
}

/// DeepSeek's head sizes: what the tuned kernels serve. `rows` bounds the query rows of a KV head.
fn tuned(heads_per_kv: usize, s_q: usize, stride_multiple: usize) -> Limits {
    Limits {
        max_b: 4,
        max_s_q: s_q,
        max_heads_per_kv: heads_per_kv,
        max_tokens: 500,
        max_work: 6_000_000,
        stride_multiple,
        ..Limits::deepseek()
    }
}

macro_rules! variants {
    ($($module:ident: $name:literal, $heads:expr;)*) => {
        $(mod $module {
            use super::*;

            #[test]
            fn golden() {
                golden_files($name);
            }
            #[test]
            fn random() {
                random_problems($name, 24, &tuned($heads, 2, 8));
            }
            #[test]
            fn random_unaligned() {
                random_problems($name, 8, &tuned($heads, 2, 1));
            }
        })*
    };
}

variants! {
    mma_32_227: "mma-32-227", 70;
    mma_32_163: "mma-32-163", 70;
    mma_32_99: "mma-32-99", 40;
    fma_32_64: "fma-32-64", 20;
    mfma_64_64: "mfma-64-64", 20;
    mfma_64_163: "mfma-64-163", 70;
    fma_64_64: "fma-64-64", 20;
    fma_128_28: "fma-128-28", 20;
}

/// Any head dimensions: the generic kernel, at every width.
#[test]
fn generic_kernel() {
    let limits = Limits {
        max_work: 150_000,
        max_tokens: 300,
        max_heads_per_kv: 6,
        dtypes: vec![DType::Bf16, DType::F16],
        ..Limits::any()
    };
    for name in ["fma-32-64", "fma-64-64", "fma-128-28"] {
        random_problems(name, 40, &limits);
    }
    // More columns than a block of threads has in one piece.
    let wide = Limits { head_dims: vec![(1100, 1030), (2049, 2049)], max_b: 2, ..limits };
    random_problems("fma-64-64", 6, &wide);
}

/// A host allots what the README's table says; the source must need exactly that.
#[test]
fn shared_memory_is_what_the_readme_says() {
    let text = include_str!("../backends/portable/README.md");
    let mut checked = 0;
    for variant in library::VARIANTS {
        let start = format!("| {} | {} | ", variant.shared_kib, variant.warp);
        let line = text.lines().find_map(|l| l.strip_prefix(&start)).unwrap_or_else(|| panic!("no row {start}"));
        let kernels = library::Kernels::open(&variant);
        let cells = line.trim_end_matches(" |").split(" | ");
        for (cell, (d, m)) in cells.zip([(576, 16), (576, 32), (576, 64), (512, 16), (512, 32), (512, 64)]) {
            let needed = kernels.shared_bytes(&format!("polymla_decode_f16_d{d}_m{m}"));
            assert_eq!(cell.parse().unwrap_or(0), needed, "{} d{d} m{m}", variant.name);
            checked += usize::from(needed > 0);
        }
        assert!(kernels.shared_bytes("polymla_generic_bf16") <= 1024);
        assert_eq!(kernels.shared_bytes("polymla_combine_bf16"), 4096);
        assert_eq!(kernels.shared_bytes("polymla_schedule"), 6144);
        assert_eq!(kernels.shared_bytes("polymla_merge_bf16"), if variant.tile == "SIMT_TILE_MMA" { 22144 } else { 0 });
    }
    assert!(checked >= 30, "{checked} cells checked");
}

#[test]
fn schedules_equal_the_host_s() {
    for name in ["fma-32-64", "fma-128-28"] {
        let backend = SimtBackend::new(by_name(name));
        let mut rng = fastrand_like(7);
        for case in 0..150 {
            let b = if case % 50 == 49 { 1500 } else { rng() as usize % 40 };
            let lens: Vec<i32> = (0..b)
                .map(|_| match rng() % 5 {
                    0 => 0,
                    1 => (rng() % 64) as i32,
                    2 => (rng() % 40 * 64) as i32,
                    _ => (rng() % 9000) as i32,
                })
                .collect();
            let (policy, parts) = (policy(rng()), 1 + rng() as usize % 140);
            let want = get_mla_metadata(&lens, parts, policy).unwrap();
            let plan = backend.plan(&lens, 9000, parts, policy);
            assert_eq!(plan.parts, want.tile_scheduler_metadata(), "case {case}: {policy:?} {parts} parts {lens:?}");
            assert_eq!(plan.num_splits, want.num_splits(), "case {case}: {policy:?} {parts} parts {lens:?}");
            assert_eq!(*plan.status.lock().unwrap(), STATUS_OK);
            assert!(want.total_splits() <= plan.slots, "case {case}: {} slots", plan.slots);
        }
    }
}

/// Where the overhead is left to the kernel, it takes the plan that costs least by the rule of schedule.h.
#[test]
fn an_open_overhead_makes_the_cheapest_plan() {
    let mut rng = fastrand_like(11);
    let mut chosen = std::collections::BTreeSet::new();
    for name in ["fma-32-64", "fma-64-64", "fma-128-28"] {
        let backend = SimtBackend::new(by_name(name));
        for case in 0..60 {
            let b = if case == 59 { 1100 } else { 1 + rng() as usize % 20 };
            let lens: Vec<i32> = (0..b).map(|_| (rng() % 3 * (rng() % 9000)) as i32).collect();
            let (parts, merge_cost) = (1 + rng() as usize % 140, (rng() % 60) as i64);
            let plan_of =
                |overhead_blocks| get_mla_metadata(&lens, parts, SplitPolicy::Balanced { overhead_blocks }).unwrap();
            let cost = |overhead: u32| {
                let plan = plan_of(overhead);
                let segments =
                    |part| plan.splits_of(part).map(|s| (s.end_block - s.begin_block).max(1) as i64 * 1024 + 1280);
                let dearest = plan.tile_scheduler_metadata().iter().map(|part| segments(part).sum::<i64>()).max();
                dearest.unwrap() + merge_cost * plan.total_partials() as i64
            };
            let best = [5, 0, 1, 2, 3, 4, 7, 9].into_iter().min_by_key(|overhead| cost(*overhead)).unwrap();
            chosen.insert(best);
            let plan = backend.plan_with(&lens, 20_000, parts, SplitPolicy::default(), -1, merge_cost as i32);
            let want = plan_of(best);
            assert_eq!(
                plan.parts,
                want.tile_scheduler_metadata(),
                "{name} {case}: overhead {best}, {parts} parts {lens:?}"
            );
            assert_eq!(plan.num_splits, want.num_splits(), "{name} {case}: overhead {best}, {parts} parts {lens:?}");
        }
    }
    assert!(chosen.len() >= 4, "the cases are too much alike: {chosen:?}");
}

/// A plan whose blocks do not fit 32 bits is refused, and what it leaves is safe to run.
#[test]
fn an_overflowing_schedule_is_reported() {
    let backend = SimtBackend::new(by_name("fma-32-64"));
    let lens = vec![i32::MAX; 70];
    let policy = SplitPolicy::BatchInvariant { split_blocks: 1 };
    assert!(matches!(get_mla_metadata(&lens, 4, policy), Err(MlaError::Overflow { .. })));
    let plan = backend.plan(&lens, u64::from(u32::MAX), 4, policy);
    assert_eq!(*plan.status.lock().unwrap(), 70);
    assert!(plan.parts.iter().all(|p| p.begin_req > p.end_req));
    assert!(plan.num_splits.iter().all(|n| *n == 0));
}

/// A generator of numbers for tests that draw few.
fn fastrand_like(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    }
}

fn bits(backend: &dyn HostBackend, call: &Call, options: &ScheduleOptions) -> (Vec<u8>, Vec<u8>) {
    let mut results = call.poisoned_outputs().unwrap();
    backend.decode(&call.problem, options, &call.inputs().unwrap(), &mut results.outputs().unwrap()).unwrap();
    (results.out.to_dense_bytes(), results.lse.to_dense_bytes())
}

/// Another order of the threads must not change a bit: what a data race would do.
#[test]
fn the_order_of_threads_does_not_matter() {
    for name in ["mma-32-227", "mfma-64-64", "fma-128-28"] {
        let mut backend = SimtBackend::new(by_name(name));
        for seed in [3, 11] {
            let call = random_call(seed, &tuned(40, 2, 8)).unwrap();
            let options =
                ScheduleOptions { num_sm_parts: Some(3), policy: SplitPolicy::Balanced { overhead_blocks: 0 } };
            backend.seed = 1;
            let first = bits(&backend, &call, &options);
            for order in 2..5 {
                backend.seed = order;
                assert!(bits(&backend, &call, &options) == first, "{name} seed {seed} order {order}");
            }
        }
    }
}

/// Roles must not lose step in a part with segments that have nothing to multiply: some roles wait for nobody in them.
#[test]
fn segments_without_keys_between_others() {
    let limits = Limits { max_heads_per_kv: 64, max_s_q: 1, max_tokens: 200, ..tuned(64, 1, 8) };
    let mut backend = SimtBackend::new(by_name("mma-32-227"));
    let rows = |c: &Call| c.problem.s_q() * c.problem.heads_per_kv();
    let calls = (0..).map(|seed| random_call(seed, &limits).unwrap()).filter(|c| rows(c) > 32);
    let options = ScheduleOptions { num_sm_parts: Some(1), policy: SplitPolicy::Balanced { overhead_blocks: 0 } };
    let mut tested = 0;
    for call in calls.take(12) {
        let lens = call.cache_seqlens();
        let (Some(empty), Some(some)) = (lens.iter().position(|n| *n == 0), lens.iter().position(|n| *n > 0)) else {
            continue;
        };
        let picks = [some, empty, empty, some, empty, some, empty, empty, empty, empty];
        let batch = call.with_requests(&picks).unwrap();
        let alone = [empty, some].map(|i| bits(&backend, &call.with_requests(&[i]).unwrap(), &options));
        for order in 1..5 {
            backend.seed = order;
            let (out, lse) = bits(&backend, &batch, &options);
            for (i, pick) in picks.iter().enumerate() {
                let (o, l) = &alone[usize::from(*pick == some)];
                assert!(out[i * o.len()..][..o.len()] == **o, "order {order} request {i} of {}", call.name);
                assert!(lse[i * l.len()..][..l.len()] == **l, "order {order} request {i} of {}", call.name);
            }
        }
        tested += 1;
    }
    assert!(tested >= 3, "only {tested} calls have requests with keys and without");
}

/// A scale of zero weighs all visible keys alike, and a key that is hidden must not become NaN by it.
#[test]
fn a_scale_of_zero_hides_hidden_keys() {
    for (name, heads_per_kv) in [("mma-32-227", 64), ("mma-32-227", 16), ("mfma-64-64", 16)] {
        let backend = SimtBackend::new(by_name(name));
        let limits = Limits { max_tokens: 200, ..tuned(heads_per_kv, 4, 8) };
        let fits = |c: &Call| c.problem.softmax_scale() == 0.0 && c.problem.heads_per_kv() * 2 > heads_per_kv;
        let calls = (0..).map(|seed| random_call(seed, &limits).unwrap()).filter(fits);
        for call in calls.filter(|c| c.problem.s_q() > 1).take(3) {
            let outcome = check_with(&backend, &call, Layout::Given, &ScheduleOptions::default());
            assert!(outcome.passed(), "{name} {}: {}", call.name, outcome.failure());
        }
    }
}

#[test]
fn batch_invariant_rows_have_the_same_bits_alone() {
    let limits = Limits { max_tokens: 700, ..tuned(20, 2, 8) };
    let options =
        |parts| ScheduleOptions { num_sm_parts: Some(parts), policy: SplitPolicy::BatchInvariant { split_blocks: 2 } };
    for name in ["mma-32-227", "mfma-64-64"] {
        let backend = SimtBackend::new(by_name(name));
        let calls = (0..40).map(|seed| random_call(seed, &limits).unwrap()).filter(|c| c.problem.b() >= 3);
        for call in calls.take(3) {
            let all: Vec<usize> = (0..call.problem.b()).collect();
            let (out, lse) = bits(&backend, &call.with_requests(&all).unwrap(), &options(7));
            for i in all {
                let (o, l) = bits(&backend, &call.with_requests(&[i]).unwrap(), &options(2));
                assert!(o == out[i * o.len()..(i + 1) * o.len()], "{name} {} request {i}", call.name);
                assert!(l == lse[i * l.len()..(i + 1) * l.len()], "{name} {} request {i}", call.name);
            }
        }
    }
}

/// What only the device sees: the request becomes NaN, the status word names it, the others stay right.
#[test]
fn bad_tables_and_lengths_are_reported_and_never_followed() {
    for (name, limits) in [
        ("mma-32-227", tuned(40, 1, 8)),
        ("mfma-64-64", tuned(16, 1, 8)),
        ("fma-128-28", tuned(16, 1, 1)),
        ("fma-32-64", Limits { dtypes: vec![DType::Bf16], max_heads_per_kv: 4, max_work: 150_000, ..Limits::any() }),
    ] {
        let backend = SimtBackend::new(by_name(name));
        let calls: Vec<Call> = (100..).map(|seed| random_call(seed, &limits).unwrap()).filter(usable).take(3).collect();
        for call in &calls {
            let lens = call.cache_seqlens();
            let victim = lens.iter().position(|n| *n > 0).unwrap();
            let pages = (lens[victim] as usize).div_ceil(call.problem.page_size());
            let too_long = call.problem.max_tokens_per_seq() as f64 + 1.0;
            let table = |entry: f64| ("block_table", vec![victim, pages - 1], entry);
            for (tensor, index, value) in [
                table(call.problem.num_pages() as f64),
                table(-1.0),
                table(2147480000.0),
                ("cache_seqlens", vec![victim], -1.0),
                ("cache_seqlens", vec![victim], f64::from(i32::MIN)),
                ("cache_seqlens", vec![victim], too_long),
                ("cache_seqlens", vec![victim], f64::from(i32::MAX)),
            ] {
                let mut bad = call.clone();
                bad.tensor_mut(tensor).unwrap().set(&index, value);
                device_check(&backend, call, &bad, victim, &format!("{name} {} {tensor} {value}", call.name));
            }
        }
    }
}

fn usable(call: &Call) -> bool {
    let lens = call.cache_seqlens();
    call.problem.b() >= 2 && lens.iter().any(|n| *n > 0) && call.tensor("visible_lengths").is_none()
}

fn device_check(backend: &SimtBackend, good: &Call, bad: &Call, victim: usize, what: &str) {
    let options = ScheduleOptions { num_sm_parts: Some(3), policy: SplitPolicy::BatchInvariant { split_blocks: 1 } };
    let p = &bad.problem;
    let inputs = bad.inputs().unwrap();
    let mut results = bad.poisoned_outputs().unwrap();
    let mut outputs = results.outputs().unwrap();
    let schedule = MlaBackend::schedule(backend, p, &options, &inputs, ()).unwrap();
    let mut scratch = backend.alloc(backend.workspace_bytes(p, &schedule)).unwrap();
    let mut workspace = backend.workspace(&mut scratch);
    MlaBackend::run(backend, p, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap();
    match backend.finish(&schedule, ()) {
        Err(MlaError::DeviceCheck { request, .. }) => assert_eq!(request, victim, "{what}"),
        other => panic!("{what}: {other:?}"),
    }
    results.check_written().unwrap_or_else(|e| panic!("{what}: {e}"));
    let expected = good.expected.as_ref().unwrap();
    let rows = p.s_q() * p.h_q();
    let (out, lse) = (results.out.to_f64(), results.lse.to_f64());
    for (values, want, each) in [(&out, &expected.out, rows * p.head_dim_v()), (&lse, &expected.lse, rows)] {
        for request in 0..p.b() {
            let range = request * each..(request + 1) * each;
            if request == victim {
                assert!(values[range].iter().all(|x| x.is_nan()), "{what}: not all NaN");
                continue;
            }
            let near = |(x, y): (&f64, &f64)| x == y || (x - y).abs() <= 0.02 * y.abs() + 0.05;
            assert!(values[range.clone()].iter().zip(&want[range]).all(near), "{what}: request {request} changed");
        }
    }
}

#[test]
fn invalid_visible_lengths_are_reported() {
    let limits = tuned(16, 2, 8);
    let backend = SimtBackend::new(by_name("mma-32-227"));
    let visible = |c: &Call| c.tensor("visible_lengths").is_some() && c.problem.b() >= 2;
    let call = (0..).map(|seed| random_call(seed, &limits).unwrap()).find(visible).unwrap();
    let len = call.cache_seqlens()[1];
    for value in [-1, len + 1] {
        let mut bad = call.clone();
        bad.tensor_mut("visible_lengths").unwrap().set(&[1, 0], f64::from(value));
        let inputs = bad.inputs().unwrap();
        let mut results = bad.poisoned_outputs().unwrap();
        let done = polymla::flash_mla_with_kvcache(
            &backend,
            &bad.problem,
            &ScheduleOptions::default(),
            &inputs,
            &mut results.outputs().unwrap(),
            (),
        );
        assert!(matches!(done, Err(MlaError::DeviceCheck { request: 1, .. })), "{value}: {done:?}");
    }
}

/// The harness itself: a kernel that no GPU would forgive must not pass. Each runs in a child process, which has to
/// abort and say why.
#[test]
fn divergence_aborts() {
    const VARIABLE: &str = "POLYMLA_SIMT_ABORT";
    if let Ok(kernel) = std::env::var(VARIABLE) {
        let backend = SimtBackend::new(by_name("fma-32-64"));
        // SAFETY: these kernels read no parameters.
        unsafe { backend.kernels.launch(&kernel, 1, 0, &0u64, 1) };
        return;
    }
    for (kernel, message) in [
        ("divergent_barrier", "divergent barrier"),
        ("divergent_shuffle", "nobody can go on"),
        ("crossed_barriers", "threads wait at different places"),
        ("shared_overrun", "past the end of shared memory"),
        ("unwaited_copy", "nobody waited for"),
        ("arrives_twice", "arrives twice in one phase"),
    ] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["divergence_aborts", "--exact", "--nocapture"])
            .env(VARIABLE, kernel)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&child.stderr);
        assert!(!child.status.success(), "{kernel} passed");
        assert!(stderr.contains(message), "{kernel}: {stderr}");
    }
}
