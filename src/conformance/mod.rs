//! The one routine that checks a backend: golden files, random problems, the comparison, and which backends must run.
//!
//! `cargo test`, the command line and every backend's own runs use [`check`]; nothing else decides what passes.

mod allowance;
mod bad;
mod call;
mod check;
pub mod golden;
mod open;
pub mod random;
mod save;
mod tensor;

pub use bad::{marks_only, with_bad_request};
pub use call::{Call, Expected, Layout};
pub use check::{Errors, LAYOUTS, Outcome, POLICIES, Tolerance, check, check_call, check_with, compare};
pub use golden::{FileError, FileReason};
pub use open::{open_all, required};
pub use tensor::{HostTensor, PoisonedOutputs};
