//! Capture once, replay with other lengths and with a smaller batch.

use polymla::conformance::random::{Limits, random_call};
use polymla::conformance::{Call, compare};
use polymla::cuda::Stream;
use polymla::{Mask, ScheduleOptions, SplitPolicy};

use crate::device::{Placed, Results, Tested, backend, enqueue, rebuilt};

fn batch() -> Call {
    let limits = Limits { max_b: 8, max_work: 40_000_000, ..Limits::deepseek() };
    let calls = (5000..).map(|seed| random_call(seed, &limits).expect("a valid problem"));
    let long = |call: &Call| call.problem.b() >= 5 && call.cache_seqlens().iter().filter(|n| **n > 200).count() >= 3;
    let mut calls = calls.filter(|call| long(call) && call.problem.mask() != Mask::VisibleLengths);
    calls.next().expect("one of many seeds")
}

/// The bits that a step of its own, neither captured nor replanned, gives for these lengths.
fn alone<B: Tested>(backend: &B, call: &Call, options: &ScheduleOptions, lengths: &[i32]) -> (Vec<u8>, Vec<u8>) {
    let mut placed = Placed::new(backend, call);
    placed.buffer("cache_seqlens").write(0, bytemuck::cast_slice(lengths)).expect("new lengths");
    let mut results = Results::new(backend, call.poisoned_outputs().expect("outputs"));
    let (schedule, _scratch) = enqueue(backend, call, options, &placed.inputs(), &mut results).expect("run");
    backend.finish(&schedule, Stream::default()).expect("finish");
    results.read()
}

pub fn a_captured_step_follows_new_lengths_and_smaller_batches<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    let call = batch();
    let full = call.cache_seqlens();
    let b = full.len();
    let half: Vec<i32> = full.iter().map(|n| n / 2).collect();
    let fewer: Vec<i32> = full.iter().enumerate().map(|(i, n)| if i < b / 2 { *n } else { 0 }).collect();
    let rising: Vec<i32> = full.iter().enumerate().map(|(i, n)| n * (i as i32 + 1) / b as i32).collect();
    for policy in [SplitPolicy::default(), SplitPolicy::BatchInvariant { split_blocks: 2 }] {
        let options = ScheduleOptions { num_sm_parts: None, policy };
        let owned = backend.new_stream().expect("stream");
        let mut placed = Placed::new(&backend, &call);
        let mut results = Results::new(&backend, call.poisoned_outputs().expect("outputs"));
        let mut schedule =
            backend.schedule(&call.problem, &options, &placed.inputs(), owned.stream()).expect("schedule");
        let mut scratch = backend.alloc(backend.workspace_bytes(&call.problem, &schedule)).expect("workspace");
        // Kernels are loaded before the capture by `schedule`; nothing else is prepared.
        let mut graph = {
            let inputs = placed.inputs();
            let mut workspace = backend.workspace(&mut scratch);
            let mut outputs = results.outputs();
            owned
                .capture(|stream| {
                    backend.schedule_again(&mut schedule, &call.problem, &inputs.cache_seqlens, stream)?;
                    backend.run(&call.problem, &schedule, &mut workspace, &inputs, &mut outputs, stream)
                })
                .expect("capture")
        };
        for lengths in [&full, &half, &fewer, &rising, &full] {
            placed.buffer("cache_seqlens").write(0, bytemuck::cast_slice(lengths)).expect("new lengths");
            // SAFETY: all that was captured is still there.
            unsafe { graph.launch(owned.stream()) }.expect("launch");
            backend.finish(&schedule, owned.stream()).expect("finish");
            let bits = results.read();
            assert!(bits == alone(&backend, &call, &options, lengths), "{} {policy:?} {lengths:?}", call.name);
        }
        // The last replay had the call's own lengths, whose values are known.
        let errors = compare(call.expected.as_ref().expect("values"), &call.tolerance, &results.host);
        let worst = errors.map(|e| e.worst()).unwrap_or_else(|e| panic!("{}: {e}", call.name));
        assert!(worst <= 1.0, "{} {policy:?}: {worst} of the allowance", call.name);
    }
}

pub fn a_schedule_is_reused_for_a_smaller_batch<B: Tested>() {
    let Some(backend) = backend::<B>() else { return };
    let call = batch();
    for policy in [SplitPolicy::default(), SplitPolicy::BatchInvariant { split_blocks: 1 }] {
        let options = ScheduleOptions { num_sm_parts: None, policy };
        let stream = backend.new_stream().expect("stream");
        let placed = Placed::new(&backend, &call);
        let mut results = Results::new(&backend, call.poisoned_outputs().expect("outputs"));
        let mut schedule =
            backend.schedule(&call.problem, &options, &placed.inputs(), stream.stream()).expect("schedule");
        let mut scratch = backend.alloc(backend.workspace_bytes(&call.problem, &schedule)).expect("workspace");
        let mut graph = {
            let inputs = placed.inputs();
            let mut workspace = backend.workspace(&mut scratch);
            let mut outputs = results.outputs();
            let work = |s| backend.run(&call.problem, &schedule, &mut workspace, &inputs, &mut outputs, s);
            stream.capture(work).expect("capture")
        };
        // Planned outside the graph for the first requests only; the graph still names all of them.
        let count = call.problem.b() / 2;
        let smaller = rebuilt(&call.problem, count, call.problem.num_pages());
        let few = placed.first_requests(count, 0);
        backend.schedule_again(&mut schedule, &smaller, &few.cache_seqlens, stream.stream()).expect("schedule_into");
        // SAFETY: all that was captured is still there.
        unsafe { graph.launch(stream.stream()) }.expect("launch");
        backend.finish(&schedule, stream.stream()).expect("finish");
        results.read();
        let (out, expected) = (results.host.out.to_f64(), call.expected.as_ref().expect("values"));
        let each = out.len() / call.problem.b();
        for (at, (value, wanted)) in out.iter().zip(&expected.out).enumerate().take(each * count) {
            assert!((value - wanted).abs() <= 0.05 * wanted.abs().max(1.0), "out[{at}] is {value}, not {wanted}");
        }
        let poison = call.poisoned_outputs().expect("outputs").out.to_dense_bytes();
        let bytes = results.host.out.to_dense_bytes();
        let from = bytes.len() / call.problem.b() * count;
        assert!(bytes[from..] == poison[from..], "requests beyond the batch were written");
        // And a larger batch than there is room for is refused.
        let error = backend.schedule_again(&mut schedule, &call.problem, &few.cache_seqlens, stream.stream());
        assert!(error.is_err(), "lengths of another batch size must be refused");
    }
}
