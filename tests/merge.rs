//! The two public references on host tensors: `merge_partials` and `scaled_dot_product_attention`.

use polymla::{MlaError, TensorView, merge_partials, scaled_dot_product_attention};
use proptest::prelude::*;

const INF: f32 = f32::INFINITY;

#[test]
fn two_parts_by_hand() {
    // exp(0) : exp(ln 3) = 1 : 3.
    let (out, lse) = merge_partials(&[1.0, -2.0, 5.0, 2.0], &[0.0, 3f32.ln()], 2, 1, 2).unwrap();
    assert!((out[0] - 4.0).abs() < 1e-6 && (out[1] - 1.0).abs() < 1e-6, "{out:?}");
    assert!((lse[0] - 4f32.ln()).abs() < 1e-6, "{lse:?}");
}

#[test]
fn one_part_is_itself() {
    let (out, lse) = merge_partials(&[1.5, -2.25, 7.0], &[-3.5, 88.0, 0.0], 1, 3, 1).unwrap();
    assert_eq!((out, lse), (vec![1.5, -2.25, 7.0], vec![-3.5, 88.0, 0.0]));
}

#[test]
fn infinities_of_both_signs_count_for_nothing() {
    for empty in [INF, -INF] {
        // What an empty part holds must not matter, NaN included.
        for junk in [0.0, 1e30, f32::NAN, INF] {
            for (outs, lses) in [([junk, junk, 3.0, 4.0], [empty, 1.25]), ([3.0, 4.0, junk, junk], [1.25, empty])] {
                let (out, lse) = merge_partials(&outs, &lses, 2, 1, 2).unwrap();
                assert_eq!((out, lse), (vec![3.0, 4.0], vec![1.25]), "{empty} {junk}");
            }
        }
    }
}

#[test]
fn rows_that_no_part_saw_a_key_for() {
    for lses in [[INF, INF], [-INF, -INF], [INF, -INF]] {
        let (out, lse) = merge_partials(&[f32::NAN; 4], &lses, 2, 1, 2).unwrap();
        assert_eq!((out, lse), (vec![0.0, 0.0], vec![INF]));
    }
    // Beside a row that has keys.
    let (out, lse) = merge_partials(&[9.0, 1.0, 9.0, 1.0], &[INF, 0.0, -INF, 0.0], 2, 2, 1).unwrap();
    assert_eq!((out[0], lse[0]), (0.0, INF));
    assert!((out[1] - 1.0).abs() < 1e-6 && (lse[1] - 2f32.ln()).abs() < 1e-6);
}

#[test]
fn nan_stays_nan() {
    let (out, lse) = merge_partials(&[1.0, 2.0], &[f32::NAN, 0.0], 2, 1, 1).unwrap();
    assert!(out[0].is_nan() && lse[0].is_nan(), "{out:?} {lse:?}");
    let (out, lse) = merge_partials(&[f32::NAN, 2.0], &[0.0, 0.0], 2, 1, 1).unwrap();
    assert!(out[0].is_nan() && (lse[0] - 2f32.ln()).abs() < 1e-6);
    // Only that row.
    let (out, lse) = merge_partials(&[1.0, 2.0, 1.0, 2.0], &[f32::NAN, 0.0, 0.0, 0.0], 2, 2, 1).unwrap();
    assert!(out[0].is_nan() && out[1] == 2.0 && (lse[1] - 2f32.ln()).abs() < 1e-6);
}

#[test]
fn far_apart_and_large() {
    // exp of these overflows or vanishes in any format; only their differences count.
    let (out, lse) = merge_partials(&[1.0, 2.0], &[1e30, -1e30], 2, 1, 1).unwrap();
    assert_eq!((out[0], lse[0]), (1.0, 1e30));
    let (out, lse) = merge_partials(&[1.0, 2.0], &[-5000.0, -5000.0], 2, 1, 1).unwrap();
    assert_eq!(out[0], 1.5);
    assert!((f64::from(lse[0]) - (-5000.0 + 2f64.ln())).abs() < 1e-3);
}

