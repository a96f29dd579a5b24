//! `polymla conformance`: golden files and random problems on every backend, with a verdict for each.

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Parser;
use polymla::conformance::{self, Call, LAYOUTS, Layout, Outcome as Check, POLICIES, golden, random};
use polymla::{HostBackend, Problem, SplitPolicy};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde_json::json;

use crate::output::{self, Outcome, short};

#[derive(Parser)]
pub struct Args {
    /// Golden files, or directories of them; without any, the repository's own.
    paths: Vec<PathBuf>,
    /// Only these backends; without it, every backend of the build.
    #[arg(long, value_delimiter = ',')]
    backend: Vec<String>,
    /// Also check this many random problems against the f64 reference, seeds 0 to N - 1.
    #[arg(long, value_name = "N", default_value_t = 0)]
    random: u64,
    /// First seed of --random.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write a JUnit report.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

/// The files that `cargo run` in a checkout finds.
fn own_files() -> Result<PathBuf, Box<dyn Error>> {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let here = PathBuf::from("tests/golden");
    [here, built_in]
        .into_iter()
        .find(|dir| dir.is_dir())
        .ok_or_else(|| "no golden files: run inside the repository, or name files or a directory of them".into())
}

fn calls(args: &Args) -> Result<Vec<Call>, Box<dyn Error>> {
    let paths = if args.paths.is_empty() { vec![own_files()?] } else { args.paths.clone() };
    let mut calls = Vec::new();
    for path in paths {
        let files = if path.is_dir() { golden::list(&path)? } else { vec![path] };
        for file in files {
            calls.push(golden::load(&file)?);
        }
    }
    Ok(calls)
}

fn policy_name(policy: SplitPolicy) -> String {
    match policy {
        SplitPolicy::Balanced { .. } => "balanced".into(),
        SplitPolicy::BatchInvariant { split_blocks } => format!("invariant/{split_blocks}"),
    }
}

/// The worst check of a call: a failure if there is one, else the largest error beside its allowance.
fn worst(checks: &[Check]) -> Option<&Check> {
    let ratio = |c: &Check| c.errors.as_ref().map_or(f64::INFINITY, |e| e.out_ratio.max(e.lse_ratio));
    checks.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b)))
}

/// What to draw random problems from: everything, or DeepSeek's dimensions where a backend is tuned for those.
fn limits_of(backend: &dyn HostBackend) -> polymla::Result<random::Limits> {
    let odd = Problem::builder(1).h_q(16).head_dim_k(320).head_dim_v(256).build()?;
    Ok(if backend.supports(&odd).is_ok() { random::Limits::any() } else { random::Limits::deepseek() })
}

struct Line {
    call: String,
    backend: &'static str,
    checks: Vec<Check>,
}

impl Line {
    fn passed(&self) -> usize {
        self.checks.iter().filter(|c| c.passed()).count()
    }
    fn cells(&self) -> Vec<String> {
        let ms: f64 = self.checks.iter().map(|c| c.time.as_secs_f64() * 1e3).sum();
        let all = self.passed() == self.checks.len();
        let errors = worst(&self.checks).and_then(|c| c.errors.as_ref().ok());
        let or_dash = |x: Option<f64>| x.map_or("-".into(), short);
        vec![
            self.call.trim_start_matches("dense_").to_string(),
            format!("{} {}/{}", if all { "pass" } else { "FAIL" }, self.passed(), self.checks.len()),
            or_dash(errors.map(|e| e.out_abs)),
            or_dash(errors.map(|e| e.out_ratio)),
            or_dash(errors.map(|e| e.lse_ratio)),
            format!("{ms:.1}"),
        ]
    }
}

fn problems_of(checks: &[Check]) -> impl Iterator<Item = String> + '_ {
    checks.iter().filter(|c| !c.passed()).map(|c| {
        let what = match &c.errors {
            Ok(e) => format!(
                "out error {} ({} of the allowance), cosine {}, lse {} of the allowance",
                short(e.out_abs),
                short(e.out_ratio),
                short(e.cosine),
                short(e.lse_ratio)
            ),
            Err(reason) => reason.clone(),
        };
        format!("{} {} {}: {what}", c.call, c.layout, policy_name(c.policy))
    })
}

fn junit(lines: &[Line]) -> Result<String, Box<dyn Error>> {
    let mut report = Report::new("polymla conformance");
    let mut backends: Vec<&str> = lines.iter().map(|l| l.backend).collect();
    backends.dedup();
    for backend in backends {
        let mut suite = TestSuite::new(backend);
        for check in lines.iter().filter(|l| l.backend == backend).flat_map(|l| &l.checks) {
            let status = match problems_of(std::slice::from_ref(check)).next() {
                None => TestCaseStatus::success(),
                Some(problem) => {
                    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                    status.set_message(problem);
                    status
                }
            };
            let name = format!("{} {} {}", check.call, check.layout, policy_name(check.policy));
            let mut case = TestCase::new(name, status);
            case.set_time(check.time);
            suite.add_test_case(case);
        }
        report.add_test_suite(suite);
    }
    Ok(report.to_string()?)
}

