//! The command line: `info`, `conformance`, `decode`, `export`, `bench`, `kernels`.

mod bench;
mod choose;
mod conformance;
mod cpu_ceilings;
mod decode;
#[cfg(feature = "onnx")]
mod export;
mod info;
mod kernels;
mod output;
mod roofline;
mod suites;
mod synthetic;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// MLA decoding over a paged KV cache, on every accelerator.
#[derive(Parser)]
#[command(name = "polymla", version, arg_required_else_help = true)]
struct Cli {
    /// Print one JSON document instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Backends in this build, devices found, why others are absent, the support matrix.
    Info(info::Args),
    /// Check backends with golden files.
    Conformance(conformance::Args),
    /// Decode the tensors of a safetensors file.
    Decode(decode::Args),
    /// Write the decode of one class of problems as an ONNX graph.
    #[cfg(feature = "onnx")]
    Export(export::Args),
    /// Time a suite or a single shape.
    Bench(bench::Args),
    /// Write a vendor's kernels as one file, with the command that compiles them.
    Kernels(kernels::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Info(args) => info::run(&args, cli.json),
        Command::Conformance(args) => conformance::run(&args, cli.json),
        Command::Decode(args) => decode::run(&args, cli.json),
        #[cfg(feature = "onnx")]
        Command::Export(args) => export::run(&args, cli.json),
        Command::Bench(args) => bench::run(&args, cli.json),
        Command::Kernels(args) => kernels::run(&args, cli.json),
    };
    match result {
        Ok(passed) => ExitCode::from(u8::from(!passed)),
        Err(error) => {
            eprintln!("polymla: {error}");
            ExitCode::FAILURE
        }
    }
}
