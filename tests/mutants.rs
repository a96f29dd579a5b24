//! The suite bites: a small engine passes it, and the same engine with any one mistake does not.

use polymla::conformance::random::{Limits, random_call};
use polymla::conformance::{Call, Layout, check_with, golden};
use polymla::{
    BackendInfo, DType, Device, Evidence, HostBackend, Inputs, KvCache, Mask, MlaError, Outputs, Problem, Query,
    RepeatedInputs, Result, ScheduleOptions, SplitPolicy, TensorView, Timing, Unsupported, get_mla_metadata,
};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Bug {
    None,
    /// No bug either: what tensor cores want, weights in the type of V, their sum in f32.
    RoundsWeights,
    // Outputs.
    SkipsAnElement,
    SkipsTheLastRow,
    WritesBetweenRows,
    TruncatesOut,
    // lse.
    LseInBaseTwo,
    LseWithoutMaximum,
    LseTransposed,
    EmptyRowsLseMinusInfinity,
    EmptyRowsOutNan,
    // Softmax.
    ForgetsToRescale,
    SubtractsNoMaximum,
    AccumulatesInBf16,
    ScoresInBf16,
    IgnoresTheScale,
    // Splits.
    DropsTheLastSplit,
    MergesUnweighted,
    MergesOneSplitTwice,
    // Masks.
    IgnoresTheMask,
    MasksTopLeft,
    MasksOneTooMany,
    SeesTheWholeLastBlock,
    SeesOneKeyLess,
    // Addresses.
    IgnoresKvStrides,
    IgnoresQueryStrides,
    InterleavesKvHeads,
    ValuesFromTheRope,
    UsesTheFirstPageTwice,
    MixesUpRequests,
    RopeLeftOut,
}

const BUGS: [Bug; 31] = [
    Bug::None,
    Bug::RoundsWeights,
    Bug::SkipsAnElement,
    Bug::SkipsTheLastRow,
    Bug::WritesBetweenRows,
    Bug::TruncatesOut,
    Bug::LseInBaseTwo,
    Bug::LseWithoutMaximum,
    Bug::LseTransposed,
    Bug::EmptyRowsLseMinusInfinity,
    Bug::EmptyRowsOutNan,
    Bug::ForgetsToRescale,
    Bug::SubtractsNoMaximum,
    Bug::AccumulatesInBf16,
    Bug::ScoresInBf16,
    Bug::IgnoresTheScale,
    Bug::DropsTheLastSplit,
    Bug::MergesUnweighted,
    Bug::MergesOneSplitTwice,
    Bug::IgnoresTheMask,
    Bug::MasksTopLeft,
    Bug::MasksOneTooMany,
    Bug::SeesTheWholeLastBlock,
    Bug::SeesOneKeyLess,
    Bug::IgnoresKvStrides,
    Bug::IgnoresQueryStrides,
    Bug::InterleavesKvHeads,
    Bug::ValuesFromTheRope,
    Bug::UsesTheFirstPageTwice,
    Bug::MixesUpRequests,
    Bug::RopeLeftOut,
];

/// What the golden files alone let pass, and why.
fn golden_cannot_see(bug: Bug) -> bool {
    match bug {
        Bug::None | Bug::RoundsWeights => true,
        // Their scores stay below 88, where exp overflows f32.
        Bug::SubtractsNoMaximum => true,
        // All have the default softmax_scale, so a kernel that ignores the parameter gets away with it.
        Bug::IgnoresTheScale => true,
        _ => false,
    }
}

/// Streaming softmax in f32 over the splits of the schedule, one row at a time: what every backend does, at its
/// plainest.
struct Engine {
    bug: Bug,
    info: BackendInfo,
}

/// The running state of one row over one split.
struct Row {
    max: f32,
    sum: f32,
    out: Vec<f32>,
}

impl Engine {
    fn new(bug: Bug) -> Self {
        let device_name = format!("{bug:?}");
        Engine { bug, info: BackendInfo { name: "mutant", device_name, device: Device::Host, evidence: Evidence::T1 } }
    }

    fn has(&self, bug: Bug) -> bool {
        self.bug == bug
    }

