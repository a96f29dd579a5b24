//! The CPU backend against the f64 reference: every instruction set of this machine, any number of threads.

use std::sync::Arc;

use half::{bf16, f16};
use polymla::cpu::{CpuBackend, Isa};
use polymla::{DType, Mask, MlaError, Problem, SplitPolicy, TensorView, reference};

mod data;
mod large_scores;
mod range;

use data::{Case, Data, Number};

fn check<T: Number>(case: &Case, seed: u64) {
    let data = Data::<T>::new(case, seed);
    let (want, want_lse) = reference::decode(&data.problem, &data.inputs()).unwrap();
    for isa in Isa::available() {
        let (out, lse) = data.run(&CpuBackend::with_isa(isa).unwrap());
        let shape = [want.len()];
        let view = TensorView::from_slice("out", &out, &shape).unwrap();
        // Half the distance of two neighbours, for rounding the result; and as much again for weights in bf16.
        let relative = match T::DTYPE {
            DType::Bf16 => 2.0f64.powi(-7),
            DType::F16 => 2.0f64.powi(-10),
            // An error of a logit is one of the weight; logits round in proportion to their size.
            _ => 1e-5 * f64::from(1.0 + case.spread),
        };
        let scale = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt();
        for (n, w) in want.iter().enumerate() {
            let got = view.get_f64(&[n]).unwrap();
            let allowed = relative * (w.abs() + scale);
            assert!((got - w).abs() <= allowed, "{isa} {:?} out[{n}] {got} != {w} in {case:?}", T::DTYPE);
        }
        for (n, (got, w)) in lse.iter().zip(&want_lse).enumerate() {
            // f32 sums of products round in proportion to the logits, which may cancel.
            let allowed = 1e-6 * (1.0 + w.abs() + f64::from(case.spread));
            let close = (f64::from(*got) - w).abs() <= allowed || f64::from(*got) == *w;
            assert!(close, "{isa} {:?} lse[{n}] {got} != {w} in {case:?}", T::DTYPE);
        }
    }
}

fn check_all_types(case: &Case) {
    check::<bf16>(case, 1);
    check::<f16>(case, 2);
    check::<f32>(case, 3);
}

#[test]
fn deepseek_shapes() {
    check_all_types(&Case::default());
    check_all_types(&Case { split: true, h_q: 128, lengths: vec![70], ..Case::default() });
    check_all_types(&Case { h_q: 128, s_q: 2, mask: Mask::Causal, lengths: vec![1, 300], ..Case::default() });
}

#[test]
fn masks() {
    for mask in [Mask::None, Mask::Causal, Mask::VisibleLengths] {
        let case = Case { mask, s_q: 5, h_q: 3, lengths: vec![3, 0, 64, 65, 66, 259], ..Case::default() };
        check_all_types(&case);
        check::<bf16>(&Case { policy: SplitPolicy::BatchInvariant { split_blocks: 1 }, ..case }, 7);
    }
}

#[test]
fn odd_shapes() {
    for (h_q, h_kv) in [(1, 1), (6, 2), (9, 3), (40, 1), (17, 17), (150, 1)] {
        for (head_dim_k, head_dim_v) in [(1, 1), (2, 1), (17, 17), (33, 32), (80, 64), (90, 74), (256, 256), (100, 81)]
        {
            for page_size in [1, 3, 64, 100] {
                let split = (h_q + head_dim_k + page_size) % 2 == 0;
                let lengths = vec![131, 0, 7];
                let case = Case { h_q, h_kv, head_dim_k, head_dim_v, page_size, split, lengths, ..Case::default() };
                // Each shape with bf16, which has kernels of its own, and with one of the others.
                check::<bf16>(&case, 1);
                if (h_kv + page_size) % 2 == 0 {
                    check::<f16>(&case, 2);
                } else {
                    check::<f32>(&case, 3);
                }
            }
        }
    }
}

#[test]
fn peaked_scores() {
    for spread in [0.0, 30.0] {
        check_all_types(&Case { spread, ..Case::default() });
        let policy = SplitPolicy::BatchInvariant { split_blocks: 3 };
        check_all_types(&Case { spread, policy, h_q: 40, lengths: vec![1500], ..Case::default() });
    }
}

