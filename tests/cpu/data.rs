//! Test data: problems with every trap of the contract, and runs of a backend over them.

use half::{bf16, f16};
use polymla::cpu::CpuBackend;
use polymla::{
    Element, HostWorkspace, Inputs, KvCache, Mask, MlaBackend, Outputs, Problem, Query, ScheduleOptions, SplitPolicy,
    TensorView, TensorViewMut,
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

pub trait Number: Element {
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
pub struct Case {
    pub lengths: Vec<i32>,
    pub s_q: usize,
    pub h_q: usize,
    pub h_kv: usize,
    pub head_dim_k: usize,
    pub head_dim_v: usize,
    pub page_size: usize,
    pub mask: Mask,
    pub split: bool,
    /// Standard deviation of the logits, more or less.
    pub spread: f32,
    pub policy: SplitPolicy,
    /// None: the default.
    pub scale: Option<f32>,
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
            scale: None,
        }
    }
}

/// A case's tensors. Every token past its length, page without owner and unused table entry is poisoned.
pub struct Data<T> {
    pub problem: Problem,
    pub case: Case,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub table: Vec<i32>,
    pub visible: Vec<i32>,
}

impl<T: Number> Data<T> {
    pub fn new(case: &Case, seed: u64) -> Self {
        let mut r = Random(seed);
        let c = case;
        let used = |len: i32| (len as usize).div_ceil(c.page_size);
        let columns = c.lengths.iter().map(|l| used(*l)).max().unwrap_or(0) + 2;
        let mut pages: Vec<i32> = (0..c.lengths.iter().map(|l| used(*l)).sum::<usize>() as i32 + 3).collect();
        for i in (1..pages.len()).rev() {
            pages.swap(i, r.below(i + 1));
        }
        let mut builder = Problem::builder(c.lengths.len())
            .s_q(c.s_q)
            .h_q(c.h_q)
            .h_kv(c.h_kv)
            .head_dim_k(c.head_dim_k)
            .head_dim_v(c.head_dim_v)
            .page_size(c.page_size)
            .num_pages(pages.len())
            .max_pages_per_seq(columns)
            .mask(c.mask)
            .dtype(T::DTYPE);
        if let Some(scale) = c.scale {
            builder = builder.softmax_scale(scale);
        }
        let problem = builder.build().unwrap();
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
    pub fn inputs(&self) -> Inputs<'_> {
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
    pub fn run(&self, backend: &CpuBackend) -> (Vec<T>, Vec<f32>) {
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
