//! `polymla bench`: time suites and single shapes, and compare with the floor and with recorded peers.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use polymla::{ScheduleOptions, SplitPolicy, Timing};
use serde_json::json;

use crate::choose;
use crate::cpu_ceilings;
use crate::output::{self, Outcome, short};
use crate::roofline;
use crate::suites::{self, Best, Ceilings, Recorded, Shape};
use crate::synthetic::{Batch, Values};

#[derive(Parser)]
pub struct Args {
    /// A named suite: cpu, h200 (the 23 rows that peers were measured on), quick.
    #[arg(long, default_value = "quick")]
    suite: String,
    /// Time one shape instead of a suite: B,S_Q,H_Q,S_K. May be given several times.
    #[arg(long, value_name = "B,S_Q,H_Q,S_K", value_parser = parse_shape)]
    shape: Vec<Shape>,
    /// Draw the lengths of --shape from a normal distribution around S_K.
    #[arg(long)]
    varlen: bool,
    /// Element type of --shape: bf16, f16, f32.
    #[arg(long, default_value = "bf16", value_parser = parse_dtype)]
    dtype: polymla::DType,
    /// Tokens a page of --shape.
    #[arg(long, default_value_t = 64, value_parser = whole(1..=1 << 31))]
    page_size: usize,
    /// Backend; without it the best one that supports the first shape.
    #[arg(long)]
    backend: Option<String>,
    /// Time the batch-invariant schedule.
    #[arg(long)]
    batch_invariant: bool,
    /// Runs before the first timed one.
    #[arg(long, default_value_t = 2, value_parser = whole(0..=MAX_RUNS))]
    warmups: usize,
    /// Timed runs; the median is reported.
    #[arg(long, default_value_t = 15, value_parser = whole(1..=MAX_RUNS))]
    repeats: usize,
    /// Keep caches warm between runs.
    #[arg(long)]
    no_flush: bool,
    /// Ceilings of the device, READ_GBPS,TFLOPS; without it the recorded ones of an H200, or measured on a CPU.
    #[arg(long, value_name = "READ_GBPS,TFLOPS", value_parser = parse_ceilings)]
    ceilings: Option<Ceilings>,
    /// Write a roofline picture.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Most runs, and most requests, that a shape may ask for: more would be a slip of the hand, and take days.
const MAX_RUNS: u64 = 1_000_000;
const MAX_B: f64 = 1_048_576.0;

fn whole(range: std::ops::RangeInclusive<u64>) -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(range)
}

fn numbers<const N: usize>(text: &str) -> Result<[f64; N], String> {
    let parsed: Result<Vec<f64>, _> = text.split(',').map(|part| part.trim().parse::<f64>()).collect();
    let list = parsed.map_err(|e| format!("{text:?}: {e}"))?;
    list.try_into().map_err(|_| format!("{text:?} must have {N} numbers"))
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let fields = numbers::<4>(text)?;
    if fields.iter().any(|x| x.fract() != 0.0 || !(0.0..=2147483647.0).contains(x)) {
        return Err(format!("{text:?} must be whole numbers in 0..=2147483647"));
    }
    if fields[0] > MAX_B {
        return Err(format!("{text:?} must have a B in 0..={MAX_B}"));
    }
    let [b, s_q, h_q, s_k] = fields.map(|x| x as usize);
    Ok(Shape::new(b, s_q, h_q, s_k))
}

fn parse_dtype(text: &str) -> Result<polymla::DType, String> {
    use polymla::DType::{Bf16, F16, F32};
    [Bf16, F16, F32].into_iter().find(|d| d.name() == text).ok_or_else(|| "must be one of bf16, f16, f32".into())
}

fn parse_ceilings(text: &str) -> Result<Ceilings, String> {
    let both = numbers::<2>(text)?;
    // The picture's axes end there, and end where a number does.
    if both.iter().any(|x| !(1e-9..=1e9).contains(x)) {
        return Err(format!("{text:?} must be numbers in 1e-9..=1e9"));
    }
    let [read_gbps, tflops] = both;
    Ok(Ceilings { read_gbps, tflops })
}

/// A timed shape.
pub struct Measured {
    pub shape: Shape,
    /// Lengths of a ragged batch, for whoever repeats the measurement.
    lens: Option<Vec<i32>>,
    pub us: f64,
    pub flop: f64,
    pub bytes: f64,
    pub floor_us: Option<f64>,
    pub best: Option<Best>,
}

impl Measured {
    pub fn gflops(&self) -> f64 {
        self.flop / self.us / 1e3
    }
    pub fn gbps(&self) -> f64 {
        self.bytes / self.us / 1e3
    }
    fn percent_of_floor(&self) -> Option<f64> {
        self.floor_us.map(|floor| 100.0 * floor / self.us)
    }
    fn speedup(&self) -> Option<f64> {
        self.best.as_ref().map(|best| best.us / self.us)
    }
}

fn median_us(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
}

