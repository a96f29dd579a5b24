//! `polymla decode`: a safetensors file in, `out` and `lse` out.

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use polymla::conformance::golden;
use polymla::{ScheduleOptions, SplitPolicy};
use serde_json::json;

use crate::choose;
use crate::output::{self, Outcome};

#[derive(Parser)]
pub struct Args {
    /// Input: `q` [b, s_q, h_q, d] (or `q_nope` and `q_pe`), `k_cache` [pages, page_size, h_kv, d] (or `ckv` and
    /// `kpe`), `block_table` [b, pages] i32, `cache_seqlens` [b] i32, perhaps `visible_lengths` [b, s_q] i32. Metadata
    /// (strings): kind "dense_decode", head_dim_v, and where they differ from the defaults softmax_scale and causal.
    input: PathBuf,
    /// Output: `out` [b, s_q, h_q, head_dim_v] and `lse` [b, h_q, s_q].
    output: PathBuf,
    /// Backend; without it the best one that runs here and supports the problem.
    #[arg(long)]
    backend: Option<String>,
    /// Use the batch-invariant schedule.
    #[arg(long)]
    batch_invariant: bool,
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let call = golden::load(&args.input)?;
    let backend = choose::backend(args.backend.as_deref(), &call.problem)?;
    let policy = if args.batch_invariant { SplitPolicy::BATCH_INVARIANT } else { SplitPolicy::default() };
    let options = ScheduleOptions { num_sm_parts: None, policy };
    let mut outputs = call.poisoned_outputs()?;
    let start = Instant::now();
    backend.decode(&call.problem, &options, &call.inputs()?, &mut outputs.outputs()?)?;
    let ms = start.elapsed().as_secs_f64() * 1e3;
    golden::save(&args.output, &call, &outputs)?;
    if json {
        output::json(&json!({"input": args.input, "output": args.output, "backend": backend.info().name,
            "problem": call.problem.to_string(), "milliseconds": ms}))?;
    } else {
        println!("{} on {}: {} in {ms:.1} ms", call.problem, backend.info().name, args.output.display());
    }
    Ok(true)
}
