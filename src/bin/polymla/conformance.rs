//! `polymla decode`: a safetensors file in, `out` and `lse` out.
use crate::output::Outcome;
use clap::Parser;
#[derive(Parser)]
pub struct Args {}
pub fn run(_args: &Args, _json: bool) -> Outcome {
    Ok(false)
}
