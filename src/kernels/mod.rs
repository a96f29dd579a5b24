//! From kernel sources to binaries: what every platform with a run-time compiler shares.
//!
//! | file | job |
//! |---|---|
//! | `obtain.rs` | the order in which a binary is looked for: embedded, module folder, disk cache, compiler |
//! | `rtc.rs` | a run-time compiler, by the names of its functions |
//! | `cache.rs` | compiled kernels on disk |
//! | `folder.rs` | sources from a folder, for tuning |
//! | `whole.rs` | whether a binary is there to its end |

mod cache;
mod folder;
mod obtain;
mod rtc;
mod whole;

pub use cache::CACHE_VARIABLE;
pub(crate) use cache::DiskCache;
pub use folder::KERNEL_DIR_VARIABLE;
pub(crate) use folder::sources_of_environment;
pub(crate) use obtain::{Compilers, Job, Origin, Supplies};
pub use rtc::Compiled;
#[cfg(any(feature = "sm90", all(test, feature = "cuda")))]
pub(crate) use rtc::Compiler;
#[cfg(feature = "driver")]
pub(crate) use rtc::loader_words;
pub(crate) use rtc::{Names, Source};
pub(crate) use whole::is_whole;
