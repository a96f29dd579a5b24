//! Scores as large as f32 can hold: the softmax must subtract their maximum before anything is rounded.
//!
//! Queries and keys are whole numbers times powers of two, so that every path computes the same scores as the f64
//! reference, to the last bit, and results may be held to it however large the scale makes them.

use half::{bf16, f16};
use polymla::cpu::{CpuBackend, Isa};
use polymla::{DType, Mask, SplitPolicy, TensorView, reference};

use crate::data::{Case, Data, Number};

/// `unit`: what the whole numbers of the query are multiplied by.
fn check<T: Number>(case: &Case, unit: f32, seed: u64) {
    let mut data = Data::<T>::new(case, seed);
    let whole = |values: &mut Vec<T>, unit: f32| {
        let shape = [values.len()];
        let view = TensorView::from_slice("values", values, &shape).unwrap();
        *values = (0..values.len()).map(|n| T::of((view.get_f64(&[n]).unwrap() as f32).round() * unit)).collect();
    };
    whole(&mut data.q, unit);
    // What is poison stays poison: NaN times anything is NaN.
    whole(&mut data.k, 1.0);
    let (want, want_lse) = reference::decode(&data.problem, &data.inputs()).unwrap();
    assert!(want.iter().chain(&want_lse).all(|x| !x.is_nan()));
    for isa in Isa::available() {
        let (out, lse) = data.run(&CpuBackend::with_isa(isa).unwrap());
        let shape = [want.len()];
        let view = TensorView::from_slice("out", &out, &shape).unwrap();
        // Storing the result, and weights where they are rounded to the type; keys are at most 4.
        let relative = match T::DTYPE {
            DType::Bf16 => 2.0f64.powi(-7),
            DType::F16 => 2.0f64.powi(-10),
            _ => 2.0f64.powi(-19),
        };
        for (n, w) in want.iter().enumerate() {
            let got = view.get_f64(&[n]).unwrap();
            assert!(
                (got - w).abs() <= 4.0 * relative,
                "{isa} {:?} out[{n}] {got} != {w} in {case:?} x {unit}",
                T::DTYPE
            );
        }
        for (n, (got, w)) in lse.iter().zip(&want_lse).enumerate() {
            // Beyond f32's largest number its infinity is the right answer.
            let nearest = *w as f32;
            let close = *got == nearest || f64::from((*got - nearest).abs()) <= 1e-6 * w.abs().max(1.0);
            assert!(close, "{isa} {:?} lse[{n}] {got} != {w} in {case:?} x {unit}", T::DTYPE);
        }
    }
}

fn check_all_types(case: &Case, unit: f32) {
    check::<bf16>(case, unit, 1);
    check::<f16>(case, unit.min(4096.0), 2);
    check::<f32>(case, unit, 3);
}

/// Requests that are split and not, of whole and odd blocks, with rows that see no key.
fn case(scale: Option<f32>) -> Case {
    Case { lengths: vec![0, 1, 64, 401], s_q: 3, h_q: 6, mask: Mask::Causal, scale, ..Case::default() }
}

#[test]
fn large_scale() {
    for scale in [1e-30, 1e7, 1e13, 1e22, 1e34, f32::MAX] {
        check_all_types(&case(Some(scale)), 1.0);
        let policy = SplitPolicy::BatchInvariant { split_blocks: 1 };
        check_all_types(&Case { policy, ..case(Some(scale)) }, 1.0);
    }
}

#[test]
fn large_queries() {
    // 2^100: scores of 1e33, whose squares are beyond f32.
    for unit in [4096.0, (1u64 << 40) as f32, 2f32.powi(100)] {
        check_all_types(&case(None), unit);
        let policy = SplitPolicy::BatchInvariant { split_blocks: 1 };
        check_all_types(&Case { policy, ..case(None) }, unit);
    }
}

/// Large scores and a scale that brings them back: weights neither 0 nor 1.
#[test]
fn large_queries_and_small_scale() {
    for exponent in [40, 100] {
        let scale = Some(2f32.powi(-exponent - 5));
        check::<bf16>(&case(scale), 2f32.powi(exponent), 4);
        check::<f32>(&case(scale), 2f32.powi(exponent), 5);
    }
}
