//! Input that only a device can find bad: a request's length or an entry of its table.

use super::call::Call;
use super::tensor::PoisonedOutputs;

/// A copy of `call` whose first request of more than 100 keys has a table entry (`which` even) or a length (odd) out of
/// range, one after the other of those worth trying; and that request. None where no request is as long.
pub fn with_bad_request(call: &Call, which: usize) -> Option<(Call, usize)> {
    let victim = call.cache_seqlens().iter().position(|n| *n > 100)?;
    let mut bad = call.clone();
    if which.is_multiple_of(2) {
        let used = (call.cache_seqlens()[victim] as usize).div_ceil(call.problem.page_size());
        let entry = [call.problem.num_pages() as i32, -1, i32::MAX, i32::MIN][which / 2 % 4];
        let position = [0, used / 2, used - 1][which % 3];
        bad.tensor_mut("block_table")?.set(&[victim, position], f64::from(entry));
    } else {
        let limit = call.problem.max_tokens_per_seq() as i32;
        let length = [-1, i32::MIN, limit + 1, i32::MAX][which / 2 % 4];
        bad.tensor_mut("cache_seqlens")?.set(&[victim], f64::from(length));
    }
    Some((bad, victim))
}

/// Whether all that a run of [`with_bad_request`]'s copy wrote for `victim` is NaN, and nothing leaked over: the others'
/// results are near those of `call`, whose expected values are known. How near is the business of other checks.
///
/// # Errors
/// The first element that is neither, in words.
pub fn marks_only(call: &Call, victim: usize, results: &PoisonedOutputs) -> Result<(), String> {
    let expected = call.expected.as_ref().ok_or("the call has no expected values")?;
    let (out, lse) = (results.out.to_f64(), results.lse.to_f64());
    for (name, values, wanted) in [("out", &out, &expected.out), ("lse", &lse, &expected.lse)] {
        let each = values.len() / call.problem.b();
        for (at, (value, wanted)) in values.iter().zip(wanted).enumerate() {
            let (good, due) = if at / each == victim {
                (value.is_nan(), f64::NAN)
            } else {
                (value == wanted || (value - wanted).abs() <= 0.05 * wanted.abs().max(1.0), *wanted)
            };
            if !good {
                return Err(format!("{}: {name}[{at}] is {value}, not {due}", call.name));
            }
        }
    }
    Ok(())
}
