//! The one routine that checks a backend.

use std::time::{Duration, Instant};

use super::call::{Call, Expected, Layout};
use super::tensor::PoisonedOutputs;
use crate::backend::HostBackend;
use crate::schedule::{ScheduleOptions, SplitPolicy};

/// The layouts that every golden file is run in.
pub const LAYOUTS: [Layout; 2] = [Layout::Fused, Layout::Split];

/// The schedules that every golden file is run with: upstream's, the batch-invariant one, and one whose splits of two
/// blocks cut even the short golden sequences, so that the combine step has work.
pub const POLICIES: [SplitPolicy; 3] = [
    SplitPolicy::Balanced { overhead_blocks: crate::schedule::DEFAULT_OVERHEAD_BLOCKS },
    SplitPolicy::BATCH_INVARIANT,
    SplitPolicy::BatchInvariant { split_blocks: 2 },
];

/// How far a result may be from the expected one. An element passes within either bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Absolute bound of an element of `out`.
    pub out_abs: f64,
    /// Bound of an element of `out` relative to the expected value.
    pub out_rel: f64,
    /// Bound of the cosine difference 1 - 2 sum(xy) / sum(x^2 + y^2) of all of `out`.
    pub cosine: f64,
    /// Absolute bound of an element of `lse`.
    pub lse_abs: f64,
    /// Bound of an element of `lse` relative to the expected value.
    pub lse_rel: f64,
}

impl Default for Tolerance {
    /// The tolerances of the golden files: upstream's own for its dense decoding kernel.
    fn default() -> Self {
        Tolerance { out_abs: 8e-4, out_rel: 2.01 / 128.0, cosine: 5e-6, lse_abs: 1e-6, lse_rel: 8.01 / 65536.0 }
    }
}

/// How far a result was from the expected one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Errors {
    /// Largest absolute difference of `out`.
    pub out_abs: f64,
    /// Largest difference of `out` as a part of what its element was allowed: above 1 fails.
    pub out_ratio: f64,
    /// Cosine difference of all of `out`.
    pub cosine: f64,
    /// The cosine difference as a part of what was allowed.
    pub cosine_ratio: f64,
    /// Largest absolute difference of `lse`.
    pub lse_abs: f64,
    /// Largest difference of `lse` as a part of what its element was allowed.
    pub lse_ratio: f64,
}

impl Errors {
    /// The worst of the three ratios: above 1 fails.
    pub fn worst(&self) -> f64 {
        // f64::max would drop a NaN.
        [self.out_ratio, self.cosine_ratio, self.lse_ratio].into_iter().fold(0.0, |a, b| if a >= b { a } else { b })
    }
}

/// What came of one check.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The call's name.
    pub call: String,
    /// The backend's name.
    pub backend: &'static str,
    /// How the tensors lay.
    pub layout: Layout,
    /// How the schedule was made.
    pub policy: SplitPolicy,
    /// The differences; or the error of the run, unwritten elements, NaN, or a mismatched infinity, in words.
    pub errors: Result<Errors, String>,
    /// What the whole call took, copies to the device and back included.
    pub time: Duration,
}

impl Outcome {
    /// Whether the result was within the tolerances.
    pub fn passed(&self) -> bool {
        self.errors.as_ref().is_ok_and(|e| e.worst() <= 1.0)
    }

    /// What is wrong, in a line; empty where nothing is.
    pub fn failure(&self) -> String {
        match &self.errors {
            Ok(_) if self.passed() => String::new(),
            Ok(e) => format!(
                "out error {:.3e} ({:.2} of the allowance), cosine difference {:.3e} ({:.2}), lse error {:.3e} ({:.2})",
                e.out_abs, e.out_ratio, e.cosine, e.cosine_ratio, e.lse_abs, e.lse_ratio
            ),
            Err(reason) => reason.clone(),
        }
    }
}

/// Runs `call` on `backend` into poisoned outputs and compares with the expected values.
///
/// A call without expected values fails: ask [`crate::reference::decode`] for them first.
pub fn check(backend: &dyn HostBackend, call: &Call, layout: Layout, policy: SplitPolicy) -> Outcome {
    check_with(backend, call, layout, &ScheduleOptions { num_sm_parts: None, policy })
}

