//! Values and weights near the ends of f32's range.

use half::bf16;
use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Layout, check_with};
use polymla::cpu::{CpuBackend, Isa};
use polymla::{Mask, SplitPolicy, TensorView, reference};

use crate::data::{Case, Data, Number};

/// The values of the largest weight are exactly 0 in one column: what is left there is made of weights of e^-88, below
/// f32's normal numbers, which must not count as 0.
#[test]
fn weights_below_the_normal_numbers_count() {
    let limits = Limits {
        max_b: 2,
        max_s_q: 1,
        max_heads_per_kv: 38,
        max_h_kv: 3,
        max_head_dim: 100,
        max_tokens: 331,
        ..Limits::any()
    };
    let seed = 17_283_794_042_405_552_416;
    let call = random_call(seed, &limits).unwrap();
    let out = &call.expected.as_ref().unwrap().out;
    assert!(out.iter().any(|x| *x != 0.0 && x.abs() < 1e-37), "{}: nothing is that small", call.name);
    for isa in Isa::available() {
        let outcome = check_with(&CpuBackend::with_isa(isa).unwrap(), &call, Layout::Given, &random_options(seed));
        assert!(outcome.passed(), "{isa} {}: {}", call.name, outcome.failure());
    }
}

fn times<T: Number>(values: &mut Vec<T>, factor: f32) {
    let shape = [values.len()];
    let view = TensorView::from_slice("values", values, &shape).unwrap();
    *values = (0..values.len()).map(|n| T::of(view.get_f64(&[n]).unwrap() as f32 * factor)).collect();
}

/// Values whose sum is just below f32's largest number, with the scores of small ones.
fn large_values<T: Number>(relative: f64, policy: SplitPolicy) {
    let unit = 2f32.powi(110);
    let case = Case { lengths: vec![0, 1, 64, 401], s_q: 3, h_q: 6, mask: Mask::Causal, policy, ..Case::default() };
    let mut data = Data::<T>::new(&case, 7);
    times(&mut data.q, 1.0 / unit);
    times(&mut data.k, unit);
    let (want, _) = reference::decode(&data.problem, &data.inputs()).unwrap();
    for isa in Isa::available() {
        let (out, _) = data.run(&CpuBackend::with_isa(isa).unwrap());
        let shape = [want.len()];
        let view = TensorView::from_slice("out", &out, &shape).unwrap();
        for (n, w) in want.iter().enumerate() {
            let got = view.get_f64(&[n]).unwrap();
            let allowed = 4.0 * relative * f64::from(unit);
            assert!((got - w).abs() <= allowed, "{isa} {:?} out[{n}] {got:e} != {w:e}", T::DTYPE);
        }
    }
}

#[test]
fn large_values_stay_finite() {
    for policy in [SplitPolicy::default(), SplitPolicy::BatchInvariant { split_blocks: 1 }] {
        large_values::<bf16>(2f64.powi(-7), policy);
        large_values::<f32>(2f64.powi(-18), policy);
    }
}
