//! Random problems against the f64 reference, and what must hold bit for bit.

use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Call, HostTensor, Layout, check_with};
use polymla::{DType, HostBackend, Mask, Problem, ScheduleOptions, SplitPolicy};
use proptest::prelude::*;

mod common;
use common::{backends, takes};

/// Limits that proptest can shrink: with the same seed, smaller limits make a smaller problem.
fn limits() -> impl Strategy<Value = Limits> {
    (0..=5usize, 1..=4usize, 1..=40usize, 1..=3usize, 1..=160usize, 1..=700usize).prop_map(|(b, s_q, h, g, d, t)| {
        Limits {
            max_b: b,
            max_s_q: s_q,
            max_heads_per_kv: h,
            max_h_kv: g,
            max_head_dim: d,
            max_tokens: t,
            ..Limits::any()
        }
    })
}

/// Failures are not stored: the message names the seed and the limits, which make the problem again.
fn cases(n: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(n) }
}

fn agree(backend: &dyn HostBackend, call: &Call, options: &ScheduleOptions) -> Result<(), TestCaseError> {
    let outcome = check_with(backend, call, Layout::Given, options);
    prop_assert!(
        outcome.passed(),
        "{} on {}, {options:?}: {}",
        call.name,
        backend.info().device_name,
        outcome.failure()
    );
    Ok(())
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn backends_agree_with_the_reference(seed in any::<u64>().no_shrink(), limits in limits()) {
        let call = random_call(seed, &limits).unwrap();
        for backend in backends().iter().filter(|b| takes(b.as_ref(), &call.problem)) {
            agree(backend.as_ref(), &call, &random_options(seed))?;
        }
    }
}

proptest! {
    // DeepSeek's head sizes, which backends have kernels of their own for; long enough for many splits.
    #![proptest_config(cases(40))]

    #[test]
    fn backends_agree_at_deepseek_sizes(seed in any::<u64>().no_shrink(), b in 0..=6usize, tokens in 1..=5000usize) {
        let limits = Limits { max_b: b, max_tokens: tokens, max_work: 20_000_000, ..Limits::deepseek() };
        let call = random_call(seed, &limits).unwrap();
        for backend in backends().iter().filter(|b| takes(b.as_ref(), &call.problem)) {
            agree(backend.as_ref(), &call, &random_options(seed))?;
        }
    }
}

/// The bytes of `out` and `lse` that a backend returns for a call.
fn results(backend: &dyn HostBackend, call: &Call, options: &ScheduleOptions) -> (Vec<u8>, Vec<u8>) {
    let mut results = call.poisoned_outputs().unwrap();
    backend.decode(&call.problem, options, &call.inputs().unwrap(), &mut results.outputs().unwrap()).unwrap();
    (results.out.to_dense_bytes(), results.lse.to_dense_bytes())
}

