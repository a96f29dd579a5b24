//! Wrong tensors: shapes, types, strides, memory.

use polymla::conformance::{HostTensor, Layout, PoisonedOutputs};
use polymla::{DType, Mask, MlaError, TensorView, TensorViewMut};

use crate::call::*;
use crate::common::backends;

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
        for backend in backends() {
            let error = backend.decode(&call.problem, &Default::default(), &inputs, &mut outputs).unwrap_err();
            assert_eq!(error, MlaError::DTypeMismatch { param: name, value, limit });
        }
        assert!(results.untouched());
    }
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
