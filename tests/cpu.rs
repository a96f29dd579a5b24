//! The CPU backend against the f64 reference: every instruction set of this machine, any number of threads.

use std::sync::Arc;

use half::{bf16, f16};
use polymla::cpu::{CpuBackend, Isa};
use polymla::{
    DType, Element, HostWorkspace, Inputs, KvCache, Mask, MlaBackend, MlaError, Outputs, Problem, Query,
    ScheduleOptions, SplitPolicy, TensorView, TensorViewMut, reference,
};

/// splitmix64: enough for test data, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Uniform in -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

trait Number: Element {
    fn of(x: f32) -> Self;
}
impl Number for f32 {
    fn of(x: f32) -> f32 {
        x
    }
}
impl Number for bf16 {
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
}
impl Number for f16 {
    fn of(x: f32) -> f16 {
        f16::from_f32(x)
    }
}

/// What a case is made from.
#[derive(Clone, Debug)]
struct Case {
    lengths: Vec<i32>,
    s_q: usize,
    h_q: usize,
    h_kv: usize,
    head_dim_k: usize,
    head_dim_v: usize,
    page_size: usize,
    mask: Mask,
    split: bool,
    /// Standard deviation of the logits, more or less.
    spread: f32,
    policy: SplitPolicy,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            lengths: vec![200, 0, 1, 65, 640],
            s_q: 1,
            h_q: 16,
            h_kv: 1,
            head_dim_k: 576,
            head_dim_v: 512,
            page_size: 64,
            mask: Mask::None,
            split: false,
            spread: 2.0,
            policy: SplitPolicy::default(),
        }
    }
}

/// A case's tensors. Every token past its length, page without owner and unused table entry is poisoned.
struct Data<T> {
    problem: Problem,
    case: Case,
    q: Vec<T>,
    k: Vec<T>,
    table: Vec<i32>,
    visible: Vec<i32>,
}

