//! The graph by itself, without the checks that the backend makes before it.

use half::f16;

use crate::problem::{Mask, Problem};
use crate::tensor::{DType, TensorView, TensorViewMut};

use super::graph::{Products, graph};
use super::run::Program;
use crate::error::MlaError;

const PAGES: usize = 5;
const PAGE: usize = 4;
const COLUMNS: usize = 3;

fn problem(mask: Mask) -> Problem {
    let builder = Problem::builder(3).s_q(2).h_q(4).h_kv(2).head_dim_k(12).head_dim_v(8).dtype(DType::F16);
    builder.num_pages(PAGES).page_size(PAGE).max_pages_per_seq(COLUMNS).mask(mask).build().unwrap()
}

/// out and lse of the three requests, by request.
fn run(mask: Mask, table: &[i32; 9], lengths: &[i32; 3], visible: &[i32; 6]) -> Vec<(Vec<f16>, Vec<f32>)> {
    let p = problem(mask);
    let value = |n: usize| f16::from_f32(((n * 37) % 64) as f32 / 32.0 - 1.0);
    let q: Vec<f16> = (0..3 * 2 * 4 * 12).map(value).collect();
    let k: Vec<f16> = (0..PAGES * PAGE * 2 * 12).map(|n| value(n + 11)).collect();
    let (mut out, mut lse) = (vec![f16::from_f32(7.0); 3 * 2 * 4 * 8], vec![7.0f32; 3 * 4 * 2]);
    let q = TensorView::from_slice("q", &q, &[3, 2, 4, 12]).unwrap();
    let k = TensorView::from_slice("k_cache", &k, &[PAGES, PAGE, 2, 12]).unwrap();
    let table = TensorView::from_slice("block_table", table, &[3, COLUMNS]).unwrap();
    let lengths = TensorView::from_slice("cache_seqlens", lengths, &[3]).unwrap();
    let visible = TensorView::from_slice("visible_lengths", visible, &[3, 2]).unwrap();
    let mut inputs =
        vec![vec![("q", &q)], vec![("k_cache", &k)], vec![("block_table", &table)], vec![("cache_seqlens", &lengths)]];
    if mask == Mask::VisibleLengths {
        inputs.push(vec![("visible_lengths", &visible)]);
    }
    let program = Program::new(&graph(&p, Products::F32).unwrap()).unwrap();
    let mut out_view = TensorViewMut::from_slice("out", &mut out, &[3, 2, 4, 8]).unwrap();
    let mut lse_view = TensorViewMut::from_slice("lse", &mut lse, &[3, 4, 2]).unwrap();
    program.run(&inputs, &mut out_view, &mut lse_view).unwrap();
    out.chunks(64).zip(lse.chunks(8)).map(|(o, l)| (o.to_vec(), l.to_vec())).collect()
}

const TABLE: [i32; 9] = [3, 1, -7, 4, 2_147_480_000, 99, 0, 2, 3];
const LENGTHS: [i32; 3] = [7, 4, 12];
const VISIBLE: [i32; 6] = [7, 3, 0, 4, 12, 1];

/// A compiled graph has no error to return. A request that is not valid gets NaN, the others their results, and
/// nothing out of range is read (tract would refuse the index).
#[test]
fn invalid_requests_are_nan_and_leave_the_others_alone() {
    for mask in [Mask::None, Mask::Causal, Mask::VisibleLengths] {
        let good = run(mask, &TABLE, &LENGTHS, &VISIBLE);
        assert!(good.iter().all(|(o, l)| o.iter().all(|x| x.is_finite()) && l.iter().all(|x| !x.is_nan())), "{mask:?}");
        let table = |at: usize, value| {
            let mut t = TABLE;
            t[at] = value;
            (t, LENGTHS, VISIBLE)
        };
        let length = |at: usize, value| {
            let mut l = LENGTHS;
            l[at] = value;
            (TABLE, l, VISIBLE)
        };
        let visible = |at: usize, value| {
            let mut v = VISIBLE;
            v[at] = value;
            (TABLE, LENGTHS, v)
        };
        let mut wrong = vec![
            (0, table(1, PAGES as i32)),
            (0, table(0, -1)),
            (2, table(8, i32::MAX)),
            (1, table(3, i32::MIN)),
            (0, length(0, -1)),
            (2, length(2, i32::MIN)),
            (2, length(2, (PAGE * COLUMNS) as i32 + 1)),
            (2, length(2, i32::MAX)),
        ];
        if mask == Mask::VisibleLengths {
            wrong.extend([(0, visible(1, 8)), (1, visible(3, -1)), (2, visible(4, i32::MAX))]);
        }
        for (request, (table, lengths, visible)) in wrong {
            let got = run(mask, &table, &lengths, &visible);
            for i in 0..3 {
                if i == request {
                    let (out, lse) = &got[i];
                    assert!(out.iter().all(|x| x.is_nan()) && lse.iter().all(|x| x.is_nan()), "{mask:?} {lengths:?}");
                } else {
                    assert_eq!(got[i], good[i], "{mask:?} {table:?} {lengths:?} {visible:?}");
                }
            }
        }
    }
}

/// What compilers for fixed shapes are known to take: README of `backends/onnx` lists the same.
#[test]
fn only_these_operators() {
    const ALLOWED: [&str; 17] = [
        "Add",
        "And",
        "Cast",
        "Div",
        "Exp",
        "Gather",
        "Less",
        "Log",
        "MatMul",
        "Mul",
        "ReduceMax",
        "ReduceSum",
        "Reshape",
        "Slice",
        "Sub",
        "Transpose",
        "Where",
    ];
    for mask in [Mask::None, Mask::Causal, Mask::VisibleLengths] {
        for products in [Products::F32, Products::F16] {
            let model = graph(&problem(mask), products).unwrap();
            for node in &model.nodes {
                assert!(ALLOWED.contains(&node.op), "{}", node.op);
            }
            let values = model.inputs.iter().chain(&model.outputs).chain(model.constants.iter().map(|c| &c.value));
            assert!(values.into_iter().all(|v| v.shape.len() <= 4 && v.shape.iter().all(|n| *n > 0)));
        }
    }
}

#[test]
fn classes_without_a_graph() {
    let empty = |b, pages, columns| {
        let builder = Problem::builder(b).h_q(1).dtype(DType::F16).num_pages(pages).max_pages_per_seq(columns);
        graph(&builder.build().unwrap(), Products::F32).unwrap_err()
    };
    assert_eq!(empty(0, 1, 1), MlaError::ZeroSize { param: "b" });
    assert_eq!(empty(1, 0, 1), MlaError::ZeroSize { param: "num_pages" });
    assert_eq!(empty(1, 1, 0), MlaError::ZeroSize { param: "max_pages_per_seq" });
    let bf16 = Problem::builder(1).num_pages(1).max_pages_per_seq(1).build().unwrap();
    let error = graph(&bf16, Products::F32).unwrap_err();
    assert_eq!(error, MlaError::DTypeMismatch { param: "dtype", value: DType::Bf16, limit: DType::F16 });
    let f32s = Problem::builder(1).num_pages(1).max_pages_per_seq(1).dtype(DType::F32).build().unwrap();
    assert!(graph(&f32s, Products::F16).is_err());
    let long = Problem::builder(1).dtype(DType::F16).num_pages(1).page_size(1 << 16).max_pages_per_seq(1 << 16);
    let error = graph(&long.build().unwrap(), Products::F32).unwrap_err();
    assert!(matches!(error, MlaError::Overflow { param: "tokens a request", .. }), "{error}");
}
