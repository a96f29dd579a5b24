//! `polymla kernels`: what someone with a vendor's compiler needs to build the kernels, with one command.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Parser;
use serde_json::json;

use crate::output::{self, Outcome};

#[derive(Parser)]
pub struct Args {
    /// Whose kernels: hip (AMD, Hygon).
    #[arg(long)]
    vendor: String,
    /// The architecture to compile for, such as gfx942.
    #[arg(long)]
    arch: String,
    /// The folder to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let (text, binaries) = source(&args.vendor, &args.arch)?;
    let stem = format!("{}-{}", args.vendor, args.arch);
    let (source, script) = (format!("{stem}.hip"), format!("{stem}.sh"));
    std::fs::create_dir_all(&args.out)?;
    std::fs::write(args.out.join(&source), text)?;
    std::fs::write(args.out.join(&script), compile_script(&source, &binaries))?;
    let command = format!("bash {}", args.out.join(&script).display());
    if json {
        let names: Vec<_> = binaries.iter().map(|(name, _)| format!("{name}.co")).collect();
        output::json(&json!({"source": source, "script": script, "binaries": names, "command": command}))?;
        return Ok(true);
    }
    println!("wrote {source} and {script} to {}", args.out.display());
    println!("compile with:  {command}      (HIPCC names another compiler than hipcc)");
    println!("then run with: POLYMLA_MODULE_DIR={} polymla conformance --backend {}", args.out.display(), args.vendor);
    Ok(true)
}

/// The script that compiles each binary beside the source.
fn compile_script(source: &str, binaries: &[(String, Vec<String>)]) -> String {
    let mut script = String::from(
        "#!/usr/bin/env bash\n# Compiles the portable kernels of polymla. HIPCC names the compiler: hipcc, DTK's, or a clang \
         that knows HIP.\nset -euo pipefail\ncd \"$(dirname \"$0\")\"\n",
    );
    for (name, options) in binaries {
        // Writing to a string cannot fail.
        let _ = writeln!(script, "\"${{HIPCC:-hipcc}}\" {} -o {name}.co {source}", options.join(" "));
        let _ = writeln!(script, "echo \"made {name}.co\"");
    }
    script
}

type Source = (String, Vec<(String, Vec<String>)>);

#[cfg(feature = "hip")]
fn source(vendor: &str, arch: &str) -> Result<Source, Box<dyn std::error::Error>> {
    if vendor != polymla::driver::NAME {
        return Err(format!("--vendor is {vendor:?}; it must be hip").into());
    }
    let source = polymla::driver::kernel_source(arch)?;
    Ok((source.text, source.binaries))
}

#[cfg(not(feature = "hip"))]
fn source(vendor: &str, _arch: &str) -> Result<Source, Box<dyn std::error::Error>> {
    Err(format!("--vendor is {vendor:?}; this build has the kernels of no vendor (feature hip)").into())
}
