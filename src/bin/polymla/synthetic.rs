//! Random tensors for timing: normal/10 values, pages in random order.

use fastrand::Rng;
use half::{bf16, f16};
use polymla::{DType, Inputs, KvCache, Outputs, Problem, Query, TensorView, TensorViewMut};

use crate::suites::Shape;

/// Distinct random values; larger tensors repeat them, since drawing gigabytes would take longer than the benchmark.
const DISTINCT: usize = 8 << 20;

/// Tensors of one problem.
pub struct Synthetic {
    pub problem: Problem,
    pub cache_seqlens: Vec<i32>,
    q: Vec<u32>,
    k_cache: Vec<u32>,
    block_table: Vec<i32>,
    out: Vec<u32>,
    lse: Vec<f32>,
}

/// A value of mean 0 and standard deviation 1: four uniform ones, close enough to normal for timing and cheap to draw.
fn normal(rng: &mut Rng) -> f32 {
    let sum: f32 = (0..4).map(|_| rng.f32() - 0.5).sum();
    sum * 3.0f32.sqrt()
}

/// Lengths of a ragged batch: around `mean` with a standard deviation of half of it, at least `s_q`, scaled so that the
/// total is 1.0053 x b x mean, which is what the recorded peers were given.
fn ragged(b: usize, mean: usize, s_q: usize, rng: &mut Rng) -> Vec<i32> {
    let (mean, least) = (mean as f64, s_q as f64);
    let drawn: Vec<f64> = (0..b).map(|_| (mean + mean / 2.0 * f64::from(normal(rng))).max(least)).collect();
    let scale = 1.0053 * b as f64 * mean / drawn.iter().sum::<f64>();
    drawn.into_iter().map(|len| (len * scale).max(least) as i32).collect()
}

/// `elements` random values of `dtype`, packed in words so that every type is aligned.
fn values(elements: usize, dtype: DType, rng: &mut Rng) -> Vec<u32> {
    let per_word = 4 / dtype.size();
    let words = elements.div_ceil(per_word);
    let mut data = Vec::with_capacity(words);
    let half = |rng: &mut Rng| match dtype {
        DType::F16 => u32::from(f16::from_f32(normal(rng) / 10.0).to_bits()),
        _ => u32::from(bf16::from_f32(normal(rng) / 10.0).to_bits()),
    };
    for _ in 0..words.min(DISTINCT) {
        data.push(match per_word {
            1 => (normal(rng) / 10.0).to_bits(),
            _ => half(rng) | half(rng) << 16,
        });
    }
    while data.len() < words {
        let more = (words - data.len()).min(data.len());
        data.extend_from_within(..more);
    }
    data
}

impl Synthetic {
    /// Tensors for a shape, the same for the same seed.
    pub fn new(shape: &Shape, seed: u64) -> polymla::Result<Self> {
        let mut rng = Rng::with_seed(seed);
        let cache_seqlens = match shape.varlen {
            true => ragged(shape.b, shape.s_k, shape.s_q, &mut rng),
            false => vec![shape.s_k as i32; shape.b],
        };
        let problem = shape.problem(&cache_seqlens)?;
        let p = &problem;
        let mut pages: Vec<i32> = (0..p.num_pages() as i32).collect();
        rng.shuffle(&mut pages);
        let mut pages = pages.into_iter();
        let mut block_table = vec![-1; p.b() * p.max_pages_per_seq()];
        for (row, len) in block_table.chunks_mut(p.max_pages_per_seq().max(1)).zip(&cache_seqlens) {
            let used = (*len as usize).div_ceil(p.page_size());
            row.iter_mut().take(used).zip(&mut pages).for_each(|(entry, page)| *entry = page);
        }
        let tokens = p.num_pages() * p.page_size() * p.h_kv();
        Ok(Synthetic {
            q: values(p.rows() * p.head_dim_k(), p.dtype(), &mut rng),
            k_cache: values(tokens * p.head_dim_k(), p.dtype(), &mut rng),
            out: vec![u32::MAX; (p.rows() * p.head_dim_v() * p.dtype().size()).div_ceil(4)],
            lse: vec![f32::NAN; p.rows()],
            cache_seqlens,
            block_table,
            problem,
        })
    }

    /// The tensors as arguments of a call.
    pub fn call(&mut self) -> polymla::Result<(&Problem, Inputs<'_>, Outputs<'_>)> {
        let p = &self.problem;
        let q_shape = [p.b(), p.s_q(), p.h_q(), p.head_dim_k()];
        let k_shape = [p.num_pages(), p.page_size(), p.h_kv(), p.head_dim_k()];
        let out_shape = [p.b(), p.s_q(), p.h_q(), p.head_dim_v()];
        let inputs = Inputs {
            query: Query::Fused(typed("q", &self.q, p.dtype(), &q_shape)?),
            kv_cache: KvCache::Fused(typed("k_cache", &self.k_cache, p.dtype(), &k_shape)?),
            block_table: TensorView::from_slice("block_table", &self.block_table, &[p.b(), p.max_pages_per_seq()])?,
            cache_seqlens: TensorView::from_slice("cache_seqlens", &self.cache_seqlens, &[p.b()])?,
            visible_lengths: None,
        };
        let out = match p.dtype() {
            DType::Bf16 => {
                TensorViewMut::from_slice("out", bytemuck::cast_slice_mut::<_, bf16>(&mut self.out), &out_shape)
            }
            DType::F16 => {
                TensorViewMut::from_slice("out", bytemuck::cast_slice_mut::<_, f16>(&mut self.out), &out_shape)
            }
            _ => TensorViewMut::from_slice("out", bytemuck::cast_slice_mut::<_, f32>(&mut self.out), &out_shape),
        }?;
        let lse = TensorViewMut::from_slice("lse", &mut self.lse, &[p.b(), p.h_q(), p.s_q()])?;
        Ok((p, inputs, Outputs { out, lse }))
    }
}

fn typed<'a>(param: &'static str, words: &'a [u32], dtype: DType, shape: &[usize]) -> polymla::Result<TensorView<'a>> {
    match dtype {
        DType::Bf16 => TensorView::from_slice(param, bytemuck::cast_slice::<_, bf16>(words), shape),
        DType::F16 => TensorView::from_slice(param, bytemuck::cast_slice::<_, f16>(words), shape),
        _ => TensorView::from_slice(param, bytemuck::cast_slice::<_, f32>(words), shape),
    }
}
