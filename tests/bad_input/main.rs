//! Bad input: every mistake has its own error, which names the value and the limit, and nothing is written.
//!
//! By file: values in tables and lengths, tensors, the problem itself, and what a run is given beside them.

use polymla::DType;
use polymla::conformance::random::Limits;
use polymla::conformance::{Layout, random::random_call};

mod call;
#[path = "../common/mod.rs"]
mod common;
mod problems;
mod runs;
mod sizes;
mod tables;
mod tensors;

use call::*;
use common::{backends, takes};

#[test]
fn the_good_call_is_good() {
    let call = good();
    for backend in backends() {
        let mut results = call.poisoned_outputs().unwrap();
        let mut outputs = results.outputs().unwrap();
        backend.decode(&call.problem, &Default::default(), &call.inputs().unwrap(), &mut outputs).unwrap();
        results.check_written().unwrap();
    }
}

#[test]
fn empty_batch_is_no_error() {
    let seeds = (0..200).filter_map(|seed| {
        let limits = Limits { max_b: 0, max_work: 1000, ..Limits::any() };
        random_call(seed, &limits).ok()
    });
    let mut runs = 0;
    for call in seeds {
        for layout in [Layout::Given, Layout::Fused, Layout::Split] {
            let call = call.with_layout(layout).unwrap();
            for backend in backends() {
                if !takes(backend.as_ref(), &call.problem) {
                    continue;
                }
                let mut results = call.poisoned_outputs().unwrap();
                let mut outputs = results.outputs().unwrap();
                backend.decode(&call.problem, &Default::default(), &call.inputs().unwrap(), &mut outputs).unwrap();
                assert_eq!(results.out.shape()[0], 0);
                assert!(results.untouched());
                runs += 1;
            }
        }
    }
    assert!(runs >= 600);
}

#[test]
fn only_empty_requests_is_no_error() {
    // No pages, no table, every length 0: rows see no key.
    let mut call = with("k_cache", tensor("k_cache", DType::F32, &[0, PAGE, 1, D_K]));
    call.problem = builder().num_pages(0).max_pages_per_seq(0).build().unwrap();
    *call.tensor_mut("block_table").unwrap() = tensor("block_table", DType::I32, &[B, 0]);
    *call.tensor_mut("cache_seqlens").unwrap() = tensor("cache_seqlens", DType::I32, &[B]);
    for backend in backends() {
        let mut results = call.poisoned_outputs().unwrap();
        let mut outputs = results.outputs().unwrap();
        backend.decode(&call.problem, &Default::default(), &call.inputs().unwrap(), &mut outputs).unwrap();
        assert!(results.out.to_f64().iter().all(|x| *x == 0.0));
        assert!(results.lse.to_f64().iter().all(|x| *x == f64::INFINITY));
    }
}
