//! `polymla export`: the decode of one class of problems as an ONNX graph.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, ValueEnum};
use polymla::conformance::golden;
use polymla::onnx::proto::OPSET;
use polymla::onnx::{Losses, Products, call_for_graph, graph, problem_in_f16};
use polymla::{DType, Mask, Problem};
use serde_json::json;

use crate::output::{self, Outcome};

#[derive(Parser)]
pub struct Args {
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    onnx: PathBuf,
    /// Take the class from this file of tensors (the format of `polymla decode`) instead of the options below.
    #[arg(long, value_name = "IN.safetensors")]
    like: Option<PathBuf>,
    /// Write the tensors of that file as the graph takes them: fused, without gaps, bf16 converted to f16.
    #[arg(long, value_name = "OUT.safetensors", requires = "like")]
    inputs: Option<PathBuf>,
    /// The type of the two matrix products; softmax and lse are f32 either way.
    #[arg(long, value_enum, default_value = "f32")]
    products: Type,
    #[command(flatten)]
    class: Class,
}

/// A class of problems: everything that shapes the graph.
#[derive(ClapArgs)]
struct Class {
    /// Requests.
    #[arg(long, default_value_t = 1)]
    b: usize,
    /// Query tokens a request.
    #[arg(long, default_value_t = 1)]
    s_q: usize,
    /// Query heads.
    #[arg(long, default_value_t = 128)]
    h_q: usize,
    /// KV heads.
    #[arg(long, default_value_t = 1)]
    h_kv: usize,
    /// Columns of a key.
    #[arg(long, default_value_t = 576)]
    head_dim_k: usize,
    /// Columns of a value.
    #[arg(long, default_value_t = 512)]
    head_dim_v: usize,
    /// Pages of the cache.
    #[arg(long, default_value_t = 64)]
    pages: usize,
    /// Tokens a page.
    #[arg(long, default_value_t = 64)]
    page_size: usize,
    /// Columns of the block table: page_size times it is the longest sequence [default: pages].
    #[arg(long)]
    max_pages_per_seq: Option<usize>,
    /// Element type of q, k_cache and out.
    #[arg(long, value_enum, default_value = "f16")]
    dtype: Type,
    /// Which keys a row sees.
    #[arg(long, value_enum, default_value = "none")]
    mask: Masks,
    /// Factor of the scores [default: head_dim_k^-0.5].
    #[arg(long)]
    softmax_scale: Option<f32>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Type {
    F32,
    F16,
}

#[derive(Clone, Copy, ValueEnum)]
enum Masks {
    /// All keys of the request.
    None,
    /// Bottom-right aligned.
    Causal,
    /// As the input `visible_lengths` says.
    VisibleLengths,
}

impl Class {
    fn problem(&self) -> polymla::Result<Problem> {
        let builder = Problem::builder(self.b)
            .s_q(self.s_q)
            .h_q(self.h_q)
            .h_kv(self.h_kv)
            .head_dim_k(self.head_dim_k)
            .head_dim_v(self.head_dim_v)
            .num_pages(self.pages)
            .page_size(self.page_size)
            .max_pages_per_seq(self.max_pages_per_seq.unwrap_or(self.pages))
            .dtype(if self.dtype == Type::F16 { DType::F16 } else { DType::F32 })
            .mask(match self.mask {
                Masks::None => Mask::None,
                Masks::Causal => Mask::Causal,
                Masks::VisibleLengths => Mask::VisibleLengths,
            });
        match self.softmax_scale {
            Some(scale) => builder.softmax_scale(scale).build(),
            None => builder.build(),
        }
    }
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let products = if args.products == Type::F16 { Products::F16 } else { Products::F32 };
    let call = args.like.as_ref().map(golden::load).transpose()?;
    let problem = match &call {
        Some(call) => problem_in_f16(&call.problem)?,
        None => args.class.problem()?,
    };
    let model = graph(&problem, products)?;
    // Converted before anything is written, so that an error leaves no half of the answer.
    let converted = match (&call, &args.inputs) {
        (Some(call), Some(path)) => Some((path, call_for_graph(call)?)),
        _ => None,
    };
    let bytes = model.to_bytes();
    output::write(&args.onnx, &bytes)?;
    let mut losses = Losses::default();
    if let Some((path, (call, lost))) = &converted {
        losses = *lost;
        golden::save_inputs(path, call)?;
    }
    if json {
        let names = |values: &[polymla::onnx::proto::Value]| -> Vec<_> {
            values.iter().map(|v| json!({"name": v.name, "dtype": format!("{:?}", v.elem), "shape": v.shape})).collect()
        };
        output::json(&json!({"onnx": args.onnx, "bytes": bytes.len(), "opset": OPSET, "nodes": model.nodes.len(),
            "problem": problem.to_string(), "inputs": names(&model.inputs), "outputs": names(&model.outputs),
            "saturated": losses.saturated, "rounded": losses.rounded}))?;
    } else {
        println!("{}: {problem}, opset {OPSET}, {} nodes", args.onnx.display(), model.nodes.len());
        for (word, values) in [("takes", &model.inputs), ("makes", &model.outputs)] {
            for v in values {
                println!("  {word} {} {:?} {:?}", v.name, v.elem, v.shape);
            }
        }
        if let Some((path, _)) = &converted {
            let Losses { saturated, rounded } = losses;
            println!("{}: {saturated} elements beyond f16 became 65504, {rounded} below 2^-14 rounded", path.display());
        }
    }
    // Saturated inputs are not the caller's any more.
    Ok(losses.saturated == 0)
}
