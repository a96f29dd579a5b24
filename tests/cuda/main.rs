//! The Hopper backend: its kernels under every compiler, and what only a device can show.
//!
//! | variable | |
//! |---|---|
//! | `POLYMLA_REQUIRE` | lists `sm90` where its absence is a failure |
//! | `POLYMLA_TEST_NVRTC` | NVRTC libraries to compile the kernels with, separated by `:` |
//! | `POLYMLA_TEST_NVCC` | an nvcc to compile them with |
//! | `POLYMLA_TEST_CUBINS` | a folder that the cubins are written to |
//! | `POLYMLA_TEST_RECORD` | set: write `tests/cuda/resources.txt` anew instead of checking against it |
//! | `POLYMLA_TEST_RANDOM` | how many random problems (300) |

mod compile;
mod device;
mod graph;
mod large;
mod results;