#[test]
fn no_parts_no_rows_no_columns() {
    assert_eq!(merge_partials(&[], &[], 0, 2, 3).unwrap(), (vec![0.0; 6], vec![INF; 2]));
    assert_eq!(merge_partials(&[], &[], 3, 0, 5).unwrap(), (Vec::<f32>::new(), Vec::<f32>::new()));
    assert_eq!(merge_partials(&[], &[0.0, 0.0], 2, 1, 0).unwrap().0, [0f32; 0]);
}

#[test]
fn sizes_that_do_not_agree() {
    let error = merge_partials(&[0.0; 4], &[0.0; 3], 2, 1, 2).unwrap_err();
    assert_eq!(error, MlaError::Shape { param: "lses", dim: 0, value: 3, limit: 2 });
    let error = merge_partials(&[0.0; 5], &[0.0; 2], 2, 1, 2).unwrap_err();
    assert_eq!(error, MlaError::Shape { param: "outs", dim: 0, value: 5, limit: 4 });
    for (parts, rows, d_v) in [(usize::MAX, 2, 1), (1 << 32, 1 << 31, 2), (0, 1 << 62, 1 << 2), (0, 1 << 40, 1 << 23)] {
        let error = merge_partials(&[], &[], parts, rows, d_v).unwrap_err();
        let value = format!("{parts} x {rows} x {d_v}");
        assert_eq!(error, MlaError::Overflow { param: "outs elements", value, limit: isize::MAX as u64 });
    }
}

fn attention(q: &[f32], k: &[f32], v: &[f32], d: [usize; 2], scale: f32, visible: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let [s_q, s_k] = [visible.len(), k.len() / d[0]];
    let q = TensorView::from_slice("q", q, &[s_q, 1, d[0]]).unwrap();
    let k = TensorView::from_slice("k", k, &[s_k, 1, d[0]]).unwrap();
    let v = TensorView::from_slice("v", v, &[s_k, 1, d[1]]).unwrap();
    scaled_dot_product_attention(&q, &k, &v, scale, visible).unwrap()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(x, y)| x == y || (x - y).abs() < 1e-12), "{a:?} {b:?}");
}

#[test]
fn attention_by_hand() {
    // Scores 0.5 * (1*2 + 2*1) = 2 and 0.5 * (1*0 + 2*1) = 1.
    let (out, lse) = attention(&[1.0, 2.0], &[2.0, 1.0, 0.0, 1.0], &[10.0, -4.0], [2, 1], 0.5, &[2]);
    let (a, b) = (2f64.exp(), 1f64.exp());
    close(&out, &[(10.0 * a - 4.0 * b) / (a + b)]);
    close(&lse, &[(a + b).ln()]);
    // One key: its value, and its score.
    let (out, lse) = attention(&[1.0, 2.0], &[2.0, 1.0, 0.0, 1.0], &[10.0, -4.0], [2, 1], 0.5, &[1]);
    close(&out, &[10.0]);
    close(&lse, &[2.0]);
    // Scale 0: the mean.
    let (out, lse) = attention(&[1.0], &[1.0, 5.0, 9.0, 4.0], &[1.0, 2.0, 3.0, 6.0], [1, 1], 0.0, &[4]);
    close(&out, &[3.0]);
    close(&lse, &[4f64.ln()]);
}

#[test]
fn rows_without_keys_and_keys_not_seen() {
    let nan = f32::NAN;
    let (out, lse) = attention(&[1.0, 1.0], &[3.0, nan], &[7.0, nan], [1, 1], 1.0, &[0, 1]);
    close(&out, &[0.0, 7.0]);
    close(&lse, &[f64::INFINITY, 3.0]);
}

