//! Sizes beyond 32 bits: bytes and elements of the cache, rows of partial results. Many requests; more than one device.

use half::bf16;
use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Call, Layout, check_with, compare};
use polymla::cuda::Stream;
use polymla::cuda::sm90::Sm90Backend;
use polymla::{
    DType, Inputs, KvCache, MlaBackend, Outputs, Problem, Query, ScheduleOptions, SplitPolicy, TensorView,
    TensorViewMut,
};

use crate::device::{Placed, Results, backend, rebuilt};

/// Elements beyond which an offset no longer fits 32 bits, signed.
const TWO_GIGA: usize = 1 << 31;

fn values(seed: u64, count: usize) -> Vec<bf16> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| bf16::from_f32(2.0 * rng.f32() - 1.0)).collect()
}

fn host<'a, T: polymla::Element>(name: &'static str, data: &'a [T], shape: &[usize]) -> TensorView<'a> {
    TensorView::from_slice(name, data, shape).expect("a view")
}

#[test]
fn caches_beyond_four_gibibytes() {
    let Some(backend) = backend::<Sm90Backend>() else { return };
    for page_size in [64, 16, 48, 256] {
        let limits = Limits {
            page_sizes: vec![page_size],
            dtypes: vec![DType::Bf16],
            max_work: 40_000_000,
            ..Limits::deepseek()
        };
        let long = |call: &Call| call.problem.b() > 1 && call.cache_seqlens().iter().any(|n| *n > 200);
        let mut calls = (9000..).map(|seed| random_call(seed, &limits).expect("a valid problem"));
        let call = calls.find(long).expect("one of many seeds");
        let mut call = call.with_layout(Layout::Fused).expect("another layout");
        let p = &call.problem;
        let page_elements = page_size * p.h_kv() * p.head_dim_k();
        // The pages used lie at the very end, past 2^31 elements and 4 GiB; all before them are NaN.
        let num_pages = TWO_GIGA.div_ceil(page_elements) + 2 * p.num_pages() + 100;
        let page_bytes = page_elements * 2;
        let mut cache = backend.alloc(num_pages * page_bytes).expect("memory for a large cache");
        let tile = vec![0xffu8; (64 << 20).min(num_pages * page_bytes)];
        cache.write(0, &tile).expect("upload");
        cache.repeat(tile.len()).expect("copy");
        let target = |page: usize| num_pages - 1 - 2 * page;
        let small = call.tensor("k_cache").expect("the cache").to_dense_bytes();
        for page in 0..p.num_pages() {
            cache.write(target(page) * page_bytes, &small[page * page_bytes..][..page_bytes]).expect("upload");
        }
        let (b, columns) = (p.b(), p.max_pages_per_seq());
        let table = call.tensor_mut("block_table").expect("the table");
        let entries = table.to_f64();
        for (at, entry) in
            entries.iter().enumerate().filter(|(_, e)| **e >= 0.0 && (**e as usize) < small.len() / page_bytes)
        {
            table.set(&[at / columns, at % columns], target(*entry as usize) as f64);
        }
        let problem = rebuilt(&call.problem, b, num_pages);
        let device = MlaBackend::info(&backend).device;
        let shape = [num_pages, page_size, problem.h_kv(), problem.head_dim_k()];
        let strides = polymla::tensor::contiguous_strides(&shape);
        // SAFETY: the whole of the buffer, which outlives the run.
        let view = unsafe {
            let bytes = cache.bytes() as u64;
            TensorView::from_raw_parts("k_cache", cache.address(), bytes, DType::Bf16, &shape, &strides, device)
        };
        let placed = Placed::new(&backend, &call);
        let inputs = Inputs { kv_cache: KvCache::Fused(view.expect("a view")), ..placed.inputs() };
        let mut results = Results::new(&backend, call.poisoned_outputs().expect("outputs"));
        let stream = Stream::default();
        let options = ScheduleOptions::default();
        let schedule = backend.schedule(&problem, &options, &inputs, stream).expect("schedule");
        let mut scratch = backend.alloc(backend.workspace_bytes(&problem, &schedule)).expect("workspace");
        let mut workspace = backend.workspace(&mut scratch);
        backend.run(&problem, &schedule, &mut workspace, &inputs, &mut results.outputs(), stream).expect("run");
        backend.finish(&schedule, stream).expect("finish");
        results.read();
        let errors = compare(call.expected.as_ref().expect("values"), &call.tolerance, &results.host);
        let worst = errors.map(|e| e.worst()).unwrap_or_else(|e| panic!("{}: {e}", call.name));
        assert!(worst <= 1.0, "{}: {worst} of the allowance", call.name);
    }
}

