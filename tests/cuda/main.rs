//! The backends on CUDA: what only a device can show; and the Hopper kernels under every compiler.
//!
//! | variable | |
//! |---|---|
//! | `POLYMLA_REQUIRE` | lists `sm90`, `cuda` where their absence is a failure |
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

/// The tests that every backend on a device must pass.
macro_rules! on {
    ($module:ident, $backend:ty) => {
        mod $module {
            on!(@ $backend, results: golden_files, random_problems, repeated_runs_give_the_same_bits, batch_invariant_rows_have_the_same_bits_alone, schedules_cover_every_block_once, bad_tables_and_lengths_mark_their_request_only);
            on!(@ $backend, graph: a_captured_step_follows_new_lengths_and_smaller_batches, a_schedule_is_reused_for_a_smaller_batch);
        }
    };
    (@ $backend:ty, $file:ident: $($test:ident),*) => {
        $(
            #[test]
            fn $test() {
                crate::$file::$test::<$backend>();
            }
        )*
    };
}

on!(sm90, polymla::cuda::sm90::Sm90Backend);
#[cfg(feature = "cuda")]
on!(portable, polymla::cuda::portable::PortableBackend);
