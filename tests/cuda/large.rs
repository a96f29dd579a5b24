//! Sizes beyond 32 bits: bytes and elements of the cache, rows of partial results.

use half::bf16;
use polymla::conformance::random::{Limits, random_call};
use polymla::conformance::{Call, Layout, compare};
use polymla::cuda::Stream;
use polymla::cuda::sm90::Sm90Backend;
use polymla::{
    DType, Inputs, KvCache, MlaBackend, Outputs, Problem, Query, ScheduleOptions, SplitPolicy, TensorView,
    TensorViewMut,
};

use crate::device::{Placed, Results, backend, rebuilt};

/// Elements beyond which an offset no longer fits 32 bits, signed.
const TWO_GIGA: usize = 1 << 31;

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
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f32(((state >> 40) as f32 / 16_777_216.0 - 0.5) * 2.0)
    };
    let one: Vec<bf16> = (0..h_q * d_k).map(|_| random()).collect();
    let q = one.repeat(b);
    let k: Vec<bf16> = (0..blocks * page * d_k).map(|_| random()).collect();
    let row: Vec<i32> = (0..blocks as i32).rev().collect();
    let table = row.repeat(b);
    let lengths = vec![(blocks * page) as i32; b];
    let (q_shape, k_shape) = ([b, 1, h_q, d_k], [blocks, page, 1, d_k]);
    fn host<'a, T: polymla::Element>(name: &'static str, data: &'a [T], shape: &[usize]) -> TensorView<'a> {
        TensorView::from_slice(name, data, shape).expect("a view")
    }
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
