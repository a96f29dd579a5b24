//! Calls, buffers and devices that are refused.

use polymla::wgpu::{WgpuBackend, api};
use polymla::{DType, Device, Inputs, MlaBackend, MlaError, Query, ScheduleOptions, TensorView, Workspace};

use crate::device::{HEADS, TABLE, Tensors, description, now};

#[test]
fn calls_that_cannot_run_are_errors() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let tensors = Tensors::new(&backend, &[200, 40, 256], &TABLE, None);
    let (problem, options) = (&tensors.problem, ScheduleOptions::default());
    let schedule = backend.schedule(problem, &options, &tensors.inputs(), ()).expect("a schedule");
    let bytes = backend.workspace_bytes(problem, &schedule);
    let mut scratch = backend.alloc(bytes + 512).expect("workspace");
    let device = MlaBackend::info(&backend).device;
    let run = |workspace: &mut Workspace<'_>, inputs: &Inputs<'_>| {
        backend.run(problem, &schedule, workspace, inputs, &mut tensors.outputs(), ())
    };

    let buffer = scratch.buffer().clone();
    let mut small = Workspace::from_object(&buffer, 0, bytes - 1, device);
    assert!(matches!(run(&mut small, &tensors.inputs()), Err(MlaError::WorkspaceTooSmall { .. })));
    let mut crooked = Workspace::from_object(&buffer, 4, bytes, device);
    assert!(matches!(run(&mut crooked, &tensors.inputs()), Err(MlaError::Alignment { param: "workspace", .. })));
    let mut claims = Workspace::from_object(&buffer, 256, bytes * 2, device);
    assert!(matches!(run(&mut claims, &tensors.inputs()), Err(MlaError::StrideOverrun { param: "workspace", .. })));
    let text = String::from("no buffer");
    let mut other = Workspace::from_object(&text, 0, bytes, device);
    assert!(matches!(run(&mut other, &tensors.inputs()), Err(MlaError::Unsupported(_))));
    let mut shared = Workspace::from_object(tensors.buffers[1].buffer(), 0, bytes, device);
    assert!(run(&mut shared, &tensors.inputs()).is_err());
    let mut memory = [0u8; 64];
    let mut host = Workspace::from_slice(&mut memory);
    assert!(run(&mut host, &tensors.inputs()).is_err());

    let good = |workspace: &mut Workspace<'_>| run(workspace, &tensors.inputs());
    assert_eq!(good(&mut backend.workspace(&mut scratch)), Ok(()));
    let (dtype, shape, strides) = description(DType::Bf16, &[3, 1, HEADS, 576]);
    let mut inputs = tensors.inputs();
    let q = TensorView::from_object("q", &text, 0, 1 << 20, dtype, &shape, &strides, device).expect("claims");
    inputs.query = Query::Fused(q);
    let refused = run(&mut backend.workspace(&mut scratch), &inputs);
    assert!(matches!(refused, Err(MlaError::Unsupported(ref u)) if u.param == "q"), "{refused:?}");
    // A view that claims more than its buffer has.
    let short = tensors.buffers[6].buffer();
    let q = TensorView::from_object("q", short, 0, 1 << 20, dtype, &shape, &strides, device).expect("claims");
    inputs.query = Query::Fused(q);
    let refused = run(&mut backend.workspace(&mut scratch), &inputs);
    assert!(matches!(refused, Err(MlaError::StrideOverrun { param: "q", .. })), "{refused:?}");
    // Elsewhere.
    let mut elsewhere = tensors.inputs();
    let strides = [1];
    elsewhere.cache_seqlens = TensorView::from_object(
        "cache_seqlens",
        tensors.buffers[3].buffer(),
        0,
        12,
        DType::I32,
        &[3],
        &strides,
        Device::Accelerator { platform: "wgpu", ordinal: 7 },
    )
    .expect("claims");
    let refused = run(&mut backend.workspace(&mut scratch), &elsewhere);
    assert!(matches!(refused, Err(MlaError::WrongDevice { param: "cache_seqlens", .. })), "{refused:?}");
}

