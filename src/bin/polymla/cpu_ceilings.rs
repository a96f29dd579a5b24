//! What this machine's CPU can do at most, measured in a fraction of a second: the two terms of the floor.

use std::time::Instant;

use rayon::prelude::*;

use crate::suites::Ceilings;

pub fn measure() -> Ceilings {
    Ceilings { read_gbps: read_gbps(), tflops: gflops() / 1e3 }
}

/// Best of five reads of 256 MiB by all threads.
fn read_gbps() -> f64 {
    let words = vec![1u64; 32 << 20];
    let pass = || {
        let start = Instant::now();
        let sum: u64 = words.par_chunks(1 << 16).map(|c| c.iter().fold(0u64, |a, x| a.wrapping_add(*x))).sum();
        std::hint::black_box(sum);
        (words.len() * 8) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

/// Best of five bursts of independent multiply-adds on all threads, by the widest instruction that takes bf16 inputs.
fn gflops() -> f64 {
    let (kernel, flop_per_round) = multiply_add();
    let rounds = 2_000_000u64;
    let burst = || {
        let start = Instant::now();
        rayon::broadcast(|_| kernel(rounds));
        flop_per_round * rounds as f64 * rayon::current_num_threads() as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(|_| burst()).fold(0.0, f64::max)
}

/// A loop of independent multiply-adds and the floating-point operations of one round.
#[cfg(target_arch = "x86_64")]
fn multiply_add() -> (fn(u64), f64) {
    use std::arch::x86_64::*;

    /// Enough chains to cover latency times issue width on every core seen.
    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dpbf16(rounds: u64) {
        let one: __m512bh = std::hint::black_box(_mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0), _mm512_set1_ps(1.0)));
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            acc.iter_mut().for_each(|a| *a = _mm512_dpbf16_ps(*a, one, one));
        }
        std::hint::black_box(acc);
    }
    #[target_feature(enable = "avx512f")]
    fn fma512(rounds: u64) {
        let one = std::hint::black_box(_mm512_set1_ps(1.0));
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            acc.iter_mut().for_each(|a| *a = _mm512_fmadd_ps(one, one, *a));
        }
        std::hint::black_box(acc);
    }
    #[target_feature(enable = "avx2,fma")]
    fn fma256(rounds: u64) {
        let one = std::hint::black_box(_mm256_set1_ps(1.0));
        let mut acc = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            acc.iter_mut().for_each(|a| *a = _mm256_fmadd_ps(one, one, *a));
        }
        std::hint::black_box(acc);
    }
    let chains = CHAINS as f64;
    if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
        // SAFETY: the features were detected on the line above.
        (|rounds| unsafe { dpbf16(rounds) }, chains * 64.0)
    } else if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was detected on the line above.
        (|rounds| unsafe { fma512(rounds) }, chains * 32.0)
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the features were detected on the line above.
        (|rounds| unsafe { fma256(rounds) }, chains * 16.0)
    } else {
        plain()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn multiply_add() -> (fn(u64), f64) {
    plain()
}

/// What the compiler makes of a multiply-add loop for the baseline of the target.
fn plain() -> (fn(u64), f64) {
    const LANES: usize = 32;
    fn kernel(rounds: u64) {
        let one = std::hint::black_box([1.0f32; LANES]);
        let mut acc = [0.0f32; LANES];
        for _ in 0..rounds {
            acc.iter_mut().zip(&one).for_each(|(a, x)| *a += x * x);
        }
        std::hint::black_box(acc);
    }
    (kernel, 2.0 * LANES as f64)
}