#[test]
fn heads_share_keys_in_order() {
    // h_q 4, h_kv 2: heads 0 and 1 read KV head 0, heads 2 and 3 KV head 1.
    let q = TensorView::from_slice("q", &[0f32; 4], &[1, 4, 1]).unwrap();
    let k = TensorView::from_slice("k", &[0f32; 4], &[2, 2, 1]).unwrap();
    let v = [1f32, 100.0, 3.0, 300.0];
    let v = TensorView::from_slice("v", &v, &[2, 2, 1]).unwrap();
    let (out, lse) = scaled_dot_product_attention(&q, &k, &v, 1.0, &[2]).unwrap();
    close(&out, &[2.0, 2.0, 200.0, 200.0]);
    close(&lse, &[2f64.ln(); 4]);
}

#[test]
fn attention_refuses() {
    let data = [0f32; 64];
    let view = |shape: &[usize]| TensorView::from_slice("t", &data, shape).unwrap();
    let (q, k, v) = (view(&[2, 4, 3]), view(&[5, 2, 3]), view(&[5, 2, 2]));
    let run = |q, k, v, scale, visible: &[usize]| scaled_dot_product_attention(&q, &k, &v, scale, visible).unwrap_err();
    let shape = |param, dim, value, limit| MlaError::Shape { param, dim, value, limit };
    assert_eq!(run(view(&[2, 3]), k, v, 1.0, &[5, 5]), MlaError::Rank { param: "q", value: 2, limit: 3 });
    assert_eq!(run(q, view(&[5, 2, 4]), v, 1.0, &[5, 5]), shape("k", 2, 4, 3));
    assert_eq!(run(q, k, view(&[4, 2, 2]), 1.0, &[5, 5]), shape("v", 0, 4, 5));
    assert_eq!(run(q, k, view(&[5, 1, 2]), 1.0, &[5, 5]), shape("v", 1, 1, 2));
    assert_eq!(run(q, k, v, 1.0, &[5]), shape("visible", 0, 1, 2));
    let error = run(view(&[2, 3, 3]), k, v, 1.0, &[5, 5]);
    assert_eq!(error, MlaError::HeadGroups { h_q: 3, h_kv: 2 });
    assert_eq!(run(q, k, v, -1.0, &[5, 5]), MlaError::SoftmaxScale { value: -1.0 });
    let error = run(q, k, v, 1.0, &[5, 6]);
    assert_eq!(error, MlaError::VisibleLength { request: 0, row: 1, value: 6, limit: 5 });
    let integers = [0i32; 64];
    let integers = TensorView::from_slice("q", &integers, &[2, 4, 3]).unwrap();
    let error = scaled_dot_product_attention(&integers, &k, &v, 1.0, &[5, 5]);
    assert!(matches!(error, Err(MlaError::DTypeMismatch { param: "q", .. })), "{error:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Attention over all keys is the merged attention over any cut of them.
    #[test]
    fn merging_undoes_a_cut(
        keys in prop::collection::vec((-60f32..60.0, -2f32..2.0), 1..40),
        cuts in prop::collection::vec(0..40usize, 0..5),
    ) {
        let (k, v): (Vec<f32>, Vec<f32>) = keys.iter().copied().unzip();
        let (out, lse) = attention(&[1.0], &k, &v, [1, 1], 1.0, &[k.len()]);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(k.len())).collect();
        cuts.extend([0, k.len()]);
        cuts.sort_unstable();
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for pair in cuts.windows(2) {
            let (o, l) = attention(&[1.0], &k[pair[0]..pair[1]], &v[pair[0]..pair[1]], [1, 1], 1.0, &[pair[1] - pair[0]]);
            outs.push(o[0] as f32);
            lses.push(l[0] as f32);
        }
        let (merged, merged_lse) = merge_partials(&outs, &lses, outs.len(), 1, 1).unwrap();
        // f32 parts: lse up to 64 has a spacing of 2^-18, which weights each part.
        prop_assert!((f64::from(merged[0]) - out[0]).abs() < 3e-5, "{} {}", merged[0], out[0]);
        prop_assert!((f64::from(merged_lse[0]) - lse[0]).abs() < 1e-5, "{} {}", merged_lse[0], lse[0]);
    }
}
