//! `polymla kernels`: what someone with a vendor's compiler needs to build the kernels, with one command.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Parser;
use serde_json::json;

use crate::output::{self, Outcome};

#[derive(Parser)]
pub struct Args {
    /// Whose kernels: hip (AMD, Hygon), musa, maca, corex.
    #[arg(long)]
    vendor: String,
    /// The architecture to compile for, such as gfx942, mp_31, xcore1000, ivcore11.
    #[arg(long)]
    arch: String,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let made = source(&args.vendor, &args.arch)?;
    let stem = format!("{}-{}", args.vendor, args.arch);
    let (source, script) = (format!("{stem}.{}", made.language), format!("{stem}.sh"));
    std::fs::create_dir_all(&args.out).map_err(|e| format!("{}: {e}", args.out.display()))?;
    output::write(&args.out.join(&source), &made.text)?;
    output::write(&args.out.join(&script), compile_script(&source, made.compiler, &made.binaries))?;
    let command = format!("bash {}", args.out.join(&script).display());
    if json {
        let names: Vec<_> = made.binaries.iter().map(|(name, _)| name).collect();
        output::json(&json!({"source": source, "script": script, "binaries": names, "command": command}))?;
        return Ok(true);
    }
    println!("wrote {source} and {script} to {}", args.out.display());
    let (compiler, variable) = made.compiler;
    println!("compile with:  {command}      ({variable} names another compiler than {compiler})");
    println!("then run with: POLYMLA_MODULE_DIR={} polymla conformance --backend {}", args.out.display(), args.vendor);
    Ok(true)
}

/// The script that compiles each binary beside the source.
fn compile_script(source: &str, compiler: (&str, &str), binaries: &[(String, Vec<String>)]) -> String {
    let (compiler, variable) = compiler;
    let mut script = format!(
        "#!/usr/bin/env bash\n# Compiles the portable kernels of polymla. {variable} names another compiler than {compiler}.\n\
         set -euo pipefail\ncd \"$(dirname \"$0\")\"\n",
    );
    for (name, options) in binaries {
        // Writing to a string cannot fail.
        let _ = writeln!(script, "\"${{{variable}:-{compiler}}}\" {} -o {name} {source}", options.join(" "));
        let _ = writeln!(script, "echo \"made {name}\"");
    }
    script
}

/// What [`compile_script`] and the source file are made of.
struct Made {
    text: String,
    language: &'static str,
    compiler: (&'static str, &'static str),
    binaries: Vec<(String, Vec<String>)>,
}

#[cfg(feature = "driver")]
fn source(vendor: &str, arch: &str) -> Result<Made, Box<dyn std::error::Error>> {
    let source = polymla::driver::kernel_source(vendor, arch)?;
    let (text, language, compiler) = (source.text, source.language, source.compiler);
    Ok(Made { text, language, compiler, binaries: source.binaries })
}

#[cfg(not(feature = "driver"))]
fn source(vendor: &str, _arch: &str) -> Result<Made, Box<dyn std::error::Error>> {
    Err(format!("--vendor is {vendor:?}; this build has the kernels of no vendor (features hip, musa, maca, corex)")
        .into())
}