    /// An element of a row-major tensor, or of one whose rows are taken to have no gaps.
    fn element(&self, view: &TensorView<'_>, index: [usize; 4], ignore_strides: bool) -> f32 {
        if !ignore_strides {
            return view.get_f64(&index).unwrap() as f32;
        }
        let s = view.shape();
        let flat = ((index[0] * s[1] + index[1]) * s[2] + index[2]) * s[3] + index[3];
        let bytes = view.host_bytes("").unwrap();
        let size = view.dtype().size();
        let at = (flat * size).min(bytes.len() - size);
        let view = match view.dtype() {
            DType::Bf16 => f64::from(half::bf16::from_ne_bytes([bytes[at], bytes[at + 1]])),
            DType::F16 => f64::from(half::f16::from_ne_bytes([bytes[at], bytes[at + 1]])),
            _ => f64::from(f32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())),
        };
        view as f32
    }

    fn q(&self, p: &Problem, inputs: &Inputs<'_>, i: usize, j: usize, h: usize) -> Vec<f32> {
        let flat = self.has(Bug::IgnoresQueryStrides);
        let d_v = p.head_dim_v();
        let at = |d: usize| match &inputs.query {
            Query::Fused(q) => self.element(q, [i, j, h, d], flat),
            Query::Split { q_nope, .. } if d < d_v => self.element(q_nope, [i, j, h, d], flat),
            Query::Split { q_pe, .. } => self.element(q_pe.as_ref().unwrap(), [i, j, h, d - d_v], flat),
        };
        (0..p.head_dim_k()).map(at).collect()
    }

    fn key(&self, p: &Problem, inputs: &Inputs<'_>, i: usize, t: usize, g: usize) -> Vec<f32> {
        let flat = self.has(Bug::IgnoresKvStrides);
        let (d_v, mut position) = (p.head_dim_v(), t / p.page_size());
        if self.has(Bug::UsesTheFirstPageTwice) && position == 1 {
            position = 0;
        }
        let request = if self.has(Bug::MixesUpRequests) { 0 } else { i };
        let page = inputs.block_table.get::<i32>(&[request, position]).unwrap() as usize;
        let (page, slot) = (page.min(p.num_pages() - 1), t % p.page_size());
        let at = |d: usize| match &inputs.kv_cache {
            KvCache::Fused(k) => self.element(k, [page, slot, g, d], flat),
            KvCache::Split { ckv, .. } if d < d_v => self.element(ckv, [page, slot, g, d], flat),
            KvCache::Split { kpe, .. } => self.element(kpe.as_ref().unwrap(), [page, slot, g, d - d_v], flat),
        };
        (0..p.head_dim_k()).map(at).collect()
    }

    fn visible_end(&self, p: &Problem, inputs: &Inputs<'_>, i: usize, j: usize, len: usize) -> usize {
        let given = inputs.visible_lengths.as_ref().and_then(|v| v.get::<i32>(&[i, j]));
        let causal = p.mask() == Mask::Causal;
        match self.bug {
            Bug::IgnoresTheMask => len,
            Bug::MasksTopLeft if causal => (j + 1).min(len),
            Bug::MasksOneTooMany if causal => p.visible_end(len, j, given).saturating_sub(1),
            Bug::SeesOneKeyLess => p.visible_end(len, j, given).saturating_sub(1),
            Bug::SeesTheWholeLastBlock if !causal => {
                let end = p.visible_end(len, j, given).next_multiple_of(64);
                end.min(p.max_tokens_per_seq() as usize)
            }
            _ => p.visible_end(len, j, given),
        }
    }

    /// One row over keys `begin..end`, 64 at a time.
    fn row(&self, p: &Problem, q: &[f32], keys: &[Vec<f32>], begin: usize, end: usize) -> Row {
        let (d_k, d_v) = (p.head_dim_k(), p.head_dim_v());
        let scale = if self.has(Bug::IgnoresTheScale) { (d_k as f32).sqrt().recip() } else { p.softmax_scale() };
        let mut row = Row { max: f32::NEG_INFINITY, sum: 0.0, out: vec![0.0; d_v] };
        let columns = if self.has(Bug::RopeLeftOut) { d_v } else { d_k };
        for block in (begin..end).step_by(64) {
            let keys = &keys[block..end.min(block + 64)];
            let score = |k: &Vec<f32>| {
                let dot: f32 = q[..columns].iter().zip(k).map(|(a, b)| a * b).sum();
                let score = dot * scale;
                if self.has(Bug::ScoresInBf16) { half::bf16::from_f32(score).to_f32() } else { score }
            };
            let scores: Vec<f32> = keys.iter().map(score).collect();
            let mut max = scores.iter().copied().fold(row.max, f32::max);
            if self.has(Bug::SubtractsNoMaximum) {
                max = 0.0;
            }
            let rescale = if self.has(Bug::ForgetsToRescale) || row.sum == 0.0 { 1.0 } else { (row.max - max).exp() };
            row.sum *= rescale;
            row.out.iter_mut().for_each(|o| *o *= rescale);
            for (k, s) in keys.iter().zip(scores) {
                let weight = (s - max).exp();
                row.sum += weight;
                let weight = match p.dtype() {
                    DType::Bf16 if self.has(Bug::RoundsWeights) => half::bf16::from_f32(weight).to_f32(),
                    DType::F16 if self.has(Bug::RoundsWeights) => half::f16::from_f32(weight).to_f32(),
                    _ => weight,
                };
                let v = if self.has(Bug::ValuesFromTheRope) { &k[d_k - d_v..] } else { &k[..d_v] };
                row.out.iter_mut().zip(v).for_each(|(o, x)| *o += weight * x);
            }
            row.max = max;
            if self.has(Bug::AccumulatesInBf16) {
                row.out.iter_mut().for_each(|o| *o = half::bf16::from_f32(*o).to_f32());
            }
        }
        if row.sum > 0.0 {
            row.out.iter_mut().for_each(|o| *o /= row.sum);
        }
        row
    }

    /// Merges the splits of one row: (out, lse).
    fn merge(&self, mut rows: Vec<Row>, d_v: usize) -> (Vec<f32>, f32) {
        if self.has(Bug::DropsTheLastSplit) && rows.len() > 1 {
            rows.pop();
        }
        rows.retain(|r| r.sum != 0.0);
        if rows.is_empty() {
            let nothing = if self.has(Bug::EmptyRowsOutNan) { f32::NAN } else { 0.0 };
            let sign = if self.has(Bug::EmptyRowsLseMinusInfinity) { -1.0 } else { 1.0 };
            return (vec![nothing; d_v], sign * f32::INFINITY);
        }
        if self.has(Bug::MergesOneSplitTwice) && rows.len() > 1 {
            let Row { max, sum, ref out } = rows[0];
            rows.push(Row { max, sum, out: out.clone() });
        }
        let max = rows.iter().map(|r| r.max).fold(f32::NEG_INFINITY, f32::max);
        let weight = |r: &Row| if self.has(Bug::MergesUnweighted) { 1.0 } else { r.sum * (r.max - max).exp() };
        let total: f32 = rows.iter().map(weight).sum();
        let mut out = vec![0.0; d_v];
        for r in &rows {
            out.iter_mut().zip(&r.out).for_each(|(o, x)| *o += weight(r) / total * x);
        }
        let sum: f32 = rows.iter().map(|r| r.sum * (r.max - max).exp()).sum();
        let lse = match self.bug {
            Bug::LseInBaseTwo => max * std::f32::consts::LOG2_E + sum.log2(),
            Bug::LseWithoutMaximum => sum.ln(),
            _ => max + sum.ln(),
        };
        (out, lse)
    }

    fn store(&self, outputs: &mut Outputs<'_>, index: [usize; 4], x: f32, element: usize) {
        if self.has(Bug::SkipsAnElement) && element == 3 {
            return;
        }
        let mut at: usize = index.iter().zip(outputs.out.strides()).map(|(i, s)| i * s).sum();
        if self.has(Bug::WritesBetweenRows) && element == 0 {
            // The end of the row before the next one begins: a vector store that is too wide.
            at += outputs.out.strides()[3] * outputs.out.shape()[3];
        }
        let dtype = outputs.out.dtype();
        let bytes = outputs.out.host_bytes_mut("out").unwrap();
        let at = at * dtype.size();
        let Some(bytes) = bytes.get_mut(at..at + dtype.size()) else { return };
        let truncate = self.has(Bug::TruncatesOut);
        match dtype {
            DType::Bf16 if truncate => bytes.copy_from_slice(&((x.to_bits() >> 16) as u16).to_ne_bytes()),
            DType::F16 if truncate => {
                let nearest = half::f16::from_f32(x);
                let less = nearest.to_f32().abs() > x.abs();
                bytes.copy_from_slice(&(nearest.to_bits() - u16::from(less)).to_ne_bytes());
            }
            DType::Bf16 => bytes.copy_from_slice(&half::bf16::from_f32(x).to_ne_bytes()),
            DType::F16 => bytes.copy_from_slice(&half::f16::from_f32(x).to_ne_bytes()),
            _ => bytes.copy_from_slice(&x.to_ne_bytes()),
        }
    }
}

