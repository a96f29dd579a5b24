//! Random batches for timing: normal/10 values, pages in random order.

use fastrand::Rng;
use half::{bf16, f16};
use polymla::{DType, Problem, RepeatedInputs};

use crate::suites::Shape;

/// Bytes of distinct random values; larger tensors repeat them. More than any device's cache holds.
const DISTINCT_BYTES: usize = 128 << 20;

/// Values that tensors of one element type are made of.
pub struct Values {
    dtype: DType,
    words: Vec<u32>,
}

/// A value of mean 0 and standard deviation 1: four uniform ones, close enough to normal for timing and cheap to draw.
fn normal(rng: &mut Rng) -> f32 {
    let bits = rng.u64(..);
    let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xFFFF).sum();
    (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt()
}

impl Values {
    /// Values of `dtype`, the same for the same seed.
    pub fn new(dtype: DType, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let half = |rng: &mut Rng| match dtype {
            DType::F16 => u32::from(f16::from_f32(normal(rng) / 10.0).to_bits()),
            _ => u32::from(bf16::from_f32(normal(rng) / 10.0).to_bits()),
        };
        let word = |_| match dtype {
            DType::F32 => (normal(&mut rng) / 10.0).to_bits(),
            _ => half(&mut rng) | half(&mut rng) << 16,
        };
        Values { dtype, words: (0..DISTINCT_BYTES / 4).map(word).collect() }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

/// Lengths of a ragged batch: around `mean` with a standard deviation of half of it, at least `s_q`, scaled so that the
/// total is 1.0053 x b x mean, which is what the recorded peers were given.
fn ragged(b: usize, mean: usize, s_q: usize, rng: &mut Rng) -> Vec<i32> {
    let (mean, least) = (mean as f64, s_q as f64);
    let drawn: Vec<f64> = (0..b).map(|_| (mean + mean / 2.0 * f64::from(normal(rng))).max(least)).collect();
    let scale = 1.0053 * b as f64 * mean / drawn.iter().sum::<f64>();
    drawn.into_iter().map(|len| (len * scale).max(least) as i32).collect()
}

/// A batch: lengths, pages, and the problem they make.
pub struct Batch {
    pub problem: Problem,
    pub cache_seqlens: Vec<i32>,
    block_table: Vec<i32>,
}

impl Batch {
    /// The batch of a shape, the same for the same seed.
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
        Ok(Batch { cache_seqlens, block_table, problem })
    }

    /// What a backend makes its tensors of.
    pub fn inputs<'a>(&'a self, values: &'a Values) -> RepeatedInputs<'a> {
        let bytes: &[u8] = bytemuck::cast_slice(&values.words);
        // q starts elsewhere than k_cache, so that no query row equals a key.
        let (q, k_cache) = (&bytes[bytes.len() / 2 + 64..], bytes);
        RepeatedInputs { q, k_cache, block_table: &self.block_table, cache_seqlens: &self.cache_seqlens }
    }
}
