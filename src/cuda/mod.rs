//! NVIDIA devices through the CUDA driver, loaded at run time: what the CUDA backends share, and the backends.
//!
//! | file | job |
//! |---|---|
//! | `driver.rs` | the driver's functions, every return code checked |
//! | `context.rs` | a device's context; makes it current for a call and restores what was current |
//! | `memory.rs`, `stream.rs` | buffers, host words; borrowed streams, events, graphs |
//! | `kernels.rs`, `nvrtc.rs` | from sources to functions, over [`crate::kernels`] |
//! | `launch.rs` | launches, with programmatic dependence |
//! | `sm90/` | the Hopper backend |

mod context;
mod driver;
mod kernels;
mod launch;
mod memory;
mod nvrtc;
#[cfg(feature = "sm90")]
pub mod sm90;
mod stream;

pub use kernels::{CompiledKernels, KERNEL_DIR_VARIABLE};
pub use memory::DeviceBuffer;
pub use nvrtc::NVRTC_VARIABLE;
pub use stream::{Graph, OwnedStream, Stream};

pub use crate::kernels::{CACHE_VARIABLE, Compiled};