/// Keys that are visible but not to every row may be NaN too: a row's result must not contain them.
#[test]
fn masked_keys_are_not_multiplied() {
    for len in [4, 33, 64, 66, 129] {
        let case = Case { mask: Mask::Causal, s_q: 3, lengths: vec![len], page_size: 1, ..Case::default() };
        let clean = Data::<bf16>::new(&case, 9);
        let mut poisoned = Data::<bf16>::new(&case, 9);
        let page = poisoned.table[len as usize - 1] as usize;
        poisoned.k[page * 576..(page + 1) * 576].fill(bf16::NAN);
        for isa in Isa::available() {
            let backend = CpuBackend::with_isa(isa).unwrap();
            let (want, got) = (clean.run(&backend).0, poisoned.run(&backend).0);
            // Rows 0 and 1 do not see the last key; row 2 does.
            assert_eq!(want[..2 * 16 * 512], got[..2 * 16 * 512], "{isa}");
            assert!(got[2 * 16 * 512..].iter().all(|x| x.is_nan()), "{isa}");
        }
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    for policy in [SplitPolicy::default(), SplitPolicy::BATCH_INVARIANT] {
        let case = Case { lengths: vec![1500, 100, 0, 1100], h_q: 150, policy, ..Case::default() };
        let data = Data::<bf16>::new(&case, 4);
        for isa in Isa::available() {
            let results = [1, 2, 3, 8].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                data.run(&CpuBackend::with_isa_and_pool(isa, Arc::new(pool)).unwrap())
            });
            for result in &results[1..] {
                assert!(results[0] == *result, "{isa}");
            }
        }
    }
}

#[test]
fn batch_invariant() {
    let policy = SplitPolicy::BATCH_INVARIANT;
    let case = Case { lengths: vec![3000, 100, 5000], h_q: 32, policy, ..Case::default() };
    let whole = Data::<bf16>::new(&case, 5);
    let columns = whole.problem.max_pages_per_seq();
    for isa in Isa::available() {
        let backend = CpuBackend::with_isa(isa).unwrap();
        let (out, lse) = whole.run(&backend);
        for i in 0..3 {
            let problem = Problem::builder(1).h_q(32).num_pages(whole.problem.num_pages()).max_pages_per_seq(columns);
            let alone = Data::<bf16> {
                problem: problem.build().unwrap(),
                case: Case { lengths: vec![case.lengths[i]], ..case.clone() },
                q: whole.q[i * 32 * 576..][..32 * 576].to_vec(),
                k: whole.k.clone(),
                table: whole.table[i * columns..][..columns].to_vec(),
                visible: Vec::new(),
            };
            let (alone_out, alone_lse) = alone.run(&backend);
            assert!(alone_out[..] == out[i * 32 * 512..][..32 * 512], "{isa} request {i}");
            assert!(alone_lse[..] == lse[i * 32..][..32], "{isa} request {i}");
        }
    }
}

#[test]
fn softmax_scale_zero_averages() {
    let data = Data::<f32>::new(&Case { scale: Some(0.0), ..Case::default() }, 6);
    let (want, _) = reference::decode(&data.problem, &data.inputs()).unwrap();
    for isa in Isa::available() {
        let (out, lse) = data.run(&CpuBackend::with_isa(isa).unwrap());
        assert!(out.iter().zip(&want).all(|(x, w)| (f64::from(*x) - w).abs() < 1e-5), "{isa}");
        assert!((lse[0] - 200f32.ln()).abs() < 1e-6 && lse[16] == f32::INFINITY, "{isa}");
    }
}

#[test]
fn absent_isa_is_refused() {
    for isa in Isa::ALL {
        match CpuBackend::with_isa(isa) {
            Ok(backend) => assert!(isa.is_available() && backend.isa() == isa),
            Err(error) => assert!(!isa.is_available() && matches!(error, MlaError::Absent { .. })),
        }
    }
}
