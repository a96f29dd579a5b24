//! Workspaces, schedules and memory that do not go with the call.

use polymla::conformance::HostTensor;
use polymla::cpu::CpuBackend;
use polymla::{
    DType, HostWorkspace, Inputs, KvCache, MlaBackend, MlaError, Outputs, Query, ScheduleOptions, TensorView,
    TensorViewMut, Workspace, get_mla_metadata,
};

use crate::call::*;
use crate::common::backends;

#[test]
fn workspace_too_small() {
    let backend = CpuBackend::new().unwrap();
    // One part a block, so that requests are split and partials need memory.
    let options =
        ScheduleOptions { num_sm_parts: Some(8), policy: polymla::SplitPolicy::BatchInvariant { split_blocks: 1 } };
    let mut long = good();
    long.problem = builder().max_pages_per_seq(COLUMNS * 3).build().unwrap();
    let table: Vec<i32> = (0..B * COLUMNS * 3).map(|i| (i % PAGES) as i32).collect();
    *long.tensor_mut("block_table").unwrap() = HostTensor::from_i32("t", &[B, COLUMNS * 3], &table).unwrap();
    *long.tensor_mut("cache_seqlens").unwrap() = HostTensor::from_i32("l", &[B], &[190, 0, 130]).unwrap();
    let inputs = long.inputs().unwrap();
    let schedule = MlaBackend::schedule(&backend, &long.problem, &options, &inputs, ()).unwrap();
    assert!(schedule.total_partials() >= 6);
    let needed = backend.workspace_bytes(&long.problem, &schedule);
    assert!(needed > 0, "a split schedule needs a workspace");
    let mut results = long.poisoned_outputs().unwrap();
    for given in [0, 1, needed / 2, needed - 1] {
        let mut scratch = HostWorkspace::new();
        let mut outputs = results.outputs().unwrap();
        let mut workspace = scratch.lend(given);
        let error = backend.run(&long.problem, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap_err();
        assert_eq!(error, MlaError::WorkspaceTooSmall { value: given, limit: needed });
        assert!(results.untouched());
    }
    // Misaligned: one byte into memory that would do.
    let mut memory = vec![0u8; needed + 256];
    let odd = memory.as_ptr().align_offset(64) + 1;
    let mut outputs = results.outputs().unwrap();
    let mut workspace = Workspace::from_slice(&mut memory[odd..odd + needed]);
    let error = backend.run(&long.problem, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap_err();
    assert!(matches!(error, MlaError::Alignment { param: "workspace", limit: 64, .. }), "{error}");
    assert!(results.untouched());
    let mut scratch = HostWorkspace::new();
    let mut outputs = results.outputs().unwrap();
    backend.run(&long.problem, &schedule, &mut scratch.lend(needed), &inputs, &mut outputs, ()).unwrap();
    results.check_written().unwrap();
}

#[test]
fn schedule_of_another_problem() {
    let backend = CpuBackend::new().unwrap();
    let call = good();
    let inputs = call.inputs().unwrap();
    let mut results = call.poisoned_outputs().unwrap();
    for (lengths, error) in [
        (vec![40, 0], MlaError::ScheduleMismatch { param: "b", value: 2, limit: 3 }),
        (vec![40, 0, 64, 1], MlaError::ScheduleMismatch { param: "b", value: 4, limit: 3 }),
        (vec![40, 0, 65], MlaError::ScheduleMismatch { param: "blocks of a request", value: 2, limit: 1 }),
        (vec![40, 1, 64], MlaError::ScheduleMismatch { param: "blocks of a request", value: 1, limit: 0 }),
        (vec![0, 0, 64], MlaError::ScheduleMismatch { param: "blocks of a request", value: 0, limit: 1 }),
    ] {
        let schedule = get_mla_metadata(&lengths, 4, Default::default()).unwrap();
        let mut scratch = HostWorkspace::new();
        let mut workspace = scratch.lend(1 << 20);
        let mut outputs = results.outputs().unwrap();
        let got = backend.run(&call.problem, &schedule, &mut workspace, &inputs, &mut outputs, ()).unwrap_err();
        assert_eq!(got, error, "{lengths:?}");
        assert!(results.untouched());
    }
}

#[test]
fn outputs_over_inputs() {
    // `out` over q's memory: what a caller who saves memory might try.
    let call = good();
    let mut memory = vec![0f32; B * S_Q * H_Q * D_K];
    let mut lse = vec![0f32; B * H_Q * S_Q];
    let (address, bytes) = (memory.as_mut_ptr() as u64, 4 * memory.len() as u64);
    let strides = dense(&[B, S_Q, H_Q, D_K]);
    let host = polymla::Device::Host;
    // SAFETY: both views are over `memory`, which outlives them; the call must be refused before it writes.
    let (q, out) = unsafe {
        (
            TensorView::from_raw_parts("q", address, bytes, DType::F32, &[B, S_Q, H_Q, D_K], &strides, host).unwrap(),
            TensorViewMut::from_raw_parts("out", address + 64, bytes - 64, DType::F32, &OUT, &dense(&OUT), host)
                .unwrap(),
        )
    };
    let inputs = Inputs { query: Query::Fused(q), ..call.inputs().unwrap() };
    let mut outputs = Outputs { out, lse: TensorViewMut::from_slice("lse", &mut lse, &LSE).unwrap() };
    for backend in backends() {
        let error = backend.decode(&call.problem, &Default::default(), &inputs, &mut outputs).unwrap_err();
        assert_eq!(error, MlaError::Overlap { param: "out", other: "q", value: 0 });
    }
    assert!(memory.iter().all(|x| *x == 0.0));
}

#[test]
fn tensors_elsewhere() {
    let call = good();
    let gpu = polymla::Device::Accelerator { platform: "cuda", ordinal: 0 };
    let shape = [PAGES, PAGE, 1, D_K];
    // SAFETY: the address is of a device that is not there; the call must be refused before it reads.
    let k = unsafe {
        TensorView::from_raw_parts("k_cache", 0x1000, 1 << 20, DType::F32, &shape, &dense(&shape), gpu).unwrap()
    };
    let inputs = Inputs { kv_cache: KvCache::Fused(k), ..call.inputs().unwrap() };
    let mut results = call.poisoned_outputs().unwrap();
    let mut outputs = results.outputs().unwrap();
    for backend in backends() {
        let error = backend.decode(&call.problem, &Default::default(), &inputs, &mut outputs).unwrap_err();
        let limit = polymla::Device::Host;
        assert_eq!(error, MlaError::WrongDevice { param: "k_cache", value: gpu, limit });
    }
    assert!(results.untouched());
}

#[test]
fn misaligned_memory() {
    let bytes = [0u64; 8];
    let address = bytes.as_ptr() as u64 + 1;
    // SAFETY: 63 bytes from there are readable.
    let view = unsafe { TensorView::from_raw_parts("q", address, 63, DType::Bf16, &[4], &[1], polymla::Device::Host) };
    assert_eq!(view.unwrap_err(), MlaError::Alignment { param: "q", value: address, limit: 2 });
}