#[test]
fn batch_invariant_rows_have_the_same_bits_in_every_batch() {
    let mut compared = 0;
    for backend in backends() {
        for seed in 0..60 {
            let limits = if seed % 4 == 0 {
                Limits { max_work: 3_000_000, ..Limits::deepseek() }
            } else {
                Limits { max_work: 500_000, ..Limits::any() }
            };
            let call = random_call(seed, &limits).unwrap().with_layout(Layout::Fused).unwrap();
            if !takes(backend.as_ref(), &call.problem) {
                continue;
            }
            let policy = SplitPolicy::BatchInvariant { split_blocks: 1 + seed as u32 % 4 };
            let (out, lse) = results(backend.as_ref(), &call, &ScheduleOptions { num_sm_parts: None, policy });
            for i in 0..call.problem.b() {
                // Another number of parts must not matter either.
                let options = ScheduleOptions { num_sm_parts: Some(1 + i), policy };
                let (o, l) = results(backend.as_ref(), &call.with_requests(&[i]).unwrap(), &options);
                assert_eq!(o, out[i * o.len()..][..o.len()], "out of request {i} of {}", call.name);
                assert_eq!(l, lse[i * l.len()..][..l.len()], "lse of request {i} of {}", call.name);
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "only {compared} rows compared");
}

#[test]
fn runs_repeat_bit_for_bit() {
    for backend in backends() {
        for seed in 0..30 {
            let call = random_call(seed, &Limits { max_work: 500_000, ..Limits::any() }).unwrap();
            if takes(backend.as_ref(), &call.problem) {
                let options = random_options(seed);
                let first = results(backend.as_ref(), &call, &options);
                assert_eq!(first, results(backend.as_ref(), &call, &options), "{}", call.name);
            }
        }
    }
}

#[test]
fn causal_is_the_visible_lengths_it_stands_for() {
    for backend in backends() {
        let mut seen = 0;
        for seed in 0..60 {
            let call = random_call(seed, &Limits { max_work: 200_000, ..Limits::any() }).unwrap();
            if call.problem.mask() != Mask::Causal || !takes(backend.as_ref(), &call.problem) {
                continue;
            }
            let call = call.with_layout(Layout::Fused).unwrap();
            let p = call.problem.clone();
            let rows = call.cache_seqlens().into_iter().flat_map(|n| (0..p.s_q()).map(move |j| (n as usize, j)));
            let visible: Vec<i32> = rows.map(|(n, j)| (n + j + 1).saturating_sub(p.s_q()) as i32).collect();
            let mut other = call.clone();
            other.problem = p.to_builder().mask(Mask::VisibleLengths).build().unwrap();
            let shape = [p.b(), p.s_q()];
            let visible = HostTensor::from_i32("visible_lengths", &shape, &visible).unwrap();
            other.tensors.push(("visible_lengths", visible));
            let options = random_options(seed);
            if takes(backend.as_ref(), &other.problem) {
                seen += 1;
                let (a, b) = (results(backend.as_ref(), &call, &options), results(backend.as_ref(), &other, &options));
                assert!(a == b, "{}", call.name);
            }
        }
        assert!(seen > 5, "only {seen} causal problems");
    }
}

#[test]
fn tensors_of_every_type_were_seen() {
    // Guards the generator: a type that never comes up would never be tested.
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let small = Limits { max_work: 1000, ..Limits::any() };
        assert!((0..50).any(|seed| random_call(seed, &small).unwrap().problem.dtype() == dtype));
    }
}

/// The largest scale of all: scores of 0 stay 0, and every key counts alike.
#[test]
fn the_largest_scale_is_no_infinity() {
    for (dtype, head_dim_k, head_dim_v) in
        [(DType::Bf16, 576, 512), (DType::F16, 576, 512), (DType::F16, 80, 64), (DType::F32, 40, 24)]
    {
        let builder = Problem::builder(1).h_q(3).head_dim_k(head_dim_k).head_dim_v(head_dim_v).dtype(dtype);
        let problem = builder.num_pages(2).max_pages_per_seq(2).softmax_scale(f32::MAX).build().unwrap();
        let tensor = |name, dtype, shape: &[usize]| {
            let strides = polymla::tensor::contiguous_strides(shape);
            HostTensor::filled(name, dtype, shape, &strides[..shape.len()], 0, &[0; 4]).unwrap()
        };
        let mut keys = tensor("k_cache", dtype, &[2, 64, 1, head_dim_k]);
        (0..100).for_each(|t| keys.set(&[t / 64, t % 64, 0, 7], f64::from(t as u32 % 2)));
        let tensors = vec![
            ("q", tensor("q", dtype, &[1, 1, 3, head_dim_k])),
            ("k_cache", keys),
            ("block_table", HostTensor::from_i32("block_table", &[1, 2], &[0, 1]).unwrap()),
            ("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[1], &[100]).unwrap()),
        ];
        let (name, tolerance) = ("largest scale".to_string(), Default::default());
        let call = Call { name, problem, tensors, output_strides: None, expected: None, tolerance };
        for backend in backends().iter().filter(|b| takes(b.as_ref(), &call.problem)) {
            let mut results = call.poisoned_outputs().unwrap();
            let (inputs, mut outputs) = (call.inputs().unwrap(), results.outputs().unwrap());
            backend.decode(&call.problem, &ScheduleOptions::default(), &inputs, &mut outputs).unwrap();
            let (out, lse) = (results.out.to_f64(), results.lse.to_f64());
            let device = &backend.info().device_name;
            assert!(lse.iter().all(|x| (x - 100f64.ln()).abs() < 1e-4), "{device}, {dtype}: lse {lse:?}");
            let right = |(i, x): (usize, &f64)| (x - if i % head_dim_v == 7 { 0.5 } else { 0.0 }).abs() < 0.01;
            assert!(out.iter().enumerate().all(right), "{device}, {dtype}: {out:?}");
        }
    }
}

/// Strides of 0, as a broadcast makes them: the same bits as of tensors in which everything stands as often as it is read.
#[test]
fn memory_may_stand_for_many_rows() {
    let problem = |dtype, head_dim_k, head_dim_v| {
        let builder =
            Problem::builder(3).s_q(2).h_q(6).h_kv(2).head_dim_k(head_dim_k).head_dim_v(head_dim_v).dtype(dtype);
        builder.num_pages(4).page_size(16).max_pages_per_seq(3).mask(Mask::VisibleLengths).build().unwrap()
    };
    let mut runs = 0;
    for p in [
        problem(DType::Bf16, 576, 512),
        problem(DType::F16, 576, 512),
        problem(DType::F16, 80, 64),
        problem(DType::F32, 40, 24),
    ] {
        let shapes = [
            ("q", p.dtype(), vec![3, 2, 6, p.head_dim_k()]),
            ("k_cache", p.dtype(), vec![4, 16, 2, p.head_dim_k()]),
            ("block_table", DType::I32, vec![3, 3]),
            ("visible_lengths", DType::I32, vec![3, 2]),
        ];
        // Bit i of `broadcast`: whether dimension i of every tensor but the innermost stands still.
        for broadcast in 1..8usize {
            let mut calls: [Vec<(&'static str, HostTensor)>; 2] = Default::default();
            for (name, dtype, shape) in &shapes {
                let last = shape.len() - 1;
                let mut strides = polymla::tensor::contiguous_strides(shape)[..=last].to_vec();
                let still: Vec<usize> = (0..last).filter(|dim| broadcast >> dim & 1 == 1).collect();
                still.iter().for_each(|dim| strides[*dim] = 0);
                let dense = polymla::tensor::contiguous_strides(shape)[..=last].to_vec();
                for (tensors, strides) in calls.iter_mut().zip([strides, dense]) {
                    let mut tensor = HostTensor::filled(name, *dtype, shape, &strides, 0, &[0; 4]).unwrap();
                    let mut indices = Vec::new();
                    tensor.for_each_offset(|index, _| indices.push(index.to_vec()));
                    for index in indices {
                        let at = |dim: usize| if still.contains(&dim) { 0 } else { index[dim] };
                        let seed =
                            (0..=last).fold(0, |sum, dim| sum * 31 + if dim == last { index[dim] } else { at(dim) });
                        let value = match *name {
                            "block_table" => (seed % 4) as f64,
                            "visible_lengths" => (5 + seed % 28) as f64,
                            _ => (seed * 7 % 23) as f64 / 16.0 - 0.6,
                        };
                        tensor.set(&index, value);
                    }
                    tensors.push((name, tensor));
                }
            }
            for tensors in &mut calls {
                tensors.push(("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[3], &[48, 33, 40]).unwrap()));
            }
            let call = |tensors| {
                let name = format!("broadcast {broadcast}");
                let (problem, tolerance) = (p.clone(), Default::default());
                Call { name, problem, tensors, output_strides: None, expected: None, tolerance }
            };
            let [still, dense] = calls.map(call);
            for backend in backends().iter().filter(|b| takes(b.as_ref(), &p)) {
                let options = ScheduleOptions { num_sm_parts: Some(2), policy: SplitPolicy::BATCH_INVARIANT };
                let [a, b] = [&still, &dense].map(|call| {
                    let mut results = call.poisoned_outputs().unwrap();
                    let mut outputs = results.outputs().unwrap();
                    backend.decode(&p, &options, &call.inputs().unwrap(), &mut outputs).unwrap();
                    results.check_written().unwrap();
                    (results.out.to_dense_bytes(), results.lse.to_dense_bytes())
                });
                assert!(a == b, "{p}, broadcast {broadcast} on {}", backend.info().device_name);
                runs += 1;
            }
        }
    }
    assert!(
        runs >= 2 * 4 * 7,
        "the CPU backend takes all of them, once as itself and once by an instruction set: {runs}"
    );
}