#[test]
fn more_than_four_million_accumulator_rows() {
    let Some(backend) = backend::<Sm90Backend>() else { return };
    // 128 requests over the same 33,280 tokens, cut at every block: 66,560 partial tiles of 64 rows.
    let (b, h_q, d_k, d_v, page, blocks) = (128usize, 16usize, 576usize, 512usize, 64usize, 520usize);
    assert!(b * blocks * 64 > 4_200_000);
    let problem = Problem::builder(b).h_q(h_q).num_pages(blocks).max_pages_per_seq(blocks).build().expect("problem");
    let one = values(1, h_q * d_k);
    let q = one.repeat(b);
    let k = values(2, blocks * page * d_k);
    let row: Vec<i32> = (0..blocks as i32).rev().collect();
    let table = row.repeat(b);
    let lengths = vec![(blocks * page) as i32; b];
    let (q_shape, k_shape) = ([b, 1, h_q, d_k], [blocks, page, 1, d_k]);
    let single = rebuilt(&problem, 1, blocks);
    let expected = polymla::reference::decode(
        &single,
        &Inputs {
            query: Query::Fused(host("q", &one, &[1, 1, h_q, d_k])),
            kv_cache: KvCache::Fused(host("k_cache", &k, &k_shape)),
            block_table: host("block_table", &row, &[1, blocks]),
            cache_seqlens: host("cache_seqlens", &lengths[..1], &[1]),
            visible_lengths: None,
        },
    )
    .expect("reference");
    let (mut out, mut lse) = (vec![bf16::NAN; b * h_q * d_v], vec![f32::NAN; b * h_q]);
    let inputs = Inputs {
        query: Query::Fused(host("q", &q, &q_shape)),
        kv_cache: KvCache::Fused(host("k_cache", &k, &k_shape)),
        block_table: host("block_table", &table, &[b, blocks]),
        cache_seqlens: host("cache_seqlens", &lengths, &[b]),
        visible_lengths: None,
    };
    let options = ScheduleOptions { num_sm_parts: None, policy: SplitPolicy::BatchInvariant { split_blocks: 1 } };
    let mut outputs = Outputs {
        out: TensorViewMut::from_slice("out", &mut out, &[b, 1, h_q, d_v]).expect("a view"),
        lse: TensorViewMut::from_slice("lse", &mut lse, &[b, h_q, 1]).expect("a view"),
    };
    polymla::HostBackend::decode(&backend, &problem, &options, &inputs, &mut outputs).expect("decode");
    let first = &out[..h_q * d_v];
    for (at, (value, wanted)) in first.iter().zip(&expected.0).enumerate() {
        let (value, allowed) = (value.to_f64(), 8e-4f64.max(wanted.abs() * 2.01 / 128.0));
        assert!((value - wanted).abs() <= allowed, "out[{at}] is {value}, not {wanted}");
    }
    for (at, (value, wanted)) in lse[..h_q].iter().zip(&expected.1).enumerate() {
        assert!((f64::from(*value) - wanted).abs() <= 1e-3, "lse[{at}] is {value}, not {wanted}");
    }
    for request in 1..b {
        assert!(out[request * h_q * d_v..][..h_q * d_v] == *first, "request {request} differs from request 0");
        assert!(lse[request * h_q..][..h_q] == lse[..h_q], "request {request}: lse differs from request 0");
    }
}

