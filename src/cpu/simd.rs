//! The vector type that the f32 tile kernels are written on, and its portable form.
//!
//! A kernel is a generic `#[inline(always)]` function over [`Simd`]; each instruction set wraps it once in a function
//! with its `#[target_feature]`, into which everything is inlined. That wrapper is the only place where the features
//! are switched on, so [`Simd`]'s functions are unsafe: outside of such a wrapper they may not exist on this CPU.

use half::{bf16, f16};

/// f32 vectors of one instruction set.
///
/// # Safety
/// Every function needs the CPU features of the implementing type. Pointers need [`LANES`](Simd::LANES) elements, no
/// alignment beyond the element's.
pub(super) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Its f32 elements; a divisor of 16.
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// bf16 elements, widened.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// binary16 elements, widened.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c; fused where the instruction set can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; where `b` is NaN, NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `x` where a < b, else `y`.
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Bits of `v` shifted left by 23, plus the bits of 1.0, both as integers.
    unsafe fn shift_to_exponent(v: Self::V) -> Self::V;
    /// Asks for the cache line at `p`, into the L2; any address will do.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

/// Adding it to a small f32 rounds that to an integer, which then stands in the low bits.
const ROUND: f32 = 12_582_912.0;

/// 2^f = 1 + f * (C[0] + C[1] f + ... + C[5] f^5) for |f| <= 1/2, within 2.6e-9 relative: a Remez fit of the relative
/// error with the constant term held at 1, so that 2^0 is 1 exactly. C[0] rounds to ln 2.
const EXP2: [f32; 6] =
    [std::f32::consts::LN_2, 0.240_226_53, 0.055_503_106, 0.009_617_693, 0.001_340_664_4, 0.000_155_946_77];

/// 2^(x + bias) for x <= 0 and a whole number `bias` from 0 to 100. Results below 2^-126.5 are 0, so -infinity gives 0;
/// NaN stays NaN. The bias enters the exponent, so the precision does not depend on it.
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(x: S::V, bias: S::V) -> S::V {
    // SAFETY: the caller's contract is this trait's.
    unsafe {
        // There the exponent field below becomes 0: the product is +0 whatever the polynomial says.
        let x = S::max(S::sub(S::splat(-127.0), bias), x);
        let rounded = S::add(x, S::splat(ROUND));
        let f = S::sub(x, S::sub(rounded, S::splat(ROUND)));
        let mut poly = S::splat(EXP2[5]);
        for c in EXP2[..5].iter().rev() {
            poly = S::fma(poly, f, S::splat(*c));
        }
        S::mul(S::fma(poly, f, S::splat(1.0)), S::shift_to_exponent(S::add(rounded, bias)))
    }
}

/// Plain Rust: eight lanes in an array, which the compiler maps to whatever the target has (SSE2 on x86-64).
#[derive(Clone, Copy)]
pub(super) struct Portable;

const N: usize = 8;

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = [f32; N];
    const LANES: usize = N;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller's pointer holds LANES elements.
        unsafe { p.cast::<[f32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller's pointer holds LANES elements.
        unsafe { p.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        // SAFETY: the caller's pointer holds LANES elements.
        unsafe { p.cast::<[u16; N]>().read_unaligned() }.map(|x| bf16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        // SAFETY: the caller's pointer holds LANES elements.
        unsafe { p.cast::<[u16; N]>().read_unaligned() }.map(|x| f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not mul_add: without the instruction that is a library call an element.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    unsafe fn shift_to_exponent(v: Self::V) -> Self::V {
        v.map(|x| f32::from_bits((x.to_bits() << 23).wrapping_add(1.0f32.to_bits())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -126.0 * (i as f32) / 2_000_000.0;
            // SAFETY: the portable form needs no features.
            let got = unsafe { exp2::<Portable>([x; N], [0.0; N]) }[0];
            let want = f64::from(x).exp2();
            worst = worst.max((f64::from(got) - want).abs() / want);
            // SAFETY: as above.
            let biased = unsafe { exp2::<Portable>([x; N], [24.0; N]) }[0];
            assert_eq!(biased, got * 24f32.exp2());
        }
        assert!(worst < 2.0f64.powi(-22), "relative error {worst:e}");
    }

    #[test]
    fn exp2_ends() {
        for (x, want) in [(0.0, 1.0), (-1.0, 0.5), (-128.0, 0.0), (-3e38, 0.0), (f32::NEG_INFINITY, 0.0)] {
            // SAFETY: the portable form needs no features.
            assert_eq!(unsafe { exp2::<Portable>([x; N], [0.0; N]) }[0], want);
        }
        for (x, want) in [(0.0, 24.0f32.exp2()), (-140.0, (-116.0f32).exp2()), (-152.0, 0.0), (f32::NEG_INFINITY, 0.0)]
        {
            // SAFETY: as above.
            assert_eq!(unsafe { exp2::<Portable>([x; N], [24.0; N]) }[0], want);
        }
        // SAFETY: as above.
        assert!(unsafe { exp2::<Portable>([f32::NAN; N], [24.0; N]) }[0].is_nan());
    }
}
