//! Bad input: every mistake has its own error, which names the value and the limit, and nothing is written.

use polymla::conformance::random::Limits;
use polymla::conformance::{Call, HostTensor, Layout, PoisonedOutputs, open_all, random::random_call};
use polymla::cpu::CpuBackend;
use polymla::tensor::contiguous_strides;
use polymla::{
    DType, HostWorkspace, Inputs, KvCache, Mask, MlaBackend, MlaError, Outputs, Problem, Query, ScheduleOptions,
    TensorView, TensorViewMut, Workspace, get_mla_metadata,
};

const B: usize = 3;
const S_Q: usize = 2;
const H_Q: usize = 4;
const D_K: usize = 24;
const D_V: usize = 16;
const PAGE: usize = 16;
const PAGES: usize = 10;
const COLUMNS: usize = 4;
const LENGTHS: [i32; B] = [40, 0, 64];
const TABLE: [i32; B * COLUMNS] = [7, 2, 9, -1, 2147480000, -5, 99, 10, 0, 4, 3, 8];

fn builder() -> polymla::problem::ProblemBuilder {
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

fn tensor(name: &'static str, dtype: DType, shape: &[usize]) -> HostTensor {
    let dense = contiguous_strides(shape);
    HostTensor::filled(name, dtype, shape, &dense[..shape.len()], 0, &[0; 4]).unwrap()
}

/// A call that is right in every way, for each test to spoil in one.
fn good() -> Call {
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

fn with(name: &'static str, tensor: HostTensor) -> Call {
    let mut call = good();
    call.tensors.retain(|(n, _)| *n != name);
    call.tensors.push((name, tensor));
    call
}

/// Runs the call on every backend and by [`MlaBackend::run`] with a schedule of its own: all must return the same error
/// and leave the outputs as they were.
fn refused(call: &Call) -> MlaError {
    refused_with(call, call.poisoned_outputs().unwrap())
}

fn refused_with(call: &Call, mut results: PoisonedOutputs) -> MlaError {
    let inputs = call.inputs().unwrap();
    let mut errors = Vec::new();
    for backend in open_all().unwrap() {
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

#[test]
fn the_good_call_is_good() {
    let call = good();
    for backend in open_all().unwrap() {
        let mut results = call.poisoned_outputs().unwrap();
        let mut outputs = results.outputs().unwrap();
        backend.decode(&call.problem, &Default::default(), &call.inputs().unwrap(), &mut outputs).unwrap();
        results.check_written().unwrap();
    }
}

fn table_with(request: usize, position: usize, value: i32) -> Call {
    let mut table = TABLE;
    table[request * COLUMNS + position] = value;
    with("block_table", HostTensor::from_i32("block_table", &[B, COLUMNS], &table).unwrap())
}

#[test]
fn used_table_entry_out_of_range() {
    for value in [PAGES as i32, 2147480000, i32::MAX] {
        let error = refused(&table_with(0, 2, value));
        assert_eq!(error, MlaError::BlockTableEntry { request: 0, position: 2, value, limit: PAGES });
    }
    assert_eq!(
        refused(&table_with(2, 3, 10)).to_string(),
        "block_table[2][3] is 10; request 2 uses it, so it must be in 0..10"
    );
}

#[test]
fn used_table_entry_negative() {
    for value in [-1, i32::MIN] {
        let error = refused(&table_with(2, 0, value));
        assert_eq!(error, MlaError::BlockTableEntry { request: 2, position: 0, value, limit: PAGES });
    }
}

#[test]
fn no_pages_at_all() {
    let mut call = with("k_cache", tensor("k_cache", DType::F32, &[0, PAGE, 1, D_K]));
    call.problem = builder().num_pages(0).build().unwrap();
    let error = refused(&call);
    assert_eq!(error, MlaError::BlockTableEntry { request: 0, position: 0, value: 7, limit: 0 });
}

fn lengths(values: [i32; B]) -> Call {
    with("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[B], &values).unwrap())
}

#[test]
fn length_negative() {
    for value in [-1, i32::MIN] {
        assert_eq!(refused(&lengths([40, value, 64])), MlaError::NegativeLength { request: 1, value });
    }
}

#[test]
fn length_beyond_the_table() {
    for value in [(PAGE * COLUMNS) as i32 + 1, i32::MAX] {
        let limit = (PAGE * COLUMNS) as u64;
        let call = lengths([40, 0, value]);
        let error = MlaError::LengthBeyondTable { request: 2, value, limit };
        assert_eq!(refused(&call), error);
        // By the schedule too, which would make a workspace for it.
        let backend = CpuBackend::new().unwrap();
        let inputs = call.inputs().unwrap();
        let schedule = MlaBackend::schedule(&backend, &call.problem, &Default::default(), &inputs, ());
        assert_eq!(schedule.unwrap_err(), error);
    }
}

#[test]
fn visible_length_outside_the_sequence() {
    for (row, value) in [(3, 1), (1, -1), (5, 65), (0, i32::MAX)] {
        let mut visible = [40, 40, 0, 0, 64, 0];
        visible[row] = value;
        let mut call = with("visible_lengths", HostTensor::from_i32("visible_lengths", &[B, S_Q], &visible).unwrap());
        call.problem = builder().mask(Mask::VisibleLengths).build().unwrap();
        let (request, row) = (row / S_Q, row % S_Q);
        let error = refused(&call);
        assert_eq!(error, MlaError::VisibleLength { request, row, value, limit: LENGTHS[request] });
    }
}

#[test]
fn visible_lengths_absent_or_unexpected() {
    let mut call = good();
    call.problem = builder().mask(Mask::VisibleLengths).build().unwrap();
    assert!(matches!(refused(&call), MlaError::MissingTensor { param: "visible_lengths", .. }));
    let call = with("visible_lengths", tensor("visible_lengths", DType::I32, &[B, S_Q]));
    assert!(matches!(refused(&call), MlaError::UnexpectedTensor { param: "visible_lengths", .. }));
}

#[test]
fn mismatched_shapes() {
    let shapes: [(&'static str, DType, &[usize]); 4] = [
        ("q", DType::F32, &[B, S_Q, H_Q, D_K]),
        ("k_cache", DType::F32, &[PAGES, PAGE, 1, D_K]),
        ("block_table", DType::I32, &[B, COLUMNS]),
        ("cache_seqlens", DType::I32, &[B]),
    ];
    for (name, dtype, shape) in shapes {
        for dim in 0..shape.len() {
            for change in [-1isize, 1] {
                let mut wrong = shape.to_vec();
                wrong[dim] = wrong[dim].strict_add_signed(change);
                let error = refused(&with(name, tensor(name, dtype, &wrong)));
                assert_eq!(error, MlaError::Shape { param: name, dim, value: wrong[dim], limit: shape[dim] });
            }
        }
        let wrong = &shape[..shape.len() - 1];
        if !wrong.is_empty() {
            let error = refused(&with(name, tensor(name, dtype, wrong)));
            assert_eq!(error, MlaError::Rank { param: name, value: wrong.len(), limit: shape.len() });
        }
    }
}

#[test]
fn mismatched_split_shapes() {
    let split = good().with_layout(Layout::Split).unwrap();
    for (name, limit) in [("q_nope", D_V), ("q_pe", D_K - D_V), ("ckv", D_V), ("kpe", D_K - D_V)] {
        let mut call = split.clone();
        let old = call.tensor_mut(name).unwrap();
        let mut shape = old.shape().to_vec();
        shape[3] += 1;
        *old = tensor(name, DType::F32, &shape);
        assert_eq!(refused(&call), MlaError::Shape { param: name, dim: 3, value: limit + 1, limit });
    }
    for name in ["q_pe", "kpe"] {
        let mut call = split.clone();
        call.tensors.retain(|(n, _)| *n != name);
        let error = refused(&call);
        assert!(matches!(error, MlaError::MissingTensor { param, .. } if param == name), "{error}");
    }
}

#[test]
fn rope_part_where_there_is_no_rope() {
    for name in ["q_pe", "kpe"] {
        let mut call = good().with_layout(Layout::Split).unwrap();
        call.problem = builder().head_dim_k(D_V).build().unwrap();
        call.tensors.retain(|(n, _)| *n == name || !["q_pe", "kpe"].contains(n));
        let error = refused(&call);
        assert!(matches!(error, MlaError::UnexpectedTensor { param, .. } if param == name), "{error}");
    }
}

#[test]
fn mismatched_visible_lengths() {
    for shape in [[B, S_Q + 1], [B + 1, S_Q]] {
        let mut call = with("visible_lengths", tensor("visible_lengths", DType::I32, &shape));
        call.problem = builder().mask(Mask::VisibleLengths).build().unwrap();
        assert!(matches!(refused(&call), MlaError::Shape { param: "visible_lengths", .. }));
    }
}

#[test]
fn mismatched_dtypes() {
    let changes: [(&'static str, DType, DType, &[usize]); 4] = [
        ("q", DType::Bf16, DType::F32, &[B, S_Q, H_Q, D_K]),
        ("k_cache", DType::F16, DType::F32, &[PAGES, PAGE, 1, D_K]),
        ("block_table", DType::F32, DType::I32, &[B, COLUMNS]),
        ("cache_seqlens", DType::F32, DType::I32, &[B]),
    ];
    for (name, value, limit, shape) in changes {
        // Only one tensor is wrong, and its memory would be too small if it were read as the right type.
        let mut call = good();
        *call.tensor_mut(name).unwrap() = tensor(name, value, shape);
        let inputs = call.inputs().unwrap();
        let mut results = call.poisoned_outputs().unwrap();
        let mut outputs = results.outputs().unwrap();
        for backend in open_all().unwrap() {
            let error = backend.decode(&call.problem, &Default::default(), &inputs, &mut outputs).unwrap_err();
            assert_eq!(error, MlaError::DTypeMismatch { param: name, value, limit });
        }
        assert!(results.untouched());
    }
}

#[test]
fn integers_are_no_element_type() {
    let error = builder().dtype(DType::I32).build().unwrap_err();
    assert_eq!(error, MlaError::DTypeMismatch { param: "dtype", value: DType::I32, limit: DType::Bf16 });
    let error = builder().kv_format(polymla::KvFormat::F16).build().unwrap_err();
    assert!(matches!(error, MlaError::KvFormatMismatch { .. }), "{error}");
}

fn outputs(out: (&[usize], &[usize], DType), lse: (&[usize], &[usize])) -> PoisonedOutputs {
    let mut results = PoisonedOutputs::dense(&good().problem).unwrap();
    // Poison of the right kind, whatever the shape.
    let poison = |t: &HostTensor| -> [u8; 4] { t.bytes()[..4].try_into().unwrap() };
    let (p, l) = (poison(&results.out), poison(&results.lse));
    results.out = HostTensor::filled("out", out.2, out.0, out.1, 0, &p).unwrap();
    results.lse = HostTensor::filled("lse", DType::F32, lse.0, lse.1, 0, &l).unwrap();
    results
}

const OUT: [usize; 4] = [B, S_Q, H_Q, D_V];
const LSE: [usize; 3] = [B, H_Q, S_Q];

fn dense(shape: &[usize]) -> Vec<usize> {
    contiguous_strides(shape)[..shape.len()].to_vec()
}

#[test]
fn mismatched_outputs() {
    for dim in 0..4 {
        let mut shape = OUT;
        shape[dim] += 1;
        let results = outputs((&shape, &dense(&shape), DType::F32), (&LSE, &dense(&LSE)));
        let error = refused_with(&good(), results);
        assert_eq!(error, MlaError::Shape { param: "out", dim, value: OUT[dim] + 1, limit: OUT[dim] });
    }
    for dim in 0..3 {
        let mut shape = LSE;
        shape[dim] += 1;
        let results = outputs((&OUT, &dense(&OUT), DType::F32), (&shape, &dense(&shape)));
        let error = refused_with(&good(), results);
        assert_eq!(error, MlaError::Shape { param: "lse", dim, value: LSE[dim] + 1, limit: LSE[dim] });
    }
    // lse is [b, h_q, s_q]; [b, s_q, h_q] is the likely mistake.
    let swapped = [B, S_Q, H_Q];
    let results = outputs((&OUT, &dense(&OUT), DType::F32), (&swapped, &dense(&swapped)));
    let error = refused_with(&good(), results);
    assert_eq!(error, MlaError::Shape { param: "lse", dim: 1, value: S_Q, limit: H_Q });
    let call = good();
    let mut results = PoisonedOutputs::dense(&call.problem).unwrap();
    results.out = HostTensor::filled("out", DType::Bf16, &OUT, &dense(&OUT), 0, &[0x9A, 0x7F, 0, 0]).unwrap();
    let error = refused_with(&call, results);
    assert_eq!(error, MlaError::DTypeMismatch { param: "out", value: DType::Bf16, limit: DType::F32 });
}

#[test]
fn output_strides_that_alias() {
    let whole = dense(&OUT);
    for (dim, stride, limit) in [(3, 0, 1), (2, D_V - 1, D_V), (2, 0, 1), (1, 1, 1), (0, D_V * H_Q, 0)] {
        let mut strides = whole.clone();
        strides[dim] = stride;
        let results = outputs((&OUT, &strides, DType::F32), (&LSE, &dense(&LSE)));
        match refused_with(&good(), results) {
            MlaError::StrideAlias { param: "out", value, limit: needed, .. } => {
                assert!(value < needed, "{value} {needed}");
                if limit > 1 {
                    assert_eq!((value, needed), (stride, limit));
                }
            }
            error => panic!("{error}"),
        }
    }
    let results = outputs((&OUT, &whole, DType::F32), (&LSE, &[H_Q * S_Q, 1, 1]));
    let error = refused_with(&good(), results);
    assert_eq!(error, MlaError::StrideAlias { param: "lse", dim: 2, value: 1, limit: H_Q });
}

#[test]
fn strides_that_overrun() {
    let data = vec![0f32; 100];
    let error = TensorView::from_slice_strided("q", &data, &[10, 10], &[11, 1]).unwrap_err();
    assert_eq!(error, MlaError::StrideOverrun { param: "q", value: 4 * (9 * 11 + 9 + 1), limit: 400 });
    let error = TensorView::from_slice("q", &data, &[101]).unwrap_err();
    assert_eq!(error, MlaError::StrideOverrun { param: "q", value: 404, limit: 400 });
    let mut data = vec![0f32; 100];
    let error = TensorViewMut::from_slice_strided("out", &mut data, &[2, 3], &[98, 1]).unwrap_err();
    assert_eq!(error, MlaError::StrideOverrun { param: "out", value: 404, limit: 400 });
    // Exactly fitting is no overrun.
    TensorViewMut::from_slice_strided("out", &mut data, &[2, 3], &[97, 1]).unwrap();
}

#[test]
fn strides_that_overflow() {
    let data = vec![0f32; 100];
    for (shape, strides) in [
        (vec![2, 2], vec![usize::MAX, usize::MAX]),
        (vec![usize::MAX, 2], vec![usize::MAX, 1]),
        (vec![usize::MAX], vec![1]),
        (vec![3], vec![usize::MAX / 2 + 1]),
    ] {
        let error = TensorView::from_slice_strided("q", &data, &shape, &strides).unwrap_err();
        assert!(matches!(error, MlaError::Overflow { param: "q", .. }), "{shape:?} {strides:?}: {error}");
    }
    for rank in [0, 5] {
        let error = TensorView::from_slice("q", &data, &vec![1; rank]).unwrap_err();
        assert_eq!(error, MlaError::Rank { param: "q", value: rank, limit: 4 });
    }
    let error = TensorView::from_slice_strided("q", &data, &[2, 2], &[1]).unwrap_err();
    assert_eq!(error, MlaError::Rank { param: "q", value: 1, limit: 2 });
}

#[test]
fn inner_strides_of_inputs() {
    for name in ["q", "k_cache", "block_table", "cache_seqlens"] {
        let mut call = good();
        let old = call.tensor(name).unwrap();
        let strides: Vec<usize> = old.strides().iter().map(|s| s * 2).collect();
        let wide = HostTensor::filled(name, old.dtype(), old.shape(), &strides, 0, &[0; 4]).unwrap();
        *call.tensor_mut(name).unwrap() = wide;
        assert_eq!(refused(&call), MlaError::InnerStride { param: name, value: 2 });
    }
}

#[test]
fn head_dim_v_above_head_dim_k() {
    let error = builder().head_dim_v(D_K + 1).build().unwrap_err();
    assert_eq!(error, MlaError::HeadDimV { head_dim_v: D_K + 1, head_dim_k: D_K });
    assert_eq!(error.to_string(), "head_dim_v is 25; it must be at most head_dim_k, which is 24");
}

#[test]
fn h_q_not_a_multiple_of_h_kv() {
    assert_eq!(builder().h_kv(3).build().unwrap_err(), MlaError::HeadGroups { h_q: H_Q, h_kv: 3 });
    assert_eq!(builder().h_kv(8).build().unwrap_err(), MlaError::HeadGroups { h_q: H_Q, h_kv: 8 });
}

#[test]
fn sizes_of_zero() {
    let zero = |param| MlaError::ZeroSize { param };
    assert_eq!(builder().page_size(0).build().unwrap_err(), zero("page_size"));
    assert_eq!(builder().s_q(0).build().unwrap_err(), zero("s_q"));
    assert_eq!(builder().h_q(0).build().unwrap_err(), zero("h_q"));
    assert_eq!(builder().h_kv(0).build().unwrap_err(), zero("h_kv"));
    assert_eq!(builder().head_dim_k(0).build().unwrap_err(), zero("head_dim_k"));
    assert_eq!(builder().head_dim_v(0).build().unwrap_err(), zero("head_dim_v"));
}

#[test]
fn softmax_scale_not_finite() {
    for value in [f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        assert_eq!(builder().softmax_scale(value).build().unwrap_err(), MlaError::SoftmaxScale { value });
    }
    // NaN is not equal to itself.
    let error = builder().softmax_scale(f32::NAN).build().unwrap_err();
    assert_eq!(error.to_string(), "softmax_scale is NaN; it must be finite and at least 0");
    builder().softmax_scale(0.0).build().unwrap();
}

#[test]
fn sizes_whose_product_overflows() {
    let huge = usize::MAX / 8;
    for (what, problem) in [
        ("q elements", builder().s_q(huge)),
        ("q elements", builder().h_q(1 << 62)),
        ("k_cache elements", builder().page_size(huge).max_pages_per_seq(0)),
        ("tokens a request", builder().num_pages(0).page_size(1 << 40).max_pages_per_seq(1 << 40)),
        ("block_table elements", builder().max_pages_per_seq(usize::MAX)),
        ("num_pages", builder().num_pages(1 << 31)),
        // An empty batch or cache makes no product smaller.
        ("q elements", Problem::builder(0).s_q(1 << 40).h_q(1 << 40)),
        ("k_cache elements", builder().num_pages(0).page_size(1 << 40).h_kv(4).h_q(4).head_dim_k(1 << 40)),
        ("b", Problem::builder(1 << 31).h_q(1).head_dim_k(1).head_dim_v(1)),
    ] {
        match problem.build().unwrap_err() {
            MlaError::Overflow { param, .. } => assert_eq!(param, what),
            error => panic!("{what}: {error}"),
        }
    }
    let error = Problem::builder(1 << 40).build().unwrap_err();
    // 2^40 x 128 x 576 fits 64 bits; the batch itself is the first that does not fit its limit.
    let value = (1u64 << 40).to_string();
    assert_eq!(error, MlaError::Overflow { param: "b", value, limit: i32::MAX as u64 - 1 });
}

#[test]
fn workspace_too_small() {
    let backend = CpuBackend::new().unwrap();
    // One part a block, so that requests are split and partials need memory.
    let options =
        ScheduleOptions { num_sm_parts: Some(8), policy: polymla::SplitPolicy::BatchInvariant { split_blocks: 1 } };
    let mut long = good();
    long.problem = builder().max_pages_per_seq(COLUMNS * 3).build().unwrap();
    let table: Vec<i32> = (0..B * COLUMNS * 3).map(|i| (i % PAGES) as i32).collect();
    *long.tensor_mut("block_table").unwrap() = HostTensor::from_i32("t", &[B, COLUMNS * 3], &table).unwrap();
    *long.tensor_mut("cache_seqlens").unwrap() = HostTensor::from_i32("l", &[B], &[190, 0, 130]).unwrap();
    let inputs = long.inputs().unwrap();
    let schedule = MlaBackend::schedule(&backend, &long.problem, &options, &inputs, ()).unwrap();
    assert!(schedule.total_partials() >= 6);
    let needed = backend.workspace_bytes(&long.problem, &schedule);
    assert!(needed > 0, "a split schedule needs a workspace");
    let mut results = long.poisoned_outputs().unwrap();
    for given in [0, 1, needed / 2, needed - 1] {
        let mut scratch = HostWorkspace::new();
        let mut outputs = results.outputs().unwrap();
        let mut workspace = scratch.lend(given);
        let error = backend.run(&long.problem, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap_err();
        assert_eq!(error, MlaError::WorkspaceTooSmall { value: given, limit: needed });
        assert!(results.untouched());
    }
    // Misaligned: one byte into memory that would do.
    let mut memory = vec![0u8; needed + 256];
    let odd = memory.as_ptr().align_offset(64) + 1;
    let mut outputs = results.outputs().unwrap();
    let mut workspace = Workspace::from_slice(&mut memory[odd..odd + needed]);
    let error = backend.run(&long.problem, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap_err();
    assert!(matches!(error, MlaError::Alignment { param: "workspace", limit: 64, .. }), "{error}");
    assert!(results.untouched());
    let mut scratch = HostWorkspace::new();
    let mut outputs = results.outputs().unwrap();
    backend.run(&long.problem, &schedule, &mut scratch.lend(needed), &inputs, &mut outputs, ()).unwrap();
    results.check_written().unwrap();
}

#[test]
fn schedule_of_another_problem() {
    let backend = CpuBackend::new().unwrap();
    let call = good();
    let inputs = call.inputs().unwrap();
    let mut results = call.poisoned_outputs().unwrap();
    for (lengths, error) in [
        (vec![40, 0], MlaError::ScheduleMismatch { param: "b", value: 2, limit: 3 }),
        (vec![40, 0, 64, 1], MlaError::ScheduleMismatch { param: "b", value: 4, limit: 3 }),
        (vec![40, 0, 65], MlaError::ScheduleMismatch { param: "blocks of a request", value: 2, limit: 1 }),
        (vec![40, 1, 64], MlaError::ScheduleMismatch { param: "blocks of a request", value: 1, limit: 0 }),
        (vec![0, 0, 64], MlaError::ScheduleMismatch { param: "blocks of a request", value: 0, limit: 1 }),
    ] {
        let schedule = get_mla_metadata(&lengths, 4, Default::default()).unwrap();
        let mut scratch = HostWorkspace::new();
        let mut workspace = scratch.lend(1 << 20);
        let mut outputs = results.outputs().unwrap();
        let got = backend.run(&call.problem, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap_err();
        assert_eq!(got, error, "{lengths:?}");
        assert!(results.untouched());
    }
}

#[test]
fn outputs_over_inputs() {
    // `out` over q's memory: what a caller who saves memory might try.
    let call = good();
    let mut memory = vec![0f32; B * S_Q * H_Q * D_K];
    let mut lse = vec![0f32; B * H_Q * S_Q];
    let (address, bytes) = (memory.as_mut_ptr() as u64, 4 * memory.len() as u64);
    let strides = dense(&[B, S_Q, H_Q, D_K]);
    let host = polymla::Device::Host;
    // SAFETY: both views are over `memory`, which outlives them; the call must be refused before it writes.
    let (q, out) = unsafe {
        (
            TensorView::from_raw_parts("q", address, bytes, DType::F32, &[B, S_Q, H_Q, D_K], &strides, host).unwrap(),
            TensorViewMut::from_raw_parts("out", address + 64, bytes - 64, DType::F32, &OUT, &dense(&OUT), host)
                .unwrap(),
        )
    };
    let inputs = Inputs { query: Query::Fused(q), ..call.inputs().unwrap() };
    let mut outputs = Outputs { out, lse: TensorViewMut::from_slice("lse", &mut lse, &LSE).unwrap() };
    for backend in open_all().unwrap() {
        let error = backend.decode(&call.problem, &Default::default(), &inputs, &mut outputs).unwrap_err();
        assert_eq!(error, MlaError::Overlap { param: "out", other: "q", value: 0 });
    }
    assert!(memory.iter().all(|x| *x == 0.0));
}

#[test]
fn tensors_elsewhere() {
    let call = good();
    let gpu = polymla::Device::Accelerator { platform: "cuda", ordinal: 0 };
    let shape = [PAGES, PAGE, 1, D_K];
    // SAFETY: the address is of a device that is not there; the call must be refused before it reads.
    let k = unsafe {
        TensorView::from_raw_parts("k_cache", 0x1000, 1 << 20, DType::F32, &shape, &dense(&shape), gpu).unwrap()
    };
    let inputs = Inputs { kv_cache: KvCache::Fused(k), ..call.inputs().unwrap() };
    let mut results = call.poisoned_outputs().unwrap();
    let mut outputs = results.outputs().unwrap();
    for backend in open_all().unwrap() {
        let error = backend.decode(&call.problem, &Default::default(), &inputs, &mut outputs).unwrap_err();
        let limit = polymla::Device::Host;
        assert_eq!(error, MlaError::WrongDevice { param: "k_cache", value: gpu, limit });
    }
    assert!(results.untouched());
}

#[test]
fn misaligned_memory() {
    let bytes = [0u64; 8];
    let address = bytes.as_ptr() as u64 + 1;
    // SAFETY: 63 bytes from there are readable.
    let view = unsafe { TensorView::from_raw_parts("q", address, 63, DType::Bf16, &[4], &[1], polymla::Device::Host) };
    assert_eq!(view.unwrap_err(), MlaError::Alignment { param: "q", value: address, limit: 2 });
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
            for backend in open_all().unwrap() {
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
    for backend in open_all().unwrap() {
        let mut results = call.poisoned_outputs().unwrap();
        let mut outputs = results.outputs().unwrap();
        backend.decode(&call.problem, &Default::default(), &call.inputs().unwrap(), &mut outputs).unwrap();
        assert!(results.out.to_f64().iter().all(|x| *x == 0.0));
        assert!(results.lse.to_f64().iter().all(|x| *x == f64::INFINITY));
    }
}
