//! Sizes that no memory holds: strides of 0, or a size of 0 beside them, make such tensors of little memory.

use polymla::cpu::CpuBackend;
use polymla::schedule::PartMetadata;
use polymla::{
    HostWorkspace, Mask, MlaBackend, MlaError, Problem, SplitPolicy, TensorView, get_mla_metadata, merge_partials,
    scaled_dot_product_attention,
};

const HUGE: usize = 1 << 50;

fn tensor<'a>(data: &'a [f32], shape: &[usize], strides: &[usize]) -> TensorView<'a> {
    TensorView::from_slice_strided("t", data, shape, strides).expect("inside its memory")
}

#[test]
fn tensors_have_a_length() {
    let data = [0.0; 8];
    assert_eq!(tensor(&data, &[HUGE, HUGE], &[0, 0]).len(), usize::MAX);
    assert_eq!(tensor(&data, &[usize::MAX, 2, 0], &[0, 0, 0]).len(), 0);
    assert_eq!(tensor(&data, &[2, 3], &[3, 1]).len(), 6);
}

#[test]
fn the_reference_refuses_them() {
    let data = [0.0; 8];
    let [q, k] = [HUGE, 1].map(|heads| tensor(&data, &[1, heads, 8], &[0, 0, 1]));
    let refused = scaled_dot_product_attention(&q, &k, &k, 1.0, &[1]);
    assert!(matches!(refused, Err(MlaError::Overflow { param: "out elements", .. })), "{refused:?}");
    let long = tensor(&data, &[HUGE, 1, 8], &[0, 0, 1]);
    let refused = scaled_dot_product_attention(&k, &long, &long, 1.0, &[1]);
    assert!(matches!(refused, Err(MlaError::Overflow { param: "k elements", .. })), "{refused:?}");
    let refused = scaled_dot_product_attention(&k, &long, &long, 1.0, &[usize::MAX]);
    assert!(matches!(refused, Err(MlaError::VisibleLength { limit: i32::MAX, .. })), "{refused:?}");
    let empty = tensor(&data, &[0, HUGE, HUGE], &[0, 0, 1]);
    assert_eq!(scaled_dot_product_attention(&empty, &empty, &empty, 1.0, &[]), Ok((vec![], vec![])));
}

#[test]
fn merging_nothing_into_them_is_refused() {
    for (rows, d_v) in [(0, usize::MAX), (usize::MAX, 0), (HUGE, HUGE), (HUGE << 10, 1)] {
        let refused = merge_partials(&[], &[], 0, rows, d_v);
        assert!(matches!(refused, Err(MlaError::Overflow { .. })), "{rows} {d_v}: {refused:?}");
    }
    assert_eq!(merge_partials(&[], &[], 0, 1, 2), Ok((vec![0.0; 2], vec![f32::INFINITY])));
}

#[test]
fn masks_end_at_the_length() {
    let problem = Problem::builder(1).s_q(2).mask(Mask::Causal).build().expect("valid");
    assert_eq!(problem.visible_end(usize::MAX, usize::MAX, None), usize::MAX - 2);
    assert_eq!(problem.visible_end(3, 0, None), 2);
}

#[test]
fn a_workspace_without_memory_is_too_small() {
    let mut memory = HostWorkspace::new();
    assert_eq!(memory.lend(100).bytes(), 100);
    let mut workspace = memory.lend(usize::MAX);
    assert!(workspace.bytes() < usize::MAX);
    let refused = workspace.host(usize::MAX).map(|_| ());
    assert!(matches!(refused, Err(MlaError::WorkspaceTooSmall { limit: usize::MAX, .. })), "{refused:?}");
    assert_eq!(memory.lend(1000).bytes(), 1000, "it still grows");
}

#[test]
fn requests_and_parts_of_another_schedule_are_empty() {
    let schedule = get_mla_metadata(&[10_000, 3], 4, SplitPolicy::default()).expect("valid");
    for r in [2, 3, usize::MAX] {
        assert!(schedule.partials_of(r).is_empty() && schedule.request_blocks(r) == 0, "{r}");
    }
    assert_eq!(schedule.request_blocks(1), 1);
    let foreign = PartMetadata { begin_req: -1, end_req: 3, begin_block: -9, begin_split: -1, ..Default::default() };
    assert!(schedule.splits_of(&foreign).count() >= 5);
}

#[test]
fn an_empty_batch_needs_no_memory_whatever_its_sizes() {
    let problem = Problem::builder(0).s_q(1 << 24).head_dim_k(1 << 24).build().expect("valid");
    let schedule = get_mla_metadata(&[], 1, SplitPolicy::default()).expect("valid");
    assert_eq!(CpuBackend::new().expect("a CPU").workspace_bytes(&problem, &schedule), 0);
}