fn geometric_mean(ratios: &[f64]) -> Option<f64> {
    (!ratios.is_empty()).then(|| (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp())
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let shapes: Vec<Shape> = match args.shape.is_empty() {
        true => suites::suite(&args.suite)?,
        false => {
            let adjust =
                |s: &Shape| Shape { varlen: args.varlen, dtype: args.dtype, page_size: args.page_size, ..s.clone() };
            args.shape.iter().map(adjust).collect()
        }
    };
    let Some(first) = shapes.first() else { return Err("the suite has no shapes".into()) };
    let first = first.problem(&vec![first.s_k as i32; first.b])?;
    let backend = choose::backend(args.backend.as_deref(), &first)?;
    let recorded = Recorded::h200()?;
    // Peers were measured on one kind of device; on another one comparing with them would mean nothing.
    let same_device = backend.info().device_name.contains(&recorded.device);
    let ceilings = args.ceilings.or_else(|| match (same_device, backend.info().device) {
        (true, _) => Some(recorded.ceilings),
        (false, polymla::Device::Host) => Some(cpu_ceilings::measure()),
        (false, _) => None,
    });
    let policy = if args.batch_invariant { SplitPolicy::BATCH_INVARIANT } else { SplitPolicy::default() };
    let options = ScheduleOptions { num_sm_parts: None, policy };
    let timing = Timing { warmups: args.warmups, repeats: args.repeats, flush: !args.no_flush };

    let bar =
        ProgressBar::new(shapes.len() as u64).with_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
    let mut rows = Vec::new();
    let mut values: Option<Values> = None;
    for shape in shapes {
        bar.set_message(format!("b {} s_q {} h_q {} s_k {}", shape.b, shape.s_q, shape.h_q, shape.length()));
        let values = match values.take() {
            Some(same) if same.dtype() == shape.dtype => values.insert(same),
            _ => values.insert(Values::new(shape.dtype, 1)),
        };
        let batch = Batch::new(&shape, 1)?;
        let (problem, lens) = (&batch.problem, batch.cache_seqlens.clone());
        let us = median_us(backend.time(problem, &options, &batch.inputs(values), timing)?);
        let (flop, bytes) = (problem.flop(&lens) as f64, problem.bytes(&lens) as f64);
        let floor_us = ceilings.map(|c| c.floor_us(flop, bytes));
        let best = recorded.best(&shape).filter(|_| same_device);
        let lens = shape.varlen.then_some(lens);
        rows.push(Measured { shape, lens, us, flop, bytes, floor_us, best });
        bar.inc(1);
    }
    bar.finish_and_clear();

    if let Some(path) = &args.svg {
        let peers = same_device.then_some(&recorded);
        let drawn = roofline::draw(path, &backend.info().device_name, ceilings, &rows, peers);
        drawn.map_err(|e| format!("{}: {e}", path.display()))?;
        eprintln!("roofline written to {}", path.display());
    }
    let ratios: Vec<f64> = rows.iter().filter_map(Measured::speedup).collect();
    let mean = geometric_mean(&ratios);
    if json {
        let rows: Vec<_> = rows
            .iter()
            .map(|m| {
                json!({"b": m.shape.b, "s_q": m.shape.s_q, "h_q": m.shape.h_q, "s_k": m.shape.s_k,
                    "varlen": m.shape.varlen, "cache_seqlens": m.lens, "dtype": m.shape.dtype.name(), "page_size": m.shape.page_size,
                    "us": m.us, "gflops": m.gflops(), "gbps": m.gbps(), "floor_us": m.floor_us,
                    "percent_of_floor": m.percent_of_floor(), "best_peer": m.best.as_ref().map(|b| &b.name),
                    "best_peer_us": m.best.as_ref().map(|b| b.us), "speedup": m.speedup()})
            })
            .collect();
        output::json(&json!({"backend": backend.info().name, "device": backend.info().device_name,
            "read_GBps": ceilings.map(|c| c.read_gbps), "TFLOPS": ceilings.map(|c| c.tflops),
            "rows": rows, "geometric_mean_speedup": mean}))?;
        return Ok(true);
    }
    println!("{} on {}", backend.info().name, backend.info().device_name);
    if let Some(c) = ceilings {
        println!("floor = max(bytes / {:.0} GB/s, flop / {} TFLOPS)", c.read_gbps, short(c.tflops));
    }
    let text = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.1}"));
    let lines = rows.iter().map(|m| {
        let best = m.best.as_ref().map_or("-".into(), |b| format!("{} {:.1}", b.name, b.us));
        let ratio = m.speedup().map_or("-".into(), |r| format!("{r:.2}x"));
        let s = &m.shape;
        [
            s.b.to_string(),
            s.s_q.to_string(),
            s.h_q.to_string(),
            s.length(),
            format!("{:.1}", m.us),
            short(m.gflops() / 1e3),
        ]
        .into_iter()
        .chain([short(m.gbps()), text(m.percent_of_floor()), best, ratio])
        .collect()
    });
    let header = ["b", "s_q", "h_q", "s_k", "us", "TFLOPS", "GB/s", "% floor", "best recorded peer", "ratio"];
    println!("{}", output::table(&header, 0, lines));
    if let Some(mean) = mean {
        println!(
            "geometric mean over the best recorded peer of each row ({}, {}): {mean:.3}x",
            recorded.device, recorded.date
        );
    }
    Ok(true)
}
