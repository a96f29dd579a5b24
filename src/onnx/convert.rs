//! bf16 tensors for a graph of f16.

use half::{bf16, f16};

/// What the conversion of a tensor lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Losses {
    /// Elements beyond f16's largest number, 65504, which became it.
    pub saturated: usize,
    /// Elements below f16's smallest normal number, 2^-14, that changed: by 2^-25 at the most.
    pub rounded: usize,
}

/// Converts bf16 elements to f16.
///
/// | element | becomes |
/// |---|---|
/// | 2^-14 <= abs(x) <= 65504, and 0 | itself: f16 has three more bits of precision |
/// | abs(x) < 2^-14 | the nearest f16, ties to even: off by 2^-25 at the most |
/// | 65504 < abs(x), infinities included | 65504 with its sign: an infinite key would make a whole row NaN |
/// | NaN | NaN |
///
/// What is lost is counted, so that a caller can refuse it. NaN and infinities that no result depends on (past
/// cache_seqlens) are not counted as losses where they are NaN, and are where they are infinite.
pub fn to_f16(values: &[bf16]) -> (Vec<f16>, Losses) {
    let mut losses = Losses::default();
    let converted = values.iter().map(|x| {
        let wide = x.to_f32();
        if wide.abs() > f16::MAX.to_f32() {
            losses.saturated += 1;
            return if wide < 0.0 { f16::MIN } else { f16::MAX };
        }
        let narrow = f16::from_f32(wide);
        losses.rounded += usize::from(narrow.to_f32() != wide && !wide.is_nan());
        narrow
    });
    (converted.collect(), losses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bf16 there is.
    #[test]
    fn the_rule_holds_for_all_of_them() {
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            let wide = x.to_f64();
            let (got, losses) = to_f16(&[x]);
            let got = got[0].to_f64();
            if wide.is_nan() {
                assert!(got.is_nan() && losses == Losses::default());
            } else if wide.abs() > 65504.0 {
                assert_eq!((got, losses), (65504.0f64.copysign(wide), Losses { saturated: 1, rounded: 0 }));
            } else if wide == 0.0 || wide.abs() >= 2f64.powi(-14) {
                assert_eq!((got, losses), (wide, Losses::default()));
            } else {
                assert!((got - wide).abs() <= 2f64.powi(-25), "{wide:e} became {got:e}");
                assert_eq!(losses, Losses { saturated: 0, rounded: usize::from(got != wide) });
            }
        }
    }
}
