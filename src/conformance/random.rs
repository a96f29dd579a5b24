//! Random problems from a seed, with everything in them that a kernel is likely to get wrong.
//!
//! Traps: NaN behind the end of every sequence and in pages that no request owns, table entries nobody uses that name
//! no page, requests of length 0 and shorter than s_q, pages shared between requests, strides of every kind with NaN
//! between rows, and tensors that begin off any boundary but their elements'. Scores are nearly uniform, peaked, or
//! drift along the sequence so that the running maximum rises or falls.

use fastrand::Rng;

use super::allowance::{Scores, expected};
use super::call::{Call, nan};
use super::tensor::HostTensor;
use crate::error::Result;
use crate::problem::{Mask, Problem};
use crate::schedule::{ScheduleOptions, SplitPolicy};
use crate::tensor::DType;

/// What random problems may look like.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Most requests; 0 is always among them.
    pub max_b: usize,
    /// Most query tokens.
    pub max_s_q: usize,
    /// Most query heads to a KV head.
    pub max_heads_per_kv: usize,
    /// Most KV heads.
    pub max_h_kv: usize,
    /// (head_dim_k, head_dim_v) to choose from; where empty, any up to `max_head_dim`.
    pub head_dims: Vec<(usize, usize)>,
    /// Largest head_dim_k where `head_dims` is empty.
    pub max_head_dim: usize,
    /// Page sizes to choose from.
    pub page_sizes: Vec<usize>,
    /// Longest sequence.
    pub max_tokens: usize,
    /// Element types to choose from.
    pub dtypes: Vec<DType>,
    /// Most multiply-adds of a call, which bounds the time of the f64 reference.
    pub max_work: usize,
    /// Input strides are multiples of this many elements (where the dimension is longer than 1).
    pub stride_multiple: usize,
    /// Whether the elements of a row of `out` may be apart.
    pub out_inner_stride: bool,
}

impl Limits {
    /// Small problems of every kind that the contract admits.
    pub fn any() -> Self {
        Limits {
            max_b: 5,
            max_s_q: 4,
            max_heads_per_kv: 40,
            max_h_kv: 3,
            head_dims: Vec::new(),
            max_head_dim: 160,
            page_sizes: vec![1, 2, 7, 16, 48, 64, 100, 128],
            max_tokens: 700,
            dtypes: vec![DType::Bf16, DType::F16, DType::F32],
            max_work: 3_000_000,
            stride_multiple: 1,
            out_inner_stride: true,
        }
    }

    /// DeepSeek's head sizes, with and without rope, for kernels tuned for them: half types, strides of 16 bytes as
    /// bulk copies need.
    pub fn deepseek() -> Self {
        Limits {
            max_b: 6,
            max_s_q: 4,
            max_heads_per_kv: 128,
            max_h_kv: 2,
            head_dims: vec![(576, 512), (512, 512)],
            max_head_dim: 576,
            page_sizes: vec![1, 2, 7, 16, 32, 48, 64, 128, 256],
            max_tokens: 5000,
            dtypes: vec![DType::Bf16, DType::F16],
            max_work: 150_000_000,
            stride_multiple: 8,
            out_inner_stride: true,
        }
    }
}

