//! The portable kernels (`backends/portable/`) as a host sees them, whatever driver launches them.
//!
//! | file | job |
//! |---|---|
//! | `params.rs` | the kernels' parameters, mirrored |
//! | `plan.rs` | the arithmetic of a schedule that is made on the device |
//! | `call.rs` | what is supported; what the kernels are told about a call |
//! | `tiles.rs` | which kernel serves which problem, and its launch |
//! | `units.rs` | how they are compiled |
//! | `source.rs` | one self-contained source for a dialect |

mod call;
mod params;
mod plan;
mod source;
mod tiles;
pub(crate) mod units;

pub(crate) use call::{params, supports};
pub(crate) use params::{DecodeParams, STATUS_OK};
pub(crate) use plan::Plan;
pub(crate) use source::{Files, ROOT, self_contained};
pub(crate) use tiles::{COMBINE_SHARED, Decode, SCHEDULE_SHARED, THREADS, TileClass};

mod built {
    include!(concat!(env!("OUT_DIR"), "/portable_kernels.rs"));
}

/// The portable sources.
pub(crate) const FILES: Files = built::FILES;
