//! The exported graph, executed by tract: golden files, random problems, and what must not reach a result.
//!
//! What it runs it also writes to `target/tmp/onnx`, model, inputs, expected values and allowances, where
//! `scripts/check-onnx.sh` lets other tools read the same.

use std::path::PathBuf;

use polymla::conformance::random::{Limits, random_call};
use polymla::conformance::{Call, LAYOUTS, Layout, PoisonedOutputs, check, check_call, compare, golden};
use polymla::onnx::{OnnxBackend, Products, call_for_graph, graph};
use polymla::{DType, HostBackend, HostWorkspace, MlaBackend, MlaError, SplitPolicy};
use safetensors::tensor::{Dtype, TensorView};

fn folder() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("onnx");
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn run(backend: &OnnxBackend, call: &Call) -> PoisonedOutputs {
    let mut results = call.poisoned_outputs().unwrap();
    let inputs = call.inputs().unwrap();
    backend.decode(&call.problem, &Default::default(), &inputs, &mut results.outputs().unwrap()).unwrap();
    results.check_written().unwrap();
    results
}

/// Writes NAME.onnx and NAME.safetensors: inputs, `out` and `lse` as tract makes them, and what they may be off.
fn write_case(name: &str, call: &Call, results: &PoisonedOutputs) {
    let expected = call.expected.as_ref().unwrap();
    let model = graph(&call.problem, Products::F32).unwrap();
    std::fs::write(folder().join(name).with_extension("onnx"), model.to_bytes()).unwrap();
    let of = |dtype| match dtype {
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
        _ => Dtype::F32,
    };
    let mut all = Vec::new();
    for (name, t) in call.tensors.iter().map(|(n, t)| (*n, t)).chain([("out", &results.out), ("lse", &results.lse)]) {
        all.push((name.to_string(), of(t.dtype()), t.shape().to_vec(), t.to_dense_bytes()));
    }
    for (name, values) in [
        ("ref_out", &expected.out),
        ("ref_lse", &expected.lse),
        ("out_abs", &expected.out_abs),
        ("lse_abs", &expected.lse_abs),
    ] {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        all.push((name.to_string(), Dtype::F64, vec![values.len()], bytes));
    }
    let t = call.tolerance;
    let bounds = [t.out_abs, t.out_rel, t.lse_abs, t.lse_rel];
    all.push(("tolerance".into(), Dtype::F64, vec![4], bounds.iter().flat_map(|x| x.to_le_bytes()).collect()));
    let views = all.iter().map(|(n, d, s, b)| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(folder().join(name).with_extension("safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
}

fn files() -> Vec<Call> {
    let files = golden::list(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).unwrap();
    files.iter().map(|file| golden::load(file).unwrap()).collect()
}

#[test]
fn golden_files_of_f16() {
    let backend = OnnxBackend::new();
    let calls: Vec<Call> = files().into_iter().filter(|call| call.problem.dtype() == DType::F16).collect();
    assert!(calls.len() >= 3, "{} files", calls.len());
    for call in &calls {
        for outcome in check_call(&backend, call, &LAYOUTS) {
            assert!(outcome.passed(), "{} {}: {}", call.name, outcome.layout, outcome.failure());
        }
        let (fused, losses) = call_for_graph(call).unwrap();
        assert_eq!(losses, Default::default());
        write_case(&call.name, &fused, &run(&backend, &fused));
    }
}

/// FlashMLA's bf16 results, from inputs converted to f16. The files hold normal numbers that f16 holds too.
#[test]
fn golden_files_of_bf16_converted() {
    let backend = OnnxBackend::new();
    for call in files().into_iter().filter(|call| call.problem.dtype() == DType::Bf16) {
        assert!(HostBackend::supports(&backend, &call.problem).is_err(), "bf16 is to be converted");
        let (converted, losses) = call_for_graph(&call).unwrap();
        assert_eq!(losses.saturated, 0, "{}", call.name);
        let outcome = check(&backend, &converted, Layout::Fused, SplitPolicy::default());
        assert!(outcome.passed(), "{}: {}", call.name, outcome.failure());
        // The two largest would make the folder large.
        if converted.problem.rows() * converted.problem.num_pages() < 20_000 {
            write_case(&call.name, &converted, &run(&backend, &converted));
        }
    }
}

/// Random problems that the graph takes, with their seeds.
fn random(limits: &Limits, seeds: std::ops::Range<u64>) -> impl Iterator<Item = (u64, Call)> {
    let calls = seeds.map(|seed| (seed, random_call(seed, limits).unwrap()));
    calls.filter(|(_, call)| polymla::onnx::supports(&call.problem).is_ok())
}

#[test]
fn random_problems() {
    let backend = OnnxBackend::new();
    let any = Limits { max_work: 1_000_000, ..Limits::any() };
    let deepseek = Limits { max_work: 10_000_000, max_tokens: 2000, ..Limits::deepseek() };
    let (mut ran, mut written) = (0, 0);
    for (seed, call) in random(&any, 0..300).chain(random(&deepseek, 0..30)) {
        let outcome = check(&backend, &call, Layout::Given, SplitPolicy::default());
        assert!(outcome.passed(), "seed {seed}, {}: {}", call.problem, outcome.failure());
        ran += 1;
        // A third of them for the other tools; there is no graph of an empty class.
        if graph(&call.problem, Products::F32).is_ok() && seed % 3 == 0 {
            let fused = call.with_layout(Layout::Fused).unwrap();
            write_case(&format!("random_{ran}_seed_{seed}"), &fused, &run(&backend, &fused));
            written += 1;
        }
    }
    assert!(ran > 150 && written > 40, "{ran} ran, {written} written");
}

/// The parts of the cache that no row sees, filled with `value`, must not change a bit.
#[test]
fn what_no_row_sees_does_not_reach_a_result() {
    let backend = OnnxBackend::new();
    let mut compared = 0;
    for (seed, call) in random(&Limits { max_work: 300_000, ..Limits::any() }, 1000..1080) {
        let fill = |value: f64| {
            let mut call = call.with_layout(Layout::Fused).unwrap();
            let p = call.problem.clone();
            let table: Vec<i32> = call.tensor("block_table").unwrap().to_f64().into_iter().map(|x| x as i32).collect();
            let visible = call.tensor("visible_lengths").map(|v| v.to_f64());
            let mut seen = vec![false; p.num_pages() * p.page_size()];
            for (i, n) in call.cache_seqlens().into_iter().enumerate() {
                let end = |j| p.visible_end(n as usize, j, visible.as_ref().map(|v| v[i * p.s_q() + j] as i32));
                for t in 0..(0..p.s_q()).map(end).max().unwrap() {
                    let page = table[i * p.max_pages_per_seq() + t / p.page_size()] as usize;
                    seen[page * p.page_size() + t % p.page_size()] = true;
                }
            }
            let k = call.tensor_mut("k_cache").unwrap();
            for slot in (0..seen.len()).filter(|slot| !seen[*slot]) {
                for g in 0..p.h_kv() {
                    for d in 0..p.head_dim_k() {
                        k.set(&[slot / p.page_size(), slot % p.page_size(), g, d], value);
                    }
                }
            }
            let results = run(&backend, &call);
            (results.out.to_dense_bytes(), results.lse.to_dense_bytes())
        };
        let clean = fill(0.0);
        for value in [f64::NAN, f64::INFINITY, -60_000.0] {
            assert!(fill(value) == clean, "seed {seed}: {value} leaks");
        }
        compared += 1;
    }
    assert!(compared > 30, "{compared}");
}

/// f16 products: what `docs/onnx.md` says they cost. Where the largest scaled score is S, a score may be off by
/// e = 2^-10 S (its own rounding to f16, and that of sums on the way), so lse by as much, and out by a weighted mean of
/// values whose weights are off by 2 e relatively, and by 2^-9 for weights and sums that are f16 themselves.
#[test]
fn f16_products_stay_within_their_documented_error() {
    let backend = OnnxBackend::with_products(Products::F16);
    let mut ran = 0;
    for call in files().into_iter().filter(|call| call.problem.dtype() == DType::F16) {
        let (call, _) = call_for_graph(&call).unwrap();
        let expected = call.expected.as_ref().unwrap();
        let results = run(&backend, &call);
        let largest = |values: &[f64]| values.iter().filter(|x| x.is_finite()).fold(0.0f64, |a, x| a.max(x.abs()));
        let (score, value) = (largest(&expected.lse).max(1.0), largest(&call.tensor("k_cache").unwrap().to_f64()));
        let off = |got: Vec<f64>, want: &[f64]| {
            let pairs = got.into_iter().zip(want).filter(|(x, y)| x != *y);
            pairs.map(|(x, y)| (x - y).abs()).fold(0.0f64, |a, b| if b > a || b.is_nan() { b } else { a })
        };
        let (out, lse) = (off(results.out.to_f64(), &expected.out), off(results.lse.to_f64(), &expected.lse));
        println!(
            "{}: scores to {score:.1}, lse off by {lse:.1e}; values to {value:.2}, out off by {out:.1e}",
            call.name
        );
        let e = score * 2f64.powi(-10);
        assert!(lse <= e, "{}: lse off by {lse:e}", call.name);
        assert!(out <= ((2.0 * e).exp_m1() + 2f64.powi(-9)) * value, "{}: out off by {out:e}", call.name);
        ran += 1;
    }
    assert!(ran >= 3);
}

#[test]
fn a_schedule_serves_its_class_only() {
    let backend = OnnxBackend::new();
    let (_, call) = random(&Limits::any(), 0..50).find(|(_, c)| graph(&c.problem, Products::F32).is_ok()).unwrap();
    let inputs = call.inputs().unwrap();
    let p = &call.problem;
    let schedule = MlaBackend::schedule(&backend, p, &Default::default(), &inputs, ()).unwrap();
    let other = p.to_builder().softmax_scale(p.softmax_scale() + 1.0);
    let mut results = call.poisoned_outputs().unwrap();
    let mut outputs = results.outputs().unwrap();
    let mut scratch = HostWorkspace::new();
    let problem = other.build().unwrap();
    let error = backend.run(&problem, &schedule, &mut scratch.lend(0), &inputs, &mut outputs, ()).unwrap_err();
    assert!(matches!(error, MlaError::ScheduleMismatch { param: "softmax_scale bits", .. }), "{error}");
    assert!(results.untouched());
    let mut outputs = results.outputs().unwrap();
    backend.run(p, &schedule, &mut scratch.lend(0), &inputs, &mut outputs, ()).unwrap();
    compare(call.expected.as_ref().unwrap(), &call.tolerance, &results).unwrap();
}