impl HostBackend for Engine {
    fn info(&self) -> &BackendInfo {
        &self.info
    }
    fn supports(&self, _: &Problem) -> std::result::Result<(), Unsupported> {
        Ok(())
    }
    fn time(
        &self,
        _: &Problem,
        _: &ScheduleOptions,
        _: &RepeatedInputs<'_>,
        _: Timing,
    ) -> Result<Vec<std::time::Duration>> {
        Ok(Vec::new())
    }
    fn decode(&self, p: &Problem, options: &ScheduleOptions, inputs: &Inputs<'_>, to: &mut Outputs<'_>) -> Result<()> {
        let lengths = inputs.host_seqlens()?;
        let schedule = get_mla_metadata(&lengths, options.num_sm_parts.unwrap_or(8), options.policy)?;
        let splits: Vec<_> = schedule.splits().collect();
        let lse_strides = to.lse.strides().to_vec();
        for (i, len) in lengths.iter().map(|n| *n as usize).enumerate() {
            for g in 0..p.h_kv() {
                // All that any row may read, the tail of the last block for the bug that reads it.
                let last = if self.has(Bug::SeesTheWholeLastBlock) { len.next_multiple_of(64) } else { len };
                let last = last.min(p.max_tokens_per_seq() as usize);
                let keys: Vec<Vec<f32>> = (0..last).map(|t| self.key(p, inputs, i, t, g)).collect();
                for (j, h) in (0..p.s_q()).flat_map(|j| (0..p.h_q()).map(move |h| (j, h))) {
                    let group = if self.has(Bug::InterleavesKvHeads) { h % p.h_kv() } else { h / p.heads_per_kv() };
                    let last_row = i + 1 == p.b() && j + 1 == p.s_q() && h + 1 == p.h_q();
                    if group != g || (self.has(Bug::SkipsTheLastRow) && last_row) {
                        continue;
                    }
                    let q = self.q(p, inputs, i, j, h);
                    let end = self.visible_end(p, inputs, i, j, len);
                    let of_request = splits.iter().filter(|s| s.request == i);
                    let rows = of_request.map(|s| {
                        let is_last = s.end_block * 64 >= len;
                        let to = if is_last { end } else { end.min(s.end_block * 64) };
                        self.row(p, &q, &keys, (s.begin_block * 64).min(to), to)
                    });
                    let (out, lse) = self.merge(rows.collect(), p.head_dim_v());
                    for (d, x) in out.into_iter().enumerate() {
                        self.store(to, [i, j, h, d], x, d);
                    }
                    let (a, b) = match self.bug {
                        // As if lse were [b, s_q, h_q].
                        Bug::LseTransposed => ((j * p.h_q() + h) / p.s_q(), (j * p.h_q() + h) % p.s_q()),
                        _ => (h, j),
                    };
                    let at = i * lse_strides[0] + a * lse_strides[1] + b * lse_strides[2];
                    to.lse.host_bytes_mut("lse")?[4 * at..4 * at + 4].copy_from_slice(&lse.to_ne_bytes());
                }
            }
        }
        Ok::<(), MlaError>(())
    }
}