/// Buffers that wgpu refuses, each in place of a good one: an error, after which the backend is as good as before.
#[test]
fn buffers_that_do_not_suit_are_errors() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let other = super::backend(WgpuBackend::new).expect("as before");
    let tensors = Tensors::new(&backend, &[200, 40, 256], &TABLE, None);
    let (problem, options) = (&tensors.problem, ScheduleOptions::default());
    let schedule = backend.schedule(problem, &options, &tensors.inputs(), ()).expect("a schedule");
    let bytes = backend.workspace_bytes(problem, &schedule);
    let mut scratch = backend.alloc(bytes).expect("workspace");
    let device = MlaBackend::info(&backend).device;
    let make = |usage, mapped_at_creation| {
        let size = (3 * HEADS * 576 * 2).max(bytes).next_multiple_of(16) as u64;
        backend.device().create_buffer(&api::BufferDescriptor { label: None, size, usage, mapped_at_creation })
    };
    let usual = api::BufferUsages::STORAGE | api::BufferUsages::COPY_DST;
    let destroyed = make(usual, false);
    destroyed.destroy();
    let size = 3 * HEADS * 576 * 2;
    for (what, buffer) in [
        ("another device's", other.alloc(size.max(bytes)).expect("a buffer").buffer().clone()),
        ("not for kernels", make(api::BufferUsages::COPY_DST, false)),
        ("mapped", make(usual, true)),
        ("destroyed", destroyed),
    ] {
        let (dtype, shape, strides) = description(DType::Bf16, &[3, 1, HEADS, 576]);
        let mut inputs = tensors.inputs();
        let q = TensorView::from_object("q", &buffer, 0, size as u64, dtype, &shape, &strides, device).expect(what);
        inputs.query = Query::Fused(q);
        let mut workspace = backend.workspace(&mut scratch);
        let refused = backend.run(problem, &schedule, &mut workspace, &inputs, &mut tensors.outputs(), ());
        assert!(matches!(refused, Err(MlaError::Platform { backend: "wgpu", .. })), "q {what}: {refused:?}");
        let mut inputs = tensors.inputs();
        let (dtype, shape, strides) = description(DType::I32, &[3]);
        let lengths = TensorView::from_object("cache_seqlens", &buffer, 0, 12, dtype, &shape, &strides, device);
        inputs.cache_seqlens = lengths.expect(what);
        let refused = backend.schedule(problem, &options, &inputs, ()).map(|_| ());
        assert!(matches!(refused, Err(MlaError::Platform { backend: "wgpu", .. })), "lengths {what}: {refused:?}");
        let mut workspace = Workspace::from_object(&buffer, 0, bytes, device);
        let refused = backend.run(problem, &schedule, &mut workspace, &tensors.inputs(), &mut tensors.outputs(), ());
        assert!(matches!(refused, Err(MlaError::Platform { backend: "wgpu", .. })), "workspace {what}: {refused:?}");
    }
    let mut workspace = backend.workspace(&mut scratch);
    let ran = backend.run(problem, &schedule, &mut workspace, &tensors.inputs(), &mut tensors.outputs(), ());
    assert_eq!(ran.and_then(|()| backend.finish(&schedule, ())), Ok(()));
}

/// Outputs over inputs, in one buffer of the caller's.
#[test]
fn outputs_over_inputs_are_refused() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let tensors = Tensors::new(&backend, &[200, 40, 256], &TABLE, None);
    let problem = &tensors.problem;
    let schedule = backend.schedule(problem, &ScheduleOptions::default(), &tensors.inputs(), ()).expect("a schedule");
    let mut scratch = backend.alloc(backend.workspace_bytes(problem, &schedule)).expect("workspace");
    let mut outputs = tensors.outputs();
    outputs.out = tensors.view_mut("out", 1, DType::Bf16, &[3, 1, HEADS, 512]);
    let mut workspace = backend.workspace(&mut scratch);
    let refused = backend.run(problem, &schedule, &mut workspace, &tensors.inputs(), &mut outputs, ());
    assert!(matches!(refused, Err(MlaError::Overlap { param: "out", other: "k_cache", .. })), "{refused:?}");
}

#[test]
fn too_much_memory_is_an_error() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    for bytes in [1usize << 45, usize::MAX / 2, usize::MAX] {
        assert!(matches!(backend.alloc(bytes), Err(MlaError::Platform { backend: "wgpu", .. })), "{bytes}");
    }
    assert!(backend.alloc(64).is_ok(), "the device is still good");
}

/// Devices that were opened with less than the kernels need.
#[test]
fn devices_with_lower_limits_are_refused() {
    if super::backend(WgpuBackend::new).is_none() {
        return;
    }
    let instance = api::Instance::new(api::InstanceDescriptor::new_without_display_handle());
    let adapter = now(instance.request_adapter(&api::RequestAdapterOptions::default())).expect("an adapter");
    let usual = api::Limits::default;
    for (param, required_limits) in [
        ("max_storage_buffers_per_shader_stage", api::Limits::downlevel_webgl2_defaults()),
        ("max_storage_buffer_binding_size", api::Limits { max_storage_buffer_binding_size: 128, ..usual() }),
        ("max_storage_buffers_per_shader_stage", api::Limits::downlevel_defaults()),
        ("max_compute_workgroup_storage_size", api::Limits { max_compute_workgroup_storage_size: 8 << 10, ..usual() }),
        ("max_compute_invocations_per_workgroup", api::Limits { max_compute_invocations_per_workgroup: 64, ..usual() }),
        ("max_compute_workgroup_size_x", api::Limits { max_compute_workgroup_size_x: 64, ..usual() }),
        ("max_compute_workgroups_per_dimension", api::Limits { max_compute_workgroups_per_dimension: 100, ..usual() }),
        ("max_buffer_size", api::Limits { max_buffer_size: 100, ..usual() }),
    ] {
        let descriptor = api::DeviceDescriptor { required_limits, ..Default::default() };
        let (device, queue) = now(adapter.request_device(&descriptor)).expect(param);
        let refused = WgpuBackend::from_device(adapter.get_info(), device, queue).map(drop);
        let Err(MlaError::Absent { reason, .. }) = &refused else { panic!("{param}: {refused:?}") };
        assert!(reason.contains(param), "{reason}");
    }
}