/// The problem that `seed` makes, with expected values from [`crate::reference::decode`]. The same seed and limits make
/// the same problem every time.
///
/// # Errors
/// Those of [`Problem::builder`] and the reference, for limits that make no valid problem.
pub fn random_call(seed: u64, limits: &Limits) -> Result<Call> {
    let rng = &mut Rng::with_seed(seed);
    let s_q = rng.usize(1..=limits.max_s_q);
    let h_kv = if rng.bool() { 1 } else { rng.usize(1..=limits.max_h_kv) };
    let h_q = h_kv * rng.usize(1..=(limits.max_heads_per_kv / h_kv).max(1));
    let (d_k, d_v) = match limits.head_dims.len() {
        0 => {
            let d_k = rng.usize(1..=limits.max_head_dim);
            (d_k, if rng.u8(0..4) == 0 { d_k } else { rng.usize(1..=d_k) })
        }
        n => limits.head_dims[rng.usize(..n)],
    };
    let b = rng.usize(0..=limits.max_b);
    let page_size = limits.page_sizes[rng.usize(..limits.page_sizes.len())];
    let dtype = limits.dtypes[rng.usize(..limits.dtypes.len())];
    let budget = limits.max_work / (s_q * h_q * (d_k + d_v)) / b.max(1);
    let longest = budget.clamp(1, limits.max_tokens);
    let lengths: Vec<usize> = (0..b).map(|_| length(rng, longest, page_size, s_q)).collect();
    let tables = Tables::new(rng, &lengths, page_size);

    let mask = [Mask::None, Mask::Causal, Mask::VisibleLengths][rng.usize(..3)];
    let mut builder = Problem::builder(b)
        .s_q(s_q)
        .h_q(h_q)
        .h_kv(h_kv)
        .head_dim_k(d_k)
        .head_dim_v(d_v)
        .num_pages(tables.num_pages)
        .page_size(page_size)
        .max_pages_per_seq(tables.columns)
        .dtype(dtype)
        .mask(mask);
    match rng.u8(0..10) {
        0 => builder = builder.softmax_scale(0.0),
        1..4 => builder = builder.softmax_scale((rng.f32() * 4.0 - 4.0).exp()),
        _ => {}
    }
    let problem = builder.build()?;

    let scores = Scores::random(rng, &problem);
    let q = scores.query(rng, &problem);
    let k = cache(rng, &problem, &scores, &tables, &lengths);
    let mut tensors = Vec::new();
    let multiple = limits.stride_multiple;
    let mut place = |rng: &mut Rng, values: &[f32], shape: [usize; 4], names: [&'static str; 3]| -> Result<()> {
        let parts = [(names[0], 0..d_k)];
        let split = [(names[1], 0..d_v), (names[2], d_v..d_k)];
        for (name, columns) in if rng.bool() { &parts[..] } else { &split[..] } {
            // Without rope its tensor may be absent or empty.
            if !columns.is_empty() || rng.bool() {
                tensors.push((*name, strided(rng, name, dtype, values, shape, columns.clone(), multiple)?));
            }
        }
        Ok(())
    };
    place(rng, &q, [b, s_q, h_q, d_k], ["q", "q_nope", "q_pe"])?;
    place(rng, &k, [tables.num_pages, page_size, h_kv, d_k], ["k_cache", "ckv", "kpe"])?;
    tensors.push(("block_table", tables.tensor(rng)?));
    let lengths: Vec<i32> = lengths.into_iter().map(|n| n as i32).collect();
    tensors.push(("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[b], &lengths)?));
    if mask == Mask::VisibleLengths {
        let rows = lengths.iter().flat_map(|n| std::iter::repeat_n(*n, s_q));
        let visible: Vec<i32> = rows.map(|n| if rng.u8(0..5) == 0 { n } else { rng.i32(0..=n) }).collect();
        tensors.push(("visible_lengths", HostTensor::from_i32("visible_lengths", &[b, s_q], &visible)?));
    }
    let output_strides = Some((
        output_strides(rng, [b, s_q, h_q, d_v], limits.out_inner_stride),
        output_strides(rng, [b, h_q, s_q], true),
    ));
    let name = format!("seed {seed}: {problem}, {scores}");
    let mut call = Call { name, problem, tensors, output_strides, expected: None, tolerance: Default::default() };
    expected(&mut call, &q, &k)?;
    Ok(call)
}

/// Random options of a schedule: few and many parts, any overhead, small fixed splits.
pub fn random_options(seed: u64) -> ScheduleOptions {
    let rng = &mut Rng::with_seed(seed);
    ScheduleOptions {
        num_sm_parts: rng.bool().then(|| if rng.bool() { rng.usize(1..=4) } else { rng.usize(1..=150) }),
        policy: match rng.u8(0..4) {
            0 => SplitPolicy::default(),
            1 => SplitPolicy::Balanced { overhead_blocks: rng.u32(0..=10) },
            2 => SplitPolicy::BATCH_INVARIANT,
            _ => SplitPolicy::BatchInvariant { split_blocks: rng.u32(1..=8) },
        },
    }
}

/// Lengths at the edges more often than chance would have them.
fn length(rng: &mut Rng, longest: usize, page_size: usize, s_q: usize) -> usize {
    let edge = if rng.bool() { page_size } else { 64 };
    let near = rng.usize(0..=longest) / edge * edge;
    let n = match rng.u8(0..8) {
        0 => 0,
        1 => rng.usize(0..=s_q),
        2 => near,
        3 => near + 1,
        4 => near.saturating_sub(1),
        5 => longest,
        _ => rng.usize(0..=longest),
    };
    n.min(longest)
}

/// Which pages each request has.
struct Tables {
    num_pages: usize,
    columns: usize,
    /// The used entries of each request.
    pages: Vec<Vec<usize>>,
}

impl Tables {
    fn new(rng: &mut Rng, lengths: &[usize], page_size: usize) -> Self {
        let used = |n: &usize| n.div_ceil(page_size);
        let total: usize = lengths.iter().map(used).sum();
        let num_pages = total + rng.usize(0..=4);
        let mut free: Vec<usize> = (0..num_pages).collect();
        rng.shuffle(&mut free);
        let mut pages: Vec<Vec<usize>> = Vec::new();
        for n in lengths {
            let mut mine = Vec::new();
            // A common prefix: full pages of an earlier request.
            if !pages.is_empty() && rng.u8(0..4) == 0 {
                let donor = rng.usize(..pages.len());
                let full = (lengths[donor] / page_size).min(n / page_size);
                mine.extend_from_slice(&pages[donor][..rng.usize(0..=full)]);
            }
            mine.extend(free.split_off(free.len() - (used(n) - mine.len())));
            pages.push(mine);
        }
        let columns = pages.iter().map(Vec::len).max().unwrap_or(0) + rng.usize(0..=2);
        Tables { num_pages, columns, pages }
    }

    fn tensor(&self, rng: &mut Rng) -> Result<HostTensor> {
        let garbage = [2_147_480_000, -1, i32::MIN, i32::MAX, self.num_pages as i32];
        let gap = rng.usize(0..=3);
        let shape = [self.pages.len(), self.columns];
        let mut table =
            HostTensor::filled("block_table", DType::I32, &shape, &[self.columns + gap, 1], 0, &nan(DType::I32))?;
        for (i, pages) in self.pages.iter().enumerate() {
            for c in 0..self.columns {
                let entry = pages.get(c).map_or_else(|| garbage[rng.usize(..garbage.len())], |p| *p as i32);
                table.set(&[i, c], f64::from(entry));
            }
        }
        Ok(table)
    }
}

/// The cache's values, [num_pages, page_size, h_kv, head_dim_k], NaN wherever no request reads.
fn cache(rng: &mut Rng, p: &Problem, scores: &Scores, tables: &Tables, lengths: &[usize]) -> Vec<f32> {
    let (d_k, h_kv, page_size) = (p.head_dim_k(), p.h_kv(), p.page_size());
    let mut values = vec![f32::NAN; tables.num_pages * page_size * h_kv * d_k];
    for (pages, n) in tables.pages.iter().zip(lengths) {
        let one = scores.one_key(rng, *n);
        for t in 0..*n {
            for g in 0..h_kv {
                let row = (pages[t / page_size] * page_size + t % page_size) * h_kv + g;
                let row = &mut values[row * d_k..][..d_k];
                // Pages of a common prefix hold what the first owner put there.
                if row[0].is_nan() {
                    scores.key(rng, p, row, t, *n, one);
                }
            }
        }
    }
    values
}

/// Copies columns of row-major values into a tensor with random strides.
fn strided(
    rng: &mut Rng,
    name: &'static str,
    dtype: DType,
    values: &[f32],
    shape: [usize; 4],
    columns: std::ops::Range<usize>,
    multiple: usize,
) -> Result<HostTensor> {
    let mut sizes = shape;
    sizes[3] = columns.len();
    let mut strides = [1; 4];
    let mut order = [0, 1, 2];
    rng.shuffle(&mut order);
    let mut gap = |n: usize| n.next_multiple_of(multiple) + if rng.bool() { 0 } else { multiple * rng.usize(0..=3) };
    let mut extent = gap(columns.len().max(1));
    for dim in order {
        strides[dim] = extent;
        extent = gap(extent * sizes[dim].max(1));
    }
    for dim in 0..3 {
        // What PyTorch leaves behind where a dimension has one element: anything.
        if sizes[dim] == 1 && rng.bool() {
            strides[dim] = if rng.bool() { 0 } else { 7 };
        }
    }
    let start = rng.usize(0..=3) * multiple;
    let mut tensor = HostTensor::filled(name, dtype, &sizes, &strides, start, &nan(dtype))?;
    tensor.fill(|index| {
        let row = (index[0] * shape[1] + index[1]) * shape[2] + index[2];
        values[row * shape[3] + columns.start + index[3]]
    });
    Ok(tensor)
}

/// Strides that keep elements apart, in any order of dimensions, with gaps.
fn output_strides<const N: usize>(rng: &mut Rng, shape: [usize; N], inner: bool) -> [usize; N] {
    let mut order: [usize; N] = std::array::from_fn(|i| N - 1 - i);
    match rng.u8(0..4) {
        0 | 1 => {}
        2 if inner => rng.shuffle(&mut order),
        _ => rng.shuffle(&mut order[1..]),
    }
    let mut strides = [1; N];
    let mut extent = if inner && rng.u8(0..6) == 0 { 2 } else { 1 };
    for dim in order {
        strides[dim] = extent;
        extent = extent * shape[dim].max(1) + if rng.bool() { 0 } else { rng.usize(0..=5) };
    }
    strides
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Layout;

    #[test]
    fn a_seed_makes_one_problem() {
        let (a, b) = (random_call(7, &Limits::any()).unwrap(), random_call(7, &Limits::any()).unwrap());
        assert_eq!(a.name, b.name);
        assert_eq!(a.expected, b.expected);
    }

    #[test]
    fn layouts_hold_the_same_values() {
        for seed in 0..40 {
            let call = random_call(seed, &Limits { max_work: 20_000, ..Limits::any() }).unwrap();
            for layout in [Layout::Fused, Layout::Split] {
                let other = call.with_layout(layout).unwrap();
                let (out, lse) = crate::reference::decode(&other.problem, &other.inputs().unwrap()).unwrap();
                let expected = call.expected.as_ref().unwrap();
                assert_eq!((&out, &lse), (&expected.out, &expected.lse), "{} {layout}", call.name);
            }
        }
    }

    #[test]
    fn limits_are_reached() {
        let calls: Vec<_> =
            (0..300).map(|s| random_call(s, &Limits { max_work: 2_000, ..Limits::any() }).unwrap()).collect();
        let some = |f: &dyn Fn(&Call) -> bool| assert!(calls.iter().any(f));
        some(&|c| c.problem.b() == 0);
        some(&|c| c.problem.rope() == 0);
        some(&|c| c.problem.h_kv() == 3);
        some(&|c| c.problem.mask() == Mask::VisibleLengths);
        some(&|c| c.problem.softmax_scale() == 0.0);
        some(&|c| c.tensor("kpe").is_some() && c.tensor("q").is_some());
        some(&|c| c.cache_seqlens().contains(&0));
        some(&|c| c.cache_seqlens().iter().any(|n| (1..c.problem.s_q() as i32).contains(n)));
        some(&|c| c.output_strides.unwrap().0[3] != 1);
        some(&|c| c.expected.as_ref().unwrap().lse.iter().any(|l| *l < -50.0));
    }
}
