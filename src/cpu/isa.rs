//! Which instruction sets there are, which this CPU has, and which kernels go with them.

use std::fmt;

use crate::error::{MlaError, Result};
use crate::problem::{KvFormat, Problem};

use super::tile::Kernels;
use super::wide;

/// The environment variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "POLYMLA_CPU_ISA";

/// A code path of the CPU backend, in the order of what it asks of the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, whatever the target has.
    Portable,
    /// aarch64: NEON, four lanes.
    Neon,
    /// x86-64: AVX2, FMA and F16C, eight lanes.
    Avx2,
    /// x86-64: AVX-512F, sixteen lanes.
    Avx512f,
    /// x86-64: as AVX-512F, and bf16 products by `vdpbf16ps`.
    Avx512Bf16,
}

impl Isa {
    /// All of them, in order.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512f, Isa::Avx512Bf16];

    /// Its name, as [`ISA_VARIABLE`] takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512f => "avx512f",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512f => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512f | Isa::Avx512Bf16 => false,
        }
    }

    /// Those this CPU has, in order; never empty.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The one to take where nobody names one: the last of [`available`](Self::available), except that Intel's
    /// `vdpbf16ps` has a quarter of the rate of its f32 FMA, for twice the products: there, f32 is faster.
    pub fn preferred() -> Isa {
        let mut available = Isa::available();
        if is_intel() {
            available.retain(|isa| *isa != Isa::Avx512Bf16);
        }
        available.last().copied().unwrap_or(Isa::Portable)
    }

    /// [`preferred`](Self::preferred), or the one that [`ISA_VARIABLE`] names.
    ///
    /// # Errors
    /// [`MlaError::Environment`] where the variable names none, or one this CPU lacks.
    pub fn from_environment() -> Result<Isa> {
        let Some(value) = std::env::var_os(ISA_VARIABLE).filter(|v| !v.is_empty()) else {
            return Ok(Isa::preferred());
        };
        let available = Isa::available();
        available.iter().copied().find(|isa| value == isa.name()).ok_or_else(|| MlaError::Environment {
            param: ISA_VARIABLE,
            value: value.to_string_lossy().into_owned(),
            limit: available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ") + " (what this CPU has)",
        })
    }

    /// The kernels for a problem; `None` for a cache format they cannot read.
    pub(super) fn kernels(self, problem: &Problem) -> Option<&'static Kernels> {
        macro_rules! pick {
            ($module:ident) => {
                match problem.kv_format() {
                    KvFormat::Bf16 => &wide::$module::BF16,
                    KvFormat::F16 => &wide::$module::F16,
                    KvFormat::F32 => &wide::$module::F32,
                }
            };
        }
        // Pairs of columns must not straddle the end of a token or of one of its parts.
        #[cfg(target_arch = "x86_64")]
        let even = problem.head_dim_k().is_multiple_of(2) && problem.head_dim_v().is_multiple_of(2);
        Some(match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => pick!(avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 if problem.kv_format() == KvFormat::Bf16 && even => &super::pairs::BF16,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512f | Isa::Avx512Bf16 => pick!(avx512f),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pick!(neon),
            _ => pick!(portable),
        })
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe, reason = "__cpuid is an unsafe function until Rust 1.94")]
fn is_intel() -> bool {
    // SAFETY: every x86-64 CPU has CPUID.
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
