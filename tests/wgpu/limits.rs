//! With the limits of a browser: results, caches and workspaces larger than a binding.

use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Call, Expected, HostTensor, Layout, POLICIES, Tolerance, check, check_with, golden};
use polymla::wgpu::{WgpuBackend, api, shaders};
use polymla::{DType, HostBackend, Problem, ScheduleOptions, SplitPolicy};

fn golden_and_random(backend: &WgpuBackend, files: usize, seeds: std::ops::Range<u64>) {
    let name = &HostBackend::info(backend).device_name;
    // Relative: on machines without cargo the test is carried to, this is run in the repository's root.
    let listed = golden::list("tests/golden").unwrap();
    assert!(listed.len() >= 14);
    for file in &listed[..files.min(listed.len())] {
        let call = golden::load(file).unwrap();
        for (layout, policy) in [(Layout::Fused, POLICIES[0]), (Layout::Split, POLICIES[1])] {
            let outcome = check(backend, &call, layout, policy);
            assert!(outcome.passed(), "{name}, {} {layout} {policy:?}: {}", call.name, outcome.failure());
        }
    }
    for seed in seeds {
        let call = random_call(seed, &Limits { max_work: 2_000_000, ..Limits::any() }).unwrap();
        let outcome = check_with(backend, &call, Layout::Given, &random_options(seed));
        assert!(outcome.passed(), "{name}, {}: {}", call.name, outcome.failure());
    }
}

/// Random problems that suit matrices: lengths that end anywhere, causal or not, rope or not, pages of 16 and more.
fn matrix_problems(backend: &WgpuBackend, seeds: std::ops::Range<u64>) {
    let (mut taken, mut causal) = (0, 0);
    for seed in seeds {
        // Every other one has all columns and pages of whole steps, which kernels are built FULL for.
        let full = seed % 2 == 0;
        let any_columns = vec![(64, 64), (80, 64), (576, 512), (160, 96), (192, 128)];
        let limits = Limits {
            max_b: 3,
            max_s_q: 3,
            max_heads_per_kv: 64,
            max_h_kv: 2,
            head_dims: if full { vec![(576, 512), (192, 128)] } else { any_columns },
            page_sizes: if full { vec![32, 64, 96] } else { vec![16, 48, 64] },
            max_tokens: 300,
            dtypes: vec![DType::F16, DType::Bf16],
            max_work: 1_500_000,
            stride_multiple: 8,
            ..Limits::any()
        };
        let call = random_call(seed, &limits).unwrap();
        if !backend.path(&call.problem).is_matrix() {
            continue;
        }
        let options = random_options(seed);
        let outcome = check_with(backend, &call, Layout::Given, &options);
        let name = &HostBackend::info(backend).device_name;
        assert!(outcome.passed(), "{name}, {} {options:?}: {}", call.name, outcome.failure());
        taken += 1;
        causal += usize::from(call.problem.mask() != polymla::Mask::None);
    }
    assert!(taken >= 4 && causal > 0, "only {taken} problems suit matrices, {causal} of them masked");
}

#[test]
fn every_path_is_right() {
    let plain = shaders::Path::ALL.into_iter().filter(|path| !path.is_matrix());
    let taken = super::by_paths(plain, |_, backend| golden_and_random(backend, usize::MAX, 1000..1040));
    assert_ne!(taken, Some(0));
}

/// With real matrices where the adapter has them; emulated everywhere, so that the rest of the path is checked without.
#[test]
fn matrix_paths_are_right() {
    super::by_paths(super::matrix_paths(), |path, backend| {
        // Emulated matrices are slow: FEW problems below, and these.
        matrix_problems(backend, if path.is_emulated() { FEW..36 } else { FEW..250 });
        golden_and_random(backend, if path.is_emulated() { 0 } else { usize::MAX }, 3000..3020);
    });
}

/// What `mutants` runs again and again.
const FEW: u64 = 12;
#[test]
fn matrix_paths_are_right_in_short() {
    super::by_paths(super::matrix_paths(), |_, backend| matrix_problems(backend, 0..FEW));
}

#[test]
fn the_limits_of_a_browser_suffice() {
    let Some(backend) = super::backend(WgpuBackend::web_default) else { return };
    let limits = backend.device().limits();
    assert_eq!((limits.max_compute_workgroup_storage_size, limits.max_storage_buffers_per_shader_stage), (16 << 10, 8));
    assert_eq!(limits.max_storage_buffer_binding_size, 128 << 20);
    assert_eq!(backend.device().features(), api::Features::empty());
    golden_and_random(&backend, 6, 2000..2040);
}

/// A tensor of small numbers, different ones wherever one looks.
fn numbers(name: &'static str, shape: &[usize]) -> HostTensor {
    let n: usize = shape.iter().product();
    let mut state = 12345u32;
    let values = (0..n).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
    let values: Vec<f32> = values.collect();
    HostTensor::from_bytes(name, DType::F32, shape, bytemuck::cast_slice(&values)).unwrap()
}

