//! Problems that no call could be right for.

use polymla::{DType, MlaError, Problem};

use crate::call::*;

#[test]
fn integers_are_no_element_type() {
    let error = builder().dtype(DType::I32).build().unwrap_err();
    assert_eq!(error, MlaError::DTypeMismatch { param: "dtype", value: DType::I32, limit: DType::Bf16 });
    let error = builder().kv_format(polymla::KvFormat::F16).build().unwrap_err();
    assert!(matches!(error, MlaError::KvFormatMismatch { .. }), "{error}");
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
