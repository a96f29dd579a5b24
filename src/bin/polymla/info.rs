//! `polymla info`: what this build can do here, and what every backend in it supports.

use clap::Parser;
use polymla::{DType, Mask, Problem, Unsupported, registry};
use serde_json::json;

use crate::output::{self, Outcome};

#[derive(Parser)]
pub struct Args {
    /// Print only the support matrix, as Markdown (the README's table).
    #[arg(long)]
    markdown: bool,
}

/// A question to every backend: a class of problems and one member of it.
struct Probe {
    what: &'static str,
    problem: polymla::Result<Problem>,
    /// The same in f16 where the question is not about types: some backends have no bf16 at all.
    in_f16: Option<polymla::Result<Problem>>,
}

/// A backend's answer, and whether it would be yes in f16.
struct Answer {
    bf16: Result<(), Unsupported>,
    f16: bool,
}

impl Answer {
    fn word(&self) -> &'static str {
        match (&self.bf16, self.f16) {
            (Ok(()), _) => "yes",
            (Err(_), true) => "f16",
            (Err(_), false) => "no",
        }
    }
}

fn probes() -> Vec<Probe> {
    let base = || Problem::builder(4).num_pages(64).max_pages_per_seq(16).h_q(16);
    let of_type = |what, dtype| Probe { what, problem: base().dtype(dtype).build(), in_f16: None };
    let probe = |what, builder: polymla::problem::ProblemBuilder| Probe {
        what,
        in_f16: Some(builder.clone().dtype(DType::F16).build()),
        problem: builder.build(),
    };
    vec![
        of_type("bf16", DType::Bf16),
        of_type("f16", DType::F16),
        of_type("f32", DType::F32),
        probe("head_dim 576/512 (rope 64)", base()),
        probe("head_dim 512/512 (rope 0)", base().head_dim_k(512)),
        probe("head_dim 320/256", base().head_dim_k(320).head_dim_v(256)),
        probe("h_q 1", base().h_q(1)),
        probe("h_q 128", base().h_q(128)),
        probe("h_kv 2", base().h_kv(2)),
        probe("s_q 4, causal", base().s_q(4).mask(Mask::Causal)),
        probe("visible lengths", base().s_q(2).mask(Mask::VisibleLengths)),
        probe("page size 1", base().page_size(1)),
        probe("page size 48", base().page_size(48)),
        probe("page size 64", base()),
        probe("page size 256", base().page_size(256)),
    ]
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let mut header = vec!["problem"];
    header.extend(registry().iter().map(|r| r.name));
    let mut matrix = Vec::new();
    for probe in probes() {
        let problem = probe.problem?;
        let in_f16 = probe.in_f16.transpose()?;
        let answer = |supports: fn(&Problem) -> Result<(), Unsupported>| Answer {
            bf16: supports(&problem),
            f16: in_f16.as_ref().is_some_and(|p| supports(p).is_ok()),
        };
        matrix.push((probe.what, registry().iter().map(|r| answer(r.supports)).collect::<Vec<_>>()));
    }
    let cells = || -> Vec<Vec<String>> {
        let row = |what: &str, answers: &[Answer]| {
            std::iter::once(what.to_string()).chain(answers.iter().map(|a| a.word().to_string())).collect()
        };
        matrix.iter().map(|(what, answers)| row(what, answers)).collect()
    };
    if args.markdown {
        println!("| {} |", header.join(" | "));
        println!("|{}", "---|".repeat(header.len()));
        for row in cells() {
            println!("| {} |", row.join(" | "));
        }
        return Ok(true);
    }
    let opened: Vec<_> = registry().iter().map(|r| (r, (r.open)())).collect();
    if json {
        let backends: Vec<_> = opened
            .iter()
            .map(|(r, state)| match state {
                Ok(b) => json!({"name": r.name, "target": r.target, "present": true,
                    "device": b.info().device_name, "evidence": b.info().evidence.to_string()}),
                Err(e) => json!({"name": r.name, "target": r.target, "present": false, "reason": e.to_string()}),
            })
            .collect();
        let support: Vec<_> = matrix
            .iter()
            .flat_map(|(what, answers)| registry().iter().zip(answers).map(move |(r, a)| (what, r.name, a)))
            .map(|(what, name, answer)| {
                let reason = answer.bf16.as_ref().err().map(ToString::to_string);
                json!({"problem": what, "backend": name, "supported": answer.bf16.is_ok(),
                    "only_f16": answer.word() == "f16", "reason": reason})
            })
            .collect();
        output::json(&json!({"version": env!("CARGO_PKG_VERSION"), "backends": backends, "support": support}))?;
        return Ok(true);
    }
    println!("polymla {}\n", env!("CARGO_PKG_VERSION"));
    let rows = opened.iter().map(|(r, state)| match state {
        Ok(b) => vec![r.name.into(), "present".into(), b.info().device_name.clone(), b.info().evidence.to_string()],
        Err(reason) => vec![r.name.into(), "absent".into(), reason.to_string(), "-".into()],
    });
    println!("{}\n", output::table(&["backend", "state", "device, or why it is absent", "evidence"], 9, rows));
    println!("{}", output::table(&header, 9, cells()));
    for (what, answers) in &matrix {
        // That a backend has no bf16 is said once, in the row of that type.
        for reason in answers.iter().filter(|a| !a.f16).filter_map(|a| a.bf16.as_ref().err()) {
            println!("{what}: {reason}");
        }
    }
    Ok(true)
}