fn call(problem: Problem, block_table: &[i32], cache_seqlens: &[i32]) -> Call {
    let p = &problem;
    let tensors = vec![
        ("q", numbers("q", &[p.b(), p.s_q(), p.h_q(), p.head_dim_k()])),
        ("k_cache", numbers("k_cache", &[p.num_pages(), p.page_size(), p.h_kv(), p.head_dim_k()])),
        ("block_table", HostTensor::from_i32("block_table", &[p.b(), p.max_pages_per_seq()], block_table).unwrap()),
        ("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[p.b()], cache_seqlens).unwrap()),
    ];
    let tolerance = Tolerance { out_abs: 1e-5, out_rel: 1e-5, cosine: 1e-10, lse_abs: 1e-5, lse_rel: 1e-5 };
    let mut call = Call { name: "large".into(), problem, tensors, output_strides: None, expected: None, tolerance };
    let (out, lse) = polymla::reference::decode(&call.problem, &call.inputs().unwrap()).unwrap();
    call.expected = Some(Expected { out, lse, ..Expected::default() });
    call
}

/// Some pages of every request in the first window, some in the second; two page sizes, so that a step of 32 tokens
/// lies in one page, and in several.
#[test]
fn a_cache_above_128_mib_goes_in_windows() {
    let Some(backend) = super::backend(WgpuBackend::web_default) else { return };
    for page_size in [64, 24] {
        let row = 128 * 4;
        let pages = (160 << 20) / (page_size * row);
        let builder = Problem::builder(2).h_q(5).head_dim_k(128).head_dim_v(96).dtype(DType::F32);
        let problem = builder.num_pages(pages).page_size(page_size).max_pages_per_seq(6).build().unwrap();
        assert!(problem.bytes(&[]) as usize + pages * page_size * row > 128 << 20);
        let last = pages as i32 - 1;
        let table = [last, 0, last - 1, 7, last / 2, 3, 1, last - 7, 2, last - 9, 5, -1];
        let lengths = [6 * page_size as i32 - 5, 5 * page_size as i32 - 1];
        let call = call(problem, &table, &lengths);
        for policy in [POLICIES[0], SplitPolicy::BatchInvariant { split_blocks: 1 }] {
            let outcome = check(&backend, &call, Layout::Given, policy);
            assert!(outcome.passed(), "page size {page_size}, {policy:?}: {}", outcome.failure());
        }
    }
}

/// Partial results of 48 requests that could each be split 33 ways: 200 MiB, so two groups of requests.
#[test]
fn a_workspace_above_128_mib_goes_in_groups_of_requests() {
    let Some(backend) = super::backend(WgpuBackend::web_default) else { return };
    let b = 48;
    let builder = Problem::builder(b).h_q(64).head_dim_k(520).head_dim_v(512).dtype(DType::F32);
    let problem = builder.num_pages(4).page_size(64).max_pages_per_seq(33).build().unwrap();
    let table: Vec<i32> = (0..b * 33).map(|i| i as i32 % 4).collect();
    let lengths: Vec<i32> = (0..b as i32).map(|i| [130, 0, 3][i as usize % 3] + i).collect();
    let policy = SplitPolicy::BatchInvariant { split_blocks: 1 };
    let all = b * 33 * 64 * 512 * 4;
    assert!(all > 128 << 20);
    let outcome = check_with(
        &backend,
        &call(problem, &table, &lengths),
        Layout::Given,
        &ScheduleOptions { num_sm_parts: None, policy },
    );
    assert!(outcome.passed(), "{}", outcome.failure());
}

/// 70 requests of 16 rows are merged by a workgroup a row, 20 by four: of one to six splits each.
#[test]
fn rows_have_the_same_bits_whatever_merges_them() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let options = ScheduleOptions { num_sm_parts: None, policy: SplitPolicy::BatchInvariant { split_blocks: 1 } };
    // Merged four columns at a time, and not; more columns than a workgroup has invocations for.
    for (columns, longest) in [(64, 384), (66, 384), (520, 384)] {
        let results = [70, 20].map(|b| {
            let builder = Problem::builder(b).h_q(16).head_dim_k(columns + 8).head_dim_v(columns).dtype(DType::F32);
            let problem = builder.num_pages(6).page_size(64).max_pages_per_seq(6).build().unwrap();
            let table: Vec<i32> = (0..b * 6).map(|i| i as i32 % 6).collect();
            let lengths: Vec<i32> = (0..b as i32).map(|i| (longest - i * 13).rem_euclid(longest + 1)).collect();
            let call = call(problem, &table, &lengths);
            let outcome = check_with(&backend, &call, Layout::Given, &options);
            assert!(outcome.passed(), "{b}: {}", outcome.failure());
            let mut results = call.poisoned_outputs().unwrap();
            let mut outputs = results.outputs().unwrap();
            backend.decode(&call.problem, &options, &call.inputs().unwrap(), &mut outputs).unwrap();
            results.out.to_f64()
        });
        let [many, few] = &results;
        assert_eq!(many[..few.len()], few[..], "{columns} columns");
    }
}

/// llvmpipe ends loops after 65,535 rounds: a batch is cut into enough parts there, and too few are refused.
#[test]
fn a_driver_that_ends_long_loops_gets_short_ones() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let name = HostBackend::info(&backend).device_name.clone();
    if !name.contains("llvmpipe") {
        println!("SKIPPED: {name} ends no loops");
        return;
    }
    let pages = 500;
    let builder = Problem::builder(1).h_q(2).head_dim_k(24).head_dim_v(16).dtype(DType::F32);
    let problem = builder.num_pages(7).page_size(64).max_pages_per_seq(pages).build().unwrap();
    let table: Vec<i32> = (0..pages as i32).map(|i| i % 7).collect();
    let call = call(problem, &table, &[pages as i32 * 64 - 3]);
    let options = |num_sm_parts| ScheduleOptions { num_sm_parts, policy: POLICIES[0] };
    for parts in [None, Some(3)] {
        let outcome = check_with(&backend, &call, Layout::Given, &options(parts));
        assert!(outcome.passed(), "{parts:?}: {}", outcome.failure());
    }
    let outcome = check_with(&backend, &call, Layout::Given, &options(Some(1)));
    assert!(outcome.failure().to_string().contains("num_sm_parts"), "{}", outcome.failure());
}
