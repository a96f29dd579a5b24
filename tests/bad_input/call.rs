//! A call that is right in every way, and what it means that it is refused.

use crate::common::backends;
use polymla::conformance::{Call, HostTensor, PoisonedOutputs};
use polymla::cpu::CpuBackend;
use polymla::tensor::contiguous_strides;
use polymla::{DType, HostWorkspace, MlaBackend, MlaError, Problem, ScheduleOptions, get_mla_metadata};

pub const B: usize = 3;
pub const S_Q: usize = 2;
pub const H_Q: usize = 4;
pub const D_K: usize = 24;
pub const D_V: usize = 16;
pub const PAGE: usize = 16;
pub const PAGES: usize = 10;
pub const COLUMNS: usize = 4;
pub const LENGTHS: [i32; B] = [40, 0, 64];
pub const TABLE: [i32; B * COLUMNS] = [7, 2, 9, -1, 2147480000, -5, 99, 10, 0, 4, 3, 8];

pub fn builder() -> polymla::problem::ProblemBuilder {
    Problem::builder(B)
        .s_q(S_Q)
        .h_q(H_Q)
        .head_dim_k(D_K)
        .head_dim_v(D_V)
        .num_pages(PAGES)
        .page_size(PAGE)
        .max_pages_per_seq(COLUMNS)
        .dtype(DType::F32)
}

pub fn tensor(name: &'static str, dtype: DType, shape: &[usize]) -> HostTensor {
    let dense = contiguous_strides(shape);
    HostTensor::filled(name, dtype, shape, &dense[..shape.len()], 0, &[0; 4]).unwrap()
}

/// A call that is right in every way, for each test to spoil in one.
pub fn good() -> Call {
    let mut call = Call {
        name: "good".into(),
        problem: builder().build().unwrap(),
        tensors: vec![
            ("q", tensor("q", DType::F32, &[B, S_Q, H_Q, D_K])),
            ("k_cache", tensor("k_cache", DType::F32, &[PAGES, PAGE, 1, D_K])),
            ("block_table", HostTensor::from_i32("block_table", &[B, COLUMNS], &TABLE).unwrap()),
            ("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[B], &LENGTHS).unwrap()),
        ],
        output_strides: None,
        expected: None,
        tolerance: Default::default(),
    };
    for (i, name) in ["q", "k_cache"].into_iter().enumerate() {
        let values: Vec<f32> = (0..4000).map(|n| ((n * (7 + i)) % 11) as f32 / 8.0).collect();
        let bytes = call.tensor_mut(name).unwrap().bytes_mut();
        let len = bytes.len();
        bytes.copy_from_slice(&bytemuck::cast_slice(&values)[..len]);
    }
    call
}

pub fn with(name: &'static str, tensor: HostTensor) -> Call {
    let mut call = good();
    call.tensors.retain(|(n, _)| *n != name);
    call.tensors.push((name, tensor));
    call
}

/// Runs the call on every backend and by [`MlaBackend::run`] with a schedule of its own: all must return the same error
/// and leave the outputs as they were.
pub fn refused(call: &Call) -> MlaError {
    refused_with(call, call.poisoned_outputs().unwrap())
}

pub fn refused_with(call: &Call, mut results: PoisonedOutputs) -> MlaError {
    let inputs = call.inputs().unwrap();
    let mut errors = Vec::new();
    for backend in backends() {
        let mut outputs = results.outputs().unwrap();
        let options = ScheduleOptions::default();
        errors.push(backend.decode(&call.problem, &options, &inputs, &mut outputs).expect_err("it was accepted"));
        assert!(results.untouched(), "outputs were written in spite of {}", errors[0]);
    }
    // `run` must find everything by itself: its schedule may come from anywhere.
    let backend = CpuBackend::new().unwrap();
    let lengths: Vec<i32> = call.cache_seqlens().into_iter().map(|n| n.max(0)).collect();
    let schedule = get_mla_metadata(&lengths, 3, Default::default()).unwrap();
    let mut scratch = HostWorkspace::new();
    let mut workspace = scratch.lend(1 << 20);
    let mut outputs = results.outputs().unwrap();
    let error = MlaBackend::run(&backend, &call.problem, &schedule, &mut workspace, &inputs, &mut outputs, ());
    errors.push(error.expect_err("run accepted it"));
    assert!(results.untouched(), "outputs were written in spite of {}", errors[0]);
    for error in &errors {
        assert_eq!(*error, errors[0]);
    }
    errors.swap_remove(0)
}

pub fn outputs(out: (&[usize], &[usize], DType), lse: (&[usize], &[usize])) -> PoisonedOutputs {
    let mut results = PoisonedOutputs::dense(&good().problem).unwrap();
    // Poison of the right kind, whatever the shape.
    let poison = |t: &HostTensor| -> [u8; 4] { t.bytes()[..4].try_into().unwrap() };
    let (p, l) = (poison(&results.out), poison(&results.lse));
    results.out = HostTensor::filled("out", out.2, out.0, out.1, 0, &p).unwrap();
    results.lse = HostTensor::filled("lse", DType::F32, lse.0, lse.1, 0, &l).unwrap();
    results
}

pub const OUT: [usize; 4] = [B, S_Q, H_Q, D_V];
pub const LSE: [usize; 3] = [B, H_Q, S_Q];

pub fn dense(shape: &[usize]) -> Vec<usize> {
    contiguous_strides(shape)[..shape.len()].to_vec()
}