pub fn run(args: &Args, json: bool) -> Outcome {
    let past_last_seed = args.seed.checked_add(args.random);
    let limit = u64::MAX - args.random;
    let end =
        past_last_seed.ok_or_else(|| format!("seed is {}; with this many it must be at most {limit}", args.seed))?;
    let calls = calls(args)?;
    if calls.is_empty() && args.random == 0 {
        return Err("there are no golden files to check".into());
    }
    let required = conformance::required()?;
    let mut lines = Vec::new();
    let (mut skips, mut missing) = (Vec::new(), Vec::new());
    let mut tiers = Vec::new();
    let chosen = |name: &str| args.backend.is_empty() || args.backend.iter().any(|b| b == name);
    for name in &args.backend {
        if !polymla::registry().iter().any(|r| r.name == name) {
            polymla::open(name)?;
        }
    }
    for registration in polymla::registry().iter().filter(|r| chosen(r.name)) {
        let backend = match (registration.open)() {
            Ok(backend) => backend,
            Err(reason) => {
                let must = required.iter().any(|name| name == registration.name) || !args.backend.is_empty();
                if must { &mut missing } else { &mut skips }.push((registration.name, reason.to_string()));
                continue;
            }
        };
        let limits = limits_of(&*backend)?;
        let before = lines.len();
        for call in &calls {
            if let Err(refused) = backend.supports(&call.problem) {
                skips.push((registration.name, format!("{}: {refused}", call.name)));
                continue;
            }
            let checks = conformance::check_call(&*backend, call, &LAYOUTS);
            lines.push(Line { call: call.name.clone(), backend: registration.name, checks });
        }
        let (mut checks, mut unsupported) = (Vec::new(), 0);
        for seed in args.seed..end {
            let call = random::random_call(seed, &limits)?;
            match backend.supports(&call.problem) {
                Ok(()) => checks.extend(conformance::check_call(&*backend, &call, &[Layout::Given])),
                Err(_) => unsupported += 1,
            }
        }
        if unsupported > 0 {
            skips.push((registration.name, format!("{unsupported} random problems that it does not support")));
        }
        if !checks.is_empty() {
            let call = format!("random, seeds {} to {}", args.seed, end - 1);
            lines.push(Line { call, backend: registration.name, checks });
        }
        let passed = lines[before..].iter().all(|l| l.passed() == l.checks.len());
        tiers.push((registration.name, backend.info().clone(), passed));
    }
    let checks: usize = lines.iter().map(|l| l.checks.len()).sum();
    let passed: usize = lines.iter().map(Line::passed).sum();
    let good = passed == checks && checks > 0 && missing.is_empty();

    if let Some(path) = &args.junit {
        output::write(path, junit(&lines)?)?;
    }
    if json {
        let rows: Vec<_> = lines
            .iter()
            .flat_map(|l| &l.checks)
            .map(|c| {
                let e = c.errors.as_ref().ok();
                json!({"call": c.call, "backend": c.backend, "layout": c.layout.to_string(),
                    "policy": policy_name(c.policy), "passed": c.passed(), "out_abs": e.map(|e| e.out_abs),
                    "out_ratio": e.map(|e| e.out_ratio), "cosine": e.map(|e| e.cosine),
                    "lse_abs": e.map(|e| e.lse_abs), "lse_ratio": e.map(|e| e.lse_ratio),
                    "error": c.errors.as_ref().err(), "seconds": c.time.as_secs_f64()})
            })
            .collect();
        let pair = |(name, reason): &(&str, String)| json!({"backend": name, "reason": reason});
        let tier = |(name, info, passed): &(&str, polymla::BackendInfo, bool)| json!({"backend": name, "device": info.device_name, "tier": info.evidence.to_string(), "how": info.evidence.words(), "passed": passed});
        output::json(&json!({"passed": good, "checks": rows, "evidence": tiers.iter().map(tier).collect::<Vec<_>>(),
            "skipped": skips.iter().map(pair).collect::<Vec<_>>(),
            "missing": missing.iter().map(pair).collect::<Vec<_>>()}))?;
        return Ok(good);
    }
    for (name, info, all) in &tiers {
        println!("{name} on {}", info.device_name);
        let rows = lines.iter().filter(|l| l.backend == *name).map(Line::cells);
        let header = ["call", "checks", "worst out error", "of allowance", "lse of allow.", "ms"];
        println!("{}", output::table(&header, 2, rows));
        let tier = info.evidence;
        println!(
            "evidence tier: {}\n",
            if *all { format!("{tier}, {}", tier.words()) } else { "none, checks failed".into() }
        );
    }
    for line in &lines {
        problems_of(&line.checks).for_each(|problem| println!("FAIL {}: {problem}", line.backend));
    }
    skips.iter().for_each(|(name, reason)| println!("SKIP {name}: {reason}"));
    missing.iter().for_each(|(name, reason)| println!("FAIL {name}: required, but {reason}"));
    println!("{passed} of {checks} checks passed: {} layouts x {} schedules a file", LAYOUTS.len(), POLICIES.len());
    Ok(good)
}
