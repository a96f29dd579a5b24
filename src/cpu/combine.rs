//! Merging the partial results of requests that were split.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::schedule::Schedule;

use super::engine::{Partials, Plan};
use super::geometry::Call;

/// Rows a worker takes at once: few, so that the 16 rows of one request occupy several workers.
const ROWS: usize = 4;

/// The natural logarithm of the softmax's denominator, from the largest score before scaling and the sum relative to
/// it; +infinity where no key was seen.
pub(super) fn lse(max: f32, sum: f32, softmax_scale: f32) -> f32 {
    if max == f32::NEG_INFINITY && sum == 0.0 {
        return f32::INFINITY;
    }
    (f64::from(max) * f64::from(softmax_scale) + f64::from(sum).ln()) as f32
}

/// Merges row blocks of split requests, as the counter hands them out. Splits are added in order, so that a row's bits
/// do not depend on who computed them.
///
/// # Safety
/// All partial results must have been written, `next` be shared by all workers of this call, and `values` hold
/// head_dim_v elements for this worker alone.
pub(super) unsafe fn work(
    call: &Call<'_>,
    schedule: &Schedule,
    plan: &Plan,
    partials: Partials,
    values: *mut f32,
    next: &AtomicUsize,
) {
    // SAFETY: as the caller promises.
    let values = unsafe {
        values.write_bytes(0, call.problem.head_dim_v());
        std::slice::from_raw_parts_mut(values, call.problem.head_dim_v())
    };
    let row_blocks = plan.rows.div_ceil(ROWS);
    loop {
        let n = next.fetch_add(1, Ordering::Relaxed);
        let (request, block) = (n / row_blocks, n % row_blocks);
        if request >= schedule.b() {
            return;
        }
        let range = schedule.partials_of(request);
        if range.is_empty() {
            // Nothing to merge here: skip the rest of the request.
            next.fetch_max((request + 1) * row_blocks, Ordering::Relaxed);
            continue;
        }
        for row in block * ROWS..plan.rows.min((block + 1) * ROWS) {
            // SAFETY: the row exists and this worker alone has it.
            unsafe { merge_row(call, plan, partials, range.clone(), values, request, row) };
        }
    }
}

unsafe fn merge_row(
    call: &Call<'_>,
    plan: &Plan,
    partials: Partials,
    range: std::ops::Range<usize>,
    values: &mut [f32],
    request: usize,
    row: usize,
) {
    let (h_q, d_v, scale) = (call.problem.h_q(), call.problem.head_dim_v(), call.problem.softmax_scale());
    let at = |partial: usize| partial * plan.rows + row;
    // SAFETY: partial rows of this request were written; only those that saw a key have an output.
    unsafe {
        let state = |i: usize| (*partials.state.add(2 * at(i)), *partials.state.add(2 * at(i) + 1));
        let seen = |i: &usize| state(*i) != (f32::NEG_INFINITY, 0.0);
        let max = range.clone().map(|i| state(i).0).fold(f32::NEG_INFINITY, f32::max);
        // f32::max drops NaN, which comes back through the weight.
        let weight = |i: usize| ((f64::from(state(i).0) - f64::from(max)) * f64::from(scale)).exp() as f32;
        let sum: f32 = range.clone().filter(seen).map(|i| weight(i) * state(i).1).sum();
        values.fill(0.0);
        for i in range.filter(seen) {
            let weight = weight(i);
            let out = std::slice::from_raw_parts(partials.out.add(at(i) * d_v), d_v);
            values.iter_mut().zip(out).for_each(|(sum, x)| *sum += weight * x);
        }
        if sum != 0.0 {
            let reciprocal = 1.0 / sum;
            values.iter_mut().for_each(|x| *x *= reciprocal);
        }
        call.write_row(request, row / h_q, row % h_q, values, lse(max, sum, scale));
    }
}