/// [`check`] in these layouts, with every policy.
pub fn check_call(backend: &dyn HostBackend, call: &Call, layouts: &[Layout]) -> Vec<Outcome> {
    let policies = |layout: &Layout| POLICIES.map(|policy| check(backend, call, *layout, policy));
    layouts.iter().flat_map(policies).collect()
}

/// [`check`] with a number of parts of the caller's choice.
pub fn check_with(backend: &dyn HostBackend, call: &Call, layout: Layout, options: &ScheduleOptions) -> Outcome {
    let mut time = Duration::ZERO;
    let errors = run(backend, call, layout, options, &mut time);
    Outcome { call: call.name.clone(), backend: backend.info().name, layout, policy: options.policy, errors, time }
}

fn run(
    backend: &dyn HostBackend,
    call: &Call,
    layout: Layout,
    options: &ScheduleOptions,
    time: &mut Duration,
) -> Result<Errors, String> {
    let expected = call.expected.as_ref().ok_or("the call has no expected values")?;
    let laid_out = call.with_layout(layout).map_err(|e| e.to_string())?;
    let inputs = laid_out.inputs().map_err(|e| e.to_string())?;
    let mut results = laid_out.poisoned_outputs().map_err(|e| e.to_string())?;
    let mut outputs = results.outputs().map_err(|e| e.to_string())?;
    let start = Instant::now();
    let done = backend.decode(&call.problem, options, &inputs, &mut outputs);
    *time = start.elapsed();
    done.map_err(|e| e.to_string())?;
    results.check_written()?;
    compare(expected, &call.tolerance, &results)
}

/// Compares outputs with expected values. An error is a NaN, a mismatched infinity or a mismatched size, in words.
///
/// # Errors
/// A sentence that names the first offender.
pub fn compare(expected: &Expected, tolerance: &Tolerance, results: &PoisonedOutputs) -> Result<Errors, String> {
    let mut errors = Errors::default();
    let (out, lse) = (results.out.to_f64(), results.lse.to_f64());
    let t = tolerance;
    let out_bound = Bound { name: "out", abs: t.out_abs, rel: t.out_rel, each: &expected.out_abs };
    let lse_bound = Bound { name: "lse", abs: t.lse_abs, rel: t.lse_rel, each: &expected.lse_abs };
    (errors.out_abs, errors.out_ratio) = out_bound.worst(&out, &expected.out)?;
    (errors.lse_abs, errors.lse_ratio) = lse_bound.worst(&lse, &expected.lse)?;
    let (mut dot, mut norms) = (0.0, 0.0);
    for (x, y) in out.iter().zip(&expected.out).filter(|(x, _)| x.is_finite()) {
        dot += x * y;
        norms += x * x + y * y;
    }
    errors.cosine = if norms > 0.0 { (1.0 - 2.0 * dot / norms).max(0.0) } else { 0.0 };
    errors.cosine_ratio = ratio(errors.cosine, t.cosine);
    Ok(errors)
}

/// `difference / allowance`, where nothing is allowed 0 or infinity.
fn ratio(difference: f64, allowance: f64) -> f64 {
    if difference == 0.0 { 0.0 } else { difference / allowance }
}

struct Bound<'a> {
    name: &'static str,
    abs: f64,
    rel: f64,
    each: &'a [f64],
}

impl Bound<'_> {
    /// The largest difference, and the largest part of its allowance that an element used.
    fn worst(&self, values: &[f64], expected: &[f64]) -> Result<(f64, f64), String> {
        let name = self.name;
        if values.len() != expected.len() {
            return Err(format!("{name} has {} elements; {} are expected", values.len(), expected.len()));
        }
        let (mut worst_abs, mut worst_ratio) = (0.0f64, 0.0f64);
        for (i, (x, y)) in values.iter().zip(expected).enumerate() {
            if x.is_nan() || y.is_nan() {
                return Err(format!("{name} element {i} is {x}; {y} is expected"));
            }
            if x.is_infinite() || y.is_infinite() {
                if x != y {
                    return Err(format!("{name} element {i} is {x}; {y} is expected"));
                }
                continue;
            }
            let difference = (x - y).abs();
            let abs = self.each.get(i).copied().unwrap_or(self.abs);
            // Passing within either bound is passing within the larger one.
            let allowance = abs.max(self.rel * y.abs());
            worst_abs = worst_abs.max(difference);
            worst_ratio = worst_ratio.max(ratio(difference, allowance));
        }
        Ok((worst_abs, worst_ratio))
    }
}
