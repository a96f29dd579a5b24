//! The WGSL backend: any adapter that Vulkan, Metal or DX12 reaches, through wgpu.
//!
//! | file | job |
//! |---|---|
//! | `context.rs` | adapter, device, errors |
//! | `memory.rs` | buffers, and where in them tensors lie |
//! | `shaders.rs` | the WGSL files (`shaders/`) and the template that makes variants of them |
//! | `pipelines.rs` | compiled kernels |
//! | `params.rs` | the kernels' parameters, mirrored |
//! | `plan.rs` | the schedule on the device |
//! | `chunks.rs` | cutting a call so that its tensors fit bindings |
//! | `run.rs` | a step: bindings and dispatches |
//! | `submit.rs` | dispatches on their way to the queue |
//! | `timing.rs` | what the bench needs |
//! | `backend.rs` | the backend: paths, and the trait |
//!
//! The queue is the stream: work is done in the order of the calls that enqueue it. A step allocates no buffer; wgpu
//! itself makes bind groups and a command buffer for each.

mod backend;
mod chunks;
mod context;
mod memory;
mod params;
mod pipelines;
mod plan;
mod rounds;
mod run;
pub mod shaders;
mod submit;
mod timing;

/// The crate whose devices, queues and buffers this backend takes.
pub use ::wgpu as api;
pub use backend::WgpuBackend;
pub use context::ADAPTER_VARIABLE;
pub use memory::WgpuBuffer;
pub use plan::WgpuSchedule;

use crate::backend::Unsupported;
use crate::problem::Problem;

/// The backend's name.
pub const NAME: &str = "wgpu";

/// Names the path of the decode kernel: `plain`, `subgroups`, `f16`, `matrix16`, `matrix32`, `matrix64`; the best proven one that the
/// device has otherwise.
pub const PATH_VARIABLE: &str = "POLYMLA_WGPU_PATH";

/// Names the number of workgroups that fill the device, which wgpu does not tell.
pub const WORKGROUPS_VARIABLE: &str = "POLYMLA_WGPU_WORKGROUPS";

/// Names a folder that gets the driver's pipeline cache of every decode kernel that is compiled: machine code, of some drivers, to be read
/// while kernels are tuned (`scripts/wgpu-machine-code.py`).
pub const CACHE_VARIABLE: &str = "POLYMLA_WGPU_CACHE_DIR";

/// What an environment variable says, nothing where it is unset. What is no UTF-8 stays a wrong value, and does not pass for unset.
fn environment(variable: &str) -> String {
    std::env::var_os(variable).unwrap_or_default().to_string_lossy().into_owned()
}

fn refusal(param: &'static str, value: String, limit: impl Into<String>) -> Unsupported {
    Unsupported { backend: NAME, param, value, limit: limit.into() }
}

/// Whether the WGSL kernels can serve `problem`, on an adapter without limits.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub fn supports(problem: &Problem) -> std::result::Result<(), Unsupported> {
    // The counts must fit the kernels' 32-bit fields and the dimensions of a dispatch.
    for (param, value, limit, words) in [
        ("b", problem.b(), 1 << 20, "0..=1048576"),
        ("h_kv", problem.h_kv(), 65_535, "1..=65535"),
        ("s_q x h_q", problem.s_q().saturating_mul(problem.h_q()), 1 << 24, "1..=16777216"),
        ("page_size", problem.page_size(), 1 << 24, "1..=16777216"),
        ("head_dim_k", problem.head_dim_k(), 1 << 20, "1..=1048576"),
    ] {
        if value > limit {
            return Err(refusal(param, value.to_string(), words));
        }
    }
    Ok(())
}
