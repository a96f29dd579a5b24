//! The portable kernels (`backends/portable/`) as a host sees them, whatever driver launches them.
//!
//! | file | job |
//! |---|---|
//! | `backend.rs` | the backend, over [`crate::device`] |
//! | `params.rs` | the kernels' parameters, mirrored |
//! | `plan.rs` | the schedule, made on the device |
//! | `call.rs` | what is supported; what the kernels are told about a call |
//! | `tiles.rs` | which kernel serves which problem, and its launch |
//! | `kernels.rs`, `units.rs` | a dialect's binaries; how they are compiled |
//! | `source.rs` | one self-contained source for a dialect |

mod backend;
mod call;
mod kernels;
mod params;
mod plan;
mod source;
mod tiles;
pub(crate) mod units;

pub use backend::PortableBackend;
pub(crate) use call::{params, supports};
pub use kernels::MODULE_DIR_VARIABLE;
pub(crate) use kernels::{Dialect, Kernels};
pub use plan::PortableSchedule;
use source::Files;
pub(crate) use tiles::TileClass;

mod built {
    include!(concat!(env!("OUT_DIR"), "/portable_kernels.rs"));
}

/// The portable sources.
const FILES: Files<'static> = built::FILES;