/// The first failure of an engine over some calls: with every request in one piece, and cut as finely as can be.
fn caught(engine: &Engine, calls: &[(Call, Layout)]) -> Option<String> {
    let whole = ScheduleOptions { num_sm_parts: Some(1), policy: SplitPolicy::default() };
    let cut = ScheduleOptions { num_sm_parts: None, policy: SplitPolicy::BatchInvariant { split_blocks: 1 } };
    let runs = calls.iter().flat_map(|(call, layout)| [(call, *layout, whole), (call, *layout, cut)]);
    let mut outcomes = runs.map(|(call, layout, options)| check_with(engine, call, layout, &options));
    outcomes.find(|o| !o.passed()).map(|o| format!("{} {}: {}", o.call, o.layout, o.failure()))
}

#[test]
fn every_mistake_is_caught() {
    // The small files: between them they have every feature of the large ones.
    let names = [
        "dense_bf16_b2_sq4_hq9_shorter_than_sq",
        "dense_bf16_b2_sq1_hq6_hkv2",
        "dense_bf16_b2_sq1_hq16_peaked",
        "dense_bf16_b2_sq2_hq16_peaked_rising",
        "dense_fp16_b1_sq3_hq20_peaked_rising",
        "dense_bf16_b6_sq2_hq16_zero_len",
    ];
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let golden: Vec<(Call, Layout)> = names
        .iter()
        .map(|name| golden::load(dir.join(name).with_extension("safetensors")).unwrap())
        .flat_map(|call| [(call.clone(), Layout::Fused), (call, Layout::Split)])
        .collect();
    let limits = Limits { max_work: 150_000, ..Limits::any() };
    let random: Vec<(Call, Layout)> = (0..std::env::var("SEEDS").map_or(150, |n| n.parse().unwrap()))
        .map(|seed| (random_call(seed, &limits).unwrap(), Layout::Given))
        .collect();
    let mut missed = Vec::new();
    for bug in BUGS {
        let engine = Engine::new(bug);
        let (by_golden, by_random) = (caught(&engine, &golden), caught(&engine, &random));
        println!("{bug:?}\n  golden: {by_golden:?}\n  random: {by_random:?}");
        match bug {
            Bug::None | Bug::RoundsWeights => {
                assert_eq!((by_golden, by_random), (None, None), "a right engine fails");
            }
            _ => {
                if by_random.is_none() {
                    missed.push(format!("{bug:?} by random problems"));
                }
                if by_golden.is_none() != golden_cannot_see(bug) {
                    missed.push(format!("{bug:?}: golden files {by_golden:?}"));
                }
            }
        }
    }
    assert!(missed.is_empty(), "not caught as said: {missed:#?}");
}