impl<T: Number> Data<T> {
    fn new(case: &Case, seed: u64) -> Self {
        let mut r = Random(seed);
        let c = case;
        let used = |len: i32| (len as usize).div_ceil(c.page_size);
        let columns = c.lengths.iter().map(|l| used(*l)).max().unwrap_or(0) + 2;
        let mut pages: Vec<i32> = (0..c.lengths.iter().map(|l| used(*l)).sum::<usize>() as i32 + 3).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, r.below(i + 1));
        }
        let problem = Problem::builder(c.lengths.len())
            .s_q(c.s_q)
            .h_q(c.h_q)
            .h_kv(c.h_kv)
            .head_dim_k(c.head_dim_k)
            .head_dim_v(c.head_dim_v)
            .page_size(c.page_size)
            .num_pages(pages.len())
            .max_pages_per_seq(columns)
            .mask(c.mask)
            .dtype(T::DTYPE)
            .build()
            .unwrap();
        let q: Vec<T> = (0..c.lengths.len() * c.s_q * c.h_q * c.head_dim_k).map(|_| T::of(1.7 * r.unit())).collect();
        let token = c.h_kv * c.head_dim_k;
        let mut k = vec![T::of(f32::NAN); pages.len() * c.page_size * token];
        let mut table = vec![2_147_480_000; c.lengths.len() * columns];
        let mut next = pages.iter();
        for (i, len) in c.lengths.iter().enumerate() {
            for p in 0..used(*len) {
                let page = *next.next().unwrap();
                table[i * columns + p] = page;
                for slot in 0..c.page_size.min(*len as usize - p * c.page_size) {
                    let at = (page as usize * c.page_size + slot) * token;
                    k[at..at + token].fill_with(|| T::of(1.7 * c.spread * r.unit()));
                }
            }
        }
        let visible = (0..c.lengths.len() * c.s_q).map(|n| r.below(c.lengths[n / c.s_q] as usize + 1) as i32).collect();
        Data { problem, case: case.clone(), q, k, table, visible }
    }

    /// The fused tensors, or views of their two parts: parts of a fused tensor have the strides of the whole.
    fn inputs(&self) -> Inputs<'_> {
        let p = &self.problem;
        let parts =
            |name: &'static str, data: &'_ [T], shape: [usize; 3]| -> (TensorView<'_>, Option<TensorView<'_>>) {
                let (d_k, d_v) = (p.head_dim_k(), p.head_dim_v());
                let strides = [shape[1] * shape[2] * d_k, shape[2] * d_k, d_k, 1];
                let part = |data, columns| {
                    let shape = [shape[0], shape[1], shape[2], columns];
                    // SAFETY: the slices outlive the views: both borrow `self`.
                    unsafe {
                        std::mem::transmute::<TensorView<'_>, TensorView<'_>>(
                            TensorView::from_slice_strided::<T>(name, data, &shape, &strides).unwrap(),
                        )
                    }
                };
                if !self.case.split {
                    return (part(data, d_k), None);
                }
                (part(data, d_v), (d_k > d_v).then(|| part(&data[d_v.min(data.len())..], d_k - d_v)))
            };
        let (q, q_pe) = parts("q", &self.q, [p.b(), p.s_q(), p.h_q()]);
        let (k, kpe) = parts("k", &self.k, [p.num_pages(), p.page_size(), p.h_kv()]);
        let split = self.case.split;
        Inputs {
            query: if split { Query::Split { q_nope: q, q_pe } } else { Query::Fused(q) },
            kv_cache: if split { KvCache::Split { ckv: k, kpe } } else { KvCache::Fused(k) },
            block_table: TensorView::from_slice("block_table", &self.table, &[p.b(), p.max_pages_per_seq()]).unwrap(),
            cache_seqlens: TensorView::from_slice("cache_seqlens", &self.case.lengths, &[p.b()]).unwrap(),
            visible_lengths: (p.mask() == Mask::VisibleLengths)
                .then(|| TensorView::from_slice("visible_lengths", &self.visible, &[p.b(), p.s_q()]).unwrap()),
        }
    }

    /// Runs on `backend`; `out` has 3 elements between its own, and more between rows, poisoned before and checked
    /// after. Returns out and lse, dense.
    fn run(&self, backend: &CpuBackend) -> (Vec<T>, Vec<f32>) {
        let p = &self.problem;
        let shape = [p.b(), p.s_q(), p.h_q(), p.head_dim_v()];
        let mut strides = [4; 4];
        for d in (0..3).rev() {
            strides[d] = strides[d + 1] * shape[d + 1] + 3;
        }
        let poison = T::of(-777.0);
        let size = shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum::<usize>() + 1;
        let mut out = vec![poison; size];
        let mut lse = vec![f32::NAN; p.b() * p.h_q() * p.s_q()];
        let inputs = self.inputs();
        let options = ScheduleOptions { policy: self.case.policy, ..Default::default() };
        let schedule = backend.schedule(p, &options, &inputs, ()).unwrap();
        let mut memory = HostWorkspace::new();
        let mut workspace = memory.lend(backend.workspace_bytes(p, &schedule));
        // What is in the workspace must not matter.
        workspace.host(workspace.bytes()).unwrap().fill(0xff);
        let mut outputs = Outputs {
            out: TensorViewMut::from_slice_strided("out", &mut out, &shape, &strides).unwrap(),
            lse: TensorViewMut::from_slice("lse", &mut lse, &[p.b(), p.h_q(), p.s_q()]).unwrap(),
        };
        backend.run(p, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap();
        let mut dense = Vec::new();
        for row in 0..p.rows() {
            let (h, j, i) = (row % p.h_q(), row / p.h_q() % p.s_q(), row / p.h_q() / p.s_q());
            let at = i * strides[0] + j * strides[1] + h * strides[2];
            for c in 0..p.head_dim_v() {
                dense.push(std::mem::replace(&mut out[at + 4 * c], poison));
            }
        }
        let untouched = |x: &T| bytemuck::bytes_of(x) == bytemuck::bytes_of(&poison);
        assert!(out.iter().all(untouched), "wrote between the rows of {:?}", self.case);
        (dense, lse)
    }
}

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
    let mut data = Data::<f32>::new(&Case::default(), 6);
    let p = Problem::builder(5).h_q(16).dtype(DType::F32).softmax_scale(0.0);
    let pages = (data.problem.num_pages(), data.problem.max_pages_per_seq());
    data.problem = p.num_pages(pages.0).max_pages_per_seq(pages.1).build().unwrap();
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