#[test]
fn sixty_five_thousand_requests() {
    let Some(backend) = backend::<Sm90Backend>() else { return };
    // They differ by their lengths only, so that a reference for each length serves them all.
    let (b, d_k, d_v, page, columns, lengths) = (65_536usize, 576usize, 512usize, 64usize, 3usize, 131usize);
    let (one, k) = (values(3, d_k), values(4, columns * page * d_k));
    let row: Vec<i32> = (0..columns as i32).rev().collect();
    let length_of = |request: usize| (request * 37 % lengths) as i32;
    let with_inputs = |b: usize, length_of: &dyn Fn(usize) -> i32, run: &mut dyn FnMut(&Problem, &Inputs<'_>)| {
        let problem =
            Problem::builder(b).h_q(1).num_pages(columns).max_pages_per_seq(columns).build().expect("problem");
        let (q, table) = (one.repeat(b), row.repeat(b));
        let lens: Vec<i32> = (0..b).map(length_of).collect();
        let inputs = Inputs {
            query: Query::Fused(host("q", &q, &[b, 1, 1, d_k])),
            kv_cache: KvCache::Fused(host("k_cache", &k, &[columns, page, 1, d_k])),
            block_table: host("block_table", &table, &[b, columns]),
            cache_seqlens: host("cache_seqlens", &lens, &[b]),
            visible_lengths: None,
        };
        run(&problem, &inputs);
    };
    let mut expected = (Vec::new(), Vec::new());
    with_inputs(lengths, &|length| length as i32, &mut |problem, inputs| {
        expected = polymla::reference::decode(problem, inputs).expect("reference");
    });
    let (mut out, mut lse) = (vec![bf16::NAN; b * d_v], vec![f32::NAN; b]);
    with_inputs(b, &length_of, &mut |problem, inputs| {
        let mut outputs = Outputs {
            out: TensorViewMut::from_slice("out", &mut out, &[b, 1, 1, d_v]).expect("a view"),
            lse: TensorViewMut::from_slice("lse", &mut lse, &[b, 1, 1]).expect("a view"),
        };
        let options = ScheduleOptions::default();
        polymla::HostBackend::decode(&backend, problem, &options, inputs, &mut outputs).expect("decode");
    });
    for (request, (out, lse)) in out.chunks_exact(d_v).zip(&lse).enumerate() {
        let length = length_of(request) as usize;
        for (value, wanted) in out.iter().zip(&expected.0[length * d_v..]) {
            let (value, allowed) = (value.to_f64(), 2e-3f64.max(wanted.abs() * 2.01 / 128.0));
            assert!((value - wanted).abs() <= allowed, "request {request}: {value}, not {wanted}");
        }
        let wanted = expected.1[length];
        assert!(
            f64::from(*lse) == wanted || (f64::from(*lse) - wanted).abs() <= 1e-4,
            "request {request}: lse {lse}, not {wanted}"
        );
    }
}

#[test]
fn every_device_of_a_machine_in_turns() {
    if backend::<Sm90Backend>().is_none() {
        return;
    }
    let backends: Vec<_> = (0..).map_while(|ordinal| Sm90Backend::with_device(ordinal).ok()).collect();
    if backends.len() < 2 {
        eprintln!("SKIPPED: this machine has {} device of compute capability 9.0, and 2 are needed", backends.len());
        return;
    }
    // Whichever context was current last, each call has to work in its own.
    for seed in 0..40 {
        let call = random_call(seed, &Limits::deepseek()).expect("a valid problem");
        for backend in &backends {
            let outcome = check_with(backend, &call, Layout::Given, &random_options(seed));
            let name = &MlaBackend::info(backend).device_name;
            assert!(outcome.passed(), "{} on {name}: {}", call.name, outcome.failure());
        }
    }
    // And from several threads at once.
    std::thread::scope(|scope| {
        for backend in &backends {
            scope.spawn(move || {
                for seed in 40..60 {
                    let call = random_call(seed, &Limits::deepseek()).expect("a valid problem");
                    let outcome = check_with(backend, &call, Layout::Given, &random_options(seed));
                    assert!(outcome.passed(), "{}: {}", call.name, outcome.failure());
                }
            });
        }
    });
}
