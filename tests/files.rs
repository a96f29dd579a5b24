//! The golden format: what it admits, and that every malformed file is refused by name.

use std::collections::HashMap;
use std::path::PathBuf;

use polymla::conformance::{FileReason, Layout, PoisonedOutputs, check, golden, open_all};
use polymla::{DType, KvCache, Mask, MlaError, Query};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};

type Tensors = Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>;
type Metadata = Vec<(&'static str, &'static str)>;

const B: usize = 2;
const S_Q: usize = 1;
const H_Q: usize = 4;
const D_K: usize = 24;
const D_V: usize = 16;

fn floats(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| ((i * 7 % 13) as f32 / 8.0 - 0.7).to_le_bytes()).collect()
}

fn integers(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn tensors() -> Tensors {
    vec![
        ("q", Dtype::F32, vec![B, S_Q, H_Q, D_K], floats(B * S_Q * H_Q * D_K)),
        ("k_cache", Dtype::F32, vec![3, 16, 2, D_K], floats(3 * 16 * 2 * D_K)),
        ("block_table", Dtype::I32, vec![B, 2], integers(&[2, 0, 1, -1])),
        ("cache_seqlens", Dtype::I32, vec![B], integers(&[30, 5])),
    ]
}

fn metadata() -> Metadata {
    vec![("kind", "dense_decode"), ("head_dim_v", "16")]
}

fn bytes(tensors: &Tensors, metadata: &Metadata) -> Vec<u8> {
    let views = tensors.iter().map(|(n, d, s, b)| (*n, TensorView::new(*d, s.clone(), b).unwrap()));
    let metadata: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    serialize(views, Some(metadata)).unwrap()
}

fn load(tensors: &Tensors, metadata: &Metadata) -> Result<polymla::conformance::Call, FileReason> {
    golden::parse("test".into(), &bytes(tensors, metadata))
}

/// The refusal after replacing a tensor, or removing it.
fn spoiled(name: &str, with: Option<(&'static str, Dtype, Vec<usize>, Vec<u8>)>) -> FileReason {
    let mut all = tensors();
    all.retain(|t| t.0 != name);
    all.extend(with);
    load(&all, &metadata()).expect_err("it was accepted")
}

fn told(key: &'static str, value: &'static str) -> Result<polymla::conformance::Call, FileReason> {
    let mut metadata = metadata();
    metadata.retain(|(k, _)| *k != key);
    metadata.push((key, value));
    load(&tensors(), &metadata)
}

#[test]
fn a_file_of_ones_own() {
    let call = load(&tensors(), &metadata()).unwrap();
    let p = &call.problem;
    assert_eq!((p.b(), p.s_q(), p.h_q(), p.h_kv()), (B, S_Q, H_Q, 2));
    assert_eq!((p.head_dim_k(), p.head_dim_v(), p.page_size(), p.num_pages()), (D_K, D_V, 16, 3));
    assert_eq!((p.dtype(), p.mask(), p.max_pages_per_seq()), (DType::F32, Mask::None, 2));
    assert!((p.softmax_scale() - (D_K as f32).powf(-0.5)).abs() < 1e-7);
    assert!(call.expected.is_none());
    assert_eq!(call.cache_seqlens(), [30, 5]);
    let q = call.inputs().unwrap().query;
    assert!(matches!(q, Query::Fused(q) if q.get_f64(&[0, 0, 0, 1]) == Some(f64::from(7f32 / 8.0 - 0.7))));
}

#[test]
fn metadata_is_read() {
    assert_eq!(told("causal", "true").unwrap().problem.mask(), Mask::Causal);
    assert_eq!(told("causal", "True").unwrap().problem.mask(), Mask::Causal);
    assert_eq!(told("softmax_scale", "0.25").unwrap().problem.softmax_scale(), 0.25);
    assert_eq!(told("abs_tol", "0.5").unwrap().tolerance.out_abs, 0.5);
    told("page_block_size", "16").unwrap();
}

#[test]
fn results_are_not_expected_values() {
    let mut all = tensors();
    all.push(("out", Dtype::F32, vec![B, S_Q, H_Q, D_V], floats(B * S_Q * H_Q * D_V)));
    all.push(("lse", Dtype::F32, vec![B, H_Q, S_Q], floats(B * S_Q * H_Q)));
    assert!(load(&all, &metadata()).unwrap().expected.is_none());
}

#[test]
fn expected_values_of_any_type() {
    let mut all = tensors();
    let doubles = |n: usize| (0..n).flat_map(|i| (i as f64 / 3.0).to_le_bytes()).collect();
    all.push(("ref_out", Dtype::F64, vec![B, S_Q, H_Q, D_V], doubles(B * S_Q * H_Q * D_V)));
    all.push(("ref_lse", Dtype::F32, vec![B, H_Q, S_Q], floats(B * S_Q * H_Q)));
    let expected = load(&all, &metadata()).unwrap().expected.unwrap();
    assert_eq!((expected.out[1], expected.out.len()), (1.0 / 3.0, B * S_Q * H_Q * D_V));
    assert_eq!(expected.lse[0], f64::from(-0.7f32));
    for (left, gone) in [(4, "ref_lse"), (5, "ref_out")] {
        let mut half: Tensors = all[..4].to_vec();
        half.push(all[left].clone());
        let reason = load(&half, &metadata()).unwrap_err();
        assert!(matches!(reason, FileReason::MissingTensor { name, .. } if name == gone), "{reason}");
    }
    all[4].2 = vec![B, H_Q, S_Q, D_V];
    let reason = load(&all, &metadata()).unwrap_err();
    assert!(matches!(reason, FileReason::Shape { name: "ref_out", .. }), "{reason}");
    all[4].2 = vec![B, S_Q, H_Q, D_V];
    all[4].1 = Dtype::I64;
    let reason = load(&all, &metadata()).unwrap_err();
    assert!(matches!(reason, FileReason::ElementType { name: "ref_out", value: Dtype::I64, .. }), "{reason}");
}

/// Beside a size of 0 others may be of any size, and no data has to be there for them.
#[test]
fn an_empty_batch_of_huge_sizes() {
    let huge = 1 << 30;
    let tensors = vec![
        ("q", Dtype::F32, vec![0, huge, huge, 1], vec![]),
        ("k_cache", Dtype::F32, vec![0, 1, huge, 1], vec![]),
        ("block_table", Dtype::I32, vec![0, 0], vec![]),
        ("cache_seqlens", Dtype::I32, vec![0], vec![]),
        ("ref_out", Dtype::F64, vec![0, huge, huge, 1], vec![]),
        ("ref_lse", Dtype::F64, vec![0, huge, huge], vec![]),
    ];
    let call = load(&tensors, &vec![("head_dim_v", "1")]).expect("a call of nothing");
    for layout in [Layout::Given, Layout::Fused, Layout::Split] {
        let call = call.with_layout(layout).expect("as empty");
        for backend in open_all().expect("backends") {
            if backend.supports(&call.problem).is_ok() {
                let outcome = check(backend.as_ref(), &call, Layout::Given, polymla::SplitPolicy::default());
                assert!(outcome.passed(), "{}: {}", backend.info().name, outcome.failure());
            }
        }
    }
}

#[test]
fn the_split_layout_and_mixtures() {
    let split_q: Tensors = vec![
        ("q_nope", Dtype::F32, vec![B, S_Q, H_Q, D_V], floats(B * S_Q * H_Q * D_V)),
        ("q_pe", Dtype::F32, vec![B, S_Q, H_Q, 8], floats(B * S_Q * H_Q * 8)),
    ];
    let split_k: Tensors = vec![
        ("ckv", Dtype::F32, vec![3, 16, 2, D_V], floats(3 * 16 * 2 * D_V)),
        ("kpe", Dtype::F32, vec![3, 16, 2, 8], floats(3 * 16 * 2 * 8)),
    ];
    let [q, k, table, lengths] = <[_; 4]>::try_from(tensors()).unwrap();
    for (q, k) in [(split_q.clone(), split_k.clone()), (vec![q.clone()], split_k.clone()), (split_q.clone(), vec![k])] {
        let all: Tensors = [q, k, vec![table.clone(), lengths.clone()]].concat();
        // head_dim_v is told by either part.
        let call = load(&all, &vec![]).unwrap();
        assert_eq!((call.problem.head_dim_k(), call.problem.head_dim_v()), (D_K, D_V));
        let split = all.iter().any(|t| t.0 == "ckv");
        assert_eq!(matches!(call.inputs().unwrap().kv_cache, KvCache::Split { .. }), split);
        let reason = load(&all, &vec![("head_dim_v", "15")]).unwrap_err();
        assert!(matches!(reason, FileReason::Metadata { key: "head_dim_v", .. }), "{reason}");
    }
    // Without rope.
    let all: Tensors = vec![split_q[0].clone(), split_k[0].clone(), table.clone(), lengths.clone()];
    assert_eq!(load(&all, &vec![]).unwrap().problem.rope(), 0);
    // Parts that do not fit each other.
    let mut all: Tensors = [split_q.clone(), split_k, vec![table, lengths]].concat();
    all[1].2 = vec![B, H_Q, S_Q, 8];
    let reason = load(&all, &vec![]).unwrap_err();
    assert!(matches!(reason, FileReason::Shape { name: "q_pe", .. }), "{reason}");
    all.remove(0);
    let reason = load(&all, &vec![]).unwrap_err();
    assert!(matches!(reason, FileReason::MissingTensor { name: "q", .. }), "{reason}");
    all.push(q.clone());
    let reason = load(&all, &vec![]).unwrap_err();
    assert!(matches!(reason, FileReason::Ambiguous { first: "q", second: "q_pe" }), "{reason}");
    all[0] = split_q[0].clone();
    let reason = load(&all, &vec![]).unwrap_err();
    assert!(matches!(reason, FileReason::Ambiguous { first: "q", second: "q_nope" }), "{reason}");
}

#[test]
fn visible_lengths() {
    let mut all = tensors();
    all.push(("visible_lengths", Dtype::I32, vec![B, S_Q], integers(&[7, 5])));
    assert_eq!(load(&all, &metadata()).unwrap().problem.mask(), Mask::VisibleLengths);
    let reason = load(&all, &vec![("head_dim_v", "16"), ("causal", "true")]).unwrap_err();
    assert!(matches!(reason, FileReason::Metadata { key: "causal", .. }), "{reason}");
    all[4].2 = vec![S_Q, B];
    let reason = load(&all, &metadata()).unwrap_err();
    assert!(matches!(reason, FileReason::Call(MlaError::Shape { param: "visible_lengths", .. })), "{reason}");
}

#[test]
fn missing_tensors() {
    for name in ["q", "k_cache", "block_table", "cache_seqlens"] {
        let reason = spoiled(name, None);
        assert!(matches!(reason, FileReason::MissingTensor { name: n, .. } if n == name), "{reason}");
        assert!(reason.to_string().contains(name));
    }
}

#[test]
fn wrong_types() {
    let reason = spoiled("q", Some(("q", Dtype::F64, vec![B, S_Q, H_Q, D_K], vec![0; 8 * B * H_Q * D_K])));
    assert_eq!(reason.to_string(), "tensor q has dtype F64; it must be BF16, F16 or F32");
    let reason = spoiled("cache_seqlens", Some(("cache_seqlens", Dtype::I64, vec![B], vec![0; 8 * B])));
    assert_eq!(reason.to_string(), "tensor cache_seqlens has dtype I64; it must be I32");
    let reason = spoiled("k_cache", Some(("k_cache", Dtype::BF16, vec![3, 16, 2, D_K], vec![0; 2 * 96 * D_K])));
    let error = MlaError::DTypeMismatch { param: "k_cache", value: DType::Bf16, limit: DType::F32 };
    assert!(matches!(&reason, FileReason::Call(e) if *e == error), "{reason}");
}

#[test]
fn wrong_shapes() {
    let reason = spoiled("q", Some(("q", Dtype::F32, vec![B, H_Q, D_K], floats(B * H_Q * D_K))));
    assert!(matches!(reason, FileReason::Rank { name: "q", value: 3, limit: 4 }), "{reason}");
    let reason = spoiled("block_table", Some(("block_table", Dtype::I32, vec![B * 2], integers(&[0; 4]))));
    assert!(matches!(reason, FileReason::Rank { name: "block_table", value: 1, limit: 2 }), "{reason}");
    let reason = spoiled("block_table", Some(("block_table", Dtype::I32, vec![3, 2], integers(&[0; 6]))));
    assert!(matches!(reason, FileReason::Call(MlaError::Shape { param: "block_table", .. })), "{reason}");
    let reason = spoiled("k_cache", Some(("k_cache", Dtype::F32, vec![3, 16, 2, 23], floats(96 * 23))));
    assert!(matches!(reason, FileReason::Call(MlaError::Shape { param: "k_cache", dim: 3, .. })), "{reason}");
    let reason = spoiled("k_cache", Some(("k_cache", Dtype::F32, vec![3, 0, 2, D_K], vec![])));
    assert!(matches!(reason, FileReason::Call(MlaError::ZeroSize { param: "page_size" })), "{reason}");
    let reason = spoiled("k_cache", Some(("k_cache", Dtype::F32, vec![2, 16, 3, D_K], floats(96 * D_K))));
    assert!(matches!(reason, FileReason::Call(MlaError::HeadGroups { h_q: 4, h_kv: 3 })), "{reason}");
}

#[test]
fn wrong_metadata() {
    for (key, value) in [
        ("head_dim_v", "sixteen"),
        ("head_dim_v", "-1"),
        ("softmax_scale", "big"),
        ("page_block_size", "64"),
        ("page_block_size", "1.5"),
        ("causal", "maybe"),
        ("abs_tol", "-1"),
        ("abs_tol", "NaN"),
    ] {
        let reason = told(key, value).unwrap_err();
        assert!(matches!(reason, FileReason::Metadata { key: k, .. } if k == key), "{reason}");
        assert!(reason.to_string().contains(value), "{reason}");
    }
    assert!(matches!(told("kind", "sparse_decode"), Err(FileReason::Kind { .. })));
    assert!(matches!(told("softmax_scale", "inf"), Err(FileReason::Call(MlaError::SoftmaxScale { .. }))));
    assert!(matches!(told("head_dim_v", "25"), Err(FileReason::Call(MlaError::HeadDimV { .. }))));
    assert!(matches!(told("head_dim_v", "0"), Err(FileReason::Call(MlaError::ZeroSize { .. }))));
    let reason = load(&tensors(), &vec![]).unwrap_err();
    assert!(matches!(reason, FileReason::Metadata { key: "head_dim_v", .. }), "{reason}");
}

#[test]
fn not_safetensors() {
    for junk in [&b""[..], b"{}", b"not a safetensors file, surely", &[0xFF; 64]] {
        let reason = golden::parse("junk".into(), junk).unwrap_err();
        assert!(matches!(reason, FileReason::Format(_)), "{reason}");
    }
    // Cut off anywhere.
    let whole = bytes(&tensors(), &metadata());
    for n in (0..whole.len()).step_by(97) {
        assert!(matches!(golden::parse("cut".into(), &whole[..n]), Err(FileReason::Format(_))));
    }
    // One bit wrong anywhere in the header: an error or another call, never a panic.
    for at in 0..800 {
        for bit in 0..8 {
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            if let Ok(call) = golden::parse("bit".into(), &changed) {
                call.inputs().unwrap().validate(&call.problem, polymla::Device::Host).unwrap();
            }
        }
    }
}

#[test]
fn data_at_any_address() {
    // Writers need not align the data: lengthen the header by a space or more.
    let whole = bytes(&tensors(), &metadata());
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let aligned = golden::parse("aligned".into(), &whole).unwrap();
    for spaces in 1..8 {
        let mut file = (length + spaces as u64).to_le_bytes().to_vec();
        file.extend_from_slice(&whole[8..8 + length as usize]);
        file.extend(std::iter::repeat_n(b' ', spaces));
        file.extend_from_slice(&whole[8 + length as usize..]);
        let call = golden::parse("moved".into(), &file).unwrap();
        for (name, tensor) in &aligned.tensors {
            assert_eq!(call.tensor(name).unwrap().bytes(), tensor.bytes());
        }
    }
}

fn scratch(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("files-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn written_and_read_again() {
    let dir = scratch("written");
    let call = load(&tensors(), &metadata()).unwrap().with_layout(Layout::Split).unwrap();
    for backend in open_all().unwrap().iter().filter(|b| b.supports(&call.problem).is_ok()) {
        let mut results = call.poisoned_outputs().unwrap();
        let mut outputs = results.outputs().unwrap();
        backend.decode(&call.problem, &Default::default(), &call.inputs().unwrap(), &mut outputs).unwrap();
        let path = dir.join("out.safetensors");
        golden::save(&path, &call, &results).unwrap();
        let written = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&written).unwrap();
        let out = file.tensor("out").unwrap();
        assert_eq!((out.dtype(), out.shape()), (Dtype::F32, &[B, S_Q, H_Q, D_V][..]));
        assert_eq!(out.data(), results.out.to_dense_bytes());
        assert_eq!(file.tensor("lse").unwrap().data(), results.lse.to_dense_bytes());
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn paths_are_named() {
    let dir = scratch("paths");
    let error = golden::load(dir.join("none.safetensors")).unwrap_err();
    assert!(error.to_string().contains("none.safetensors") && matches!(error.reason, FileReason::Io(_)));
    assert!(golden::list(dir.join("nowhere")).unwrap_err().to_string().contains("nowhere"));
    let call = load(&tensors(), &metadata()).unwrap();
    let results = PoisonedOutputs::dense(&call.problem).unwrap();
    let error = golden::save(dir.join("no/such/dir.safetensors"), &call, &results).unwrap_err();
    assert!(error.to_string().contains("no/such/dir.safetensors"), "{error}");
    for name in ["b.safetensors", "a.safetensors", "c.txt"] {
        std::fs::write(dir.join(name), bytes(&tensors(), &metadata())).unwrap();
    }
    let list = golden::list(&dir).unwrap();
    assert_eq!(list, [dir.join("a.safetensors"), dir.join("b.safetensors")]);
    assert_eq!(golden::list(&list[1]).unwrap(), [dir.join("b.safetensors")]);
    assert_eq!(golden::load(&list[0]).unwrap().name, "a");
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_call_without_expected_values_does_not_pass() {
    let call = load(&tensors(), &metadata()).unwrap();
    for backend in open_all().unwrap() {
        let outcome = check(backend.as_ref(), &call, Layout::Fused, Default::default());
        assert!(!outcome.passed());
        assert_eq!(outcome.failure(), "the call has no expected values");
    }
}
