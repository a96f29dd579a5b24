//! NVIDIA devices through the CUDA driver, loaded at run time: what the CUDA backends share, and the backends.
//!
//! | file | job |
//! |---|---|
//! | `driver.rs` | the driver's functions, every return code checked |
//! | `context.rs` | a device's context; makes it current for a call and restores what was current |
//! | `api.rs` | memory, streams, launches, for `src/device` |
//! | `kernels.rs`, `nvrtc.rs` | from sources to binaries, over [`crate::kernels`] |
//! | `sm90/` | the Hopper backend |
//! | `portable.rs` | the portable kernels on every other device |

mod api;
mod context;
mod driver;
#[cfg(feature = "sm90")]
mod kernels;
mod nvrtc;
#[cfg(feature = "cuda")]
pub mod portable;
#[cfg(feature = "sm90")]
pub mod sm90;

#[cfg(feature = "sm90")]
pub use kernels::CompiledKernels;
pub use nvrtc::NVRTC_VARIABLE;

pub use crate::device::{DeviceBuffer, Graph, HostPlan, OwnedStream, Stream};
pub use crate::kernels::{CACHE_VARIABLE, Compiled, KERNEL_DIR_VARIABLE};
