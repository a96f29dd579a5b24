//! What only the device sees, and what becomes of a device that fails.

use polymla::half::bf16;
use polymla::wgpu::shaders::Path;
use polymla::wgpu::{WgpuBackend, api};
use polymla::{
    DType, Inputs, KvCache, Mask, MlaBackend, MlaError, Outputs, Problem, Query, ScheduleOptions, SplitPolicy,
    TensorView, TensorViewMut, get_mla_metadata,
};

pub const HEADS: usize = 3;
const PAGES: usize = 4;
const COLUMNS: usize = 4;

/// Tensors on the device, for lengths and a table of one's choice.
pub struct Tensors<'b> {
    pub backend: &'b WgpuBackend,
    pub problem: Problem,
    pub buffers: Vec<polymla::wgpu::WgpuBuffer>,
}

pub fn description(dtype: DType, shape: &[usize]) -> (DType, Vec<usize>, Vec<usize>) {
    let strides = polymla::tensor::contiguous_strides(shape)[..shape.len()].to_vec();
    (dtype, shape.to_vec(), strides)
}

impl<'b> Tensors<'b> {
    pub fn new(backend: &'b WgpuBackend, lengths: &[i32], table: &[i32], visible: Option<&[i32]>) -> Self {
        let b = lengths.len();
        let mask = if visible.is_some() { Mask::VisibleLengths } else { Mask::None };
        let builder = Problem::builder(b).h_q(HEADS).num_pages(PAGES).max_pages_per_seq(COLUMNS).mask(mask);
        let problem = builder.build().expect("valid");
        let values = |n: usize| -> Vec<u8> {
            let value = |i: usize| bf16::from_f32((i * 7 % 23) as f32 / 16.0 - 0.6);
            (0..n).flat_map(|i| value(i).to_le_bytes()).collect()
        };
        let poison = |n: usize| vec![0x5a; n];
        let contents = [
            values(b * HEADS * 576),
            values(PAGES * 64 * 576),
            bytemuck::cast_slice(table).to_vec(),
            bytemuck::cast_slice(lengths).to_vec(),
            bytemuck::cast_slice(visible.unwrap_or(&[])).to_vec(),
            poison(b * HEADS * 512 * 2),
            poison(b * HEADS * 4),
        ];
        let buffers = contents.iter().map(|bytes| backend.upload(bytes).expect("upload")).collect();
        Tensors { backend, problem, buffers }
    }

    pub fn view(&self, param: &'static str, i: usize, dtype: DType, shape: &[usize]) -> TensorView<'_> {
        let (dtype, shape, strides) = description(dtype, shape);
        let (buffer, device) = (&self.buffers[i], MlaBackend::info(self.backend).device);
        TensorView::from_object(param, buffer.buffer(), 0, buffer.bytes() as u64, dtype, &shape, &strides, device)
            .expect(param)
    }

    pub fn view_mut(&self, param: &'static str, i: usize, dtype: DType, shape: &[usize]) -> TensorViewMut<'_> {
        let (dtype, shape, strides) = description(dtype, shape);
        let (buffer, device) = (&self.buffers[i], MlaBackend::info(self.backend).device);
        TensorViewMut::from_object(param, buffer.buffer(), 0, buffer.bytes() as u64, dtype, &shape, &strides, device)
            .expect(param)
    }

    pub fn inputs(&self) -> Inputs<'_> {
        let b = self.problem.b();
        Inputs {
            query: Query::Fused(self.view("q", 0, DType::Bf16, &[b, 1, HEADS, 576])),
            kv_cache: KvCache::Fused(self.view("k_cache", 1, DType::Bf16, &[PAGES, 64, 1, 576])),
            block_table: self.view("block_table", 2, DType::I32, &[b, COLUMNS]),
            cache_seqlens: self.view("cache_seqlens", 3, DType::I32, &[b]),
            visible_lengths: (self.problem.mask() == Mask::VisibleLengths)
                .then(|| self.view("visible_lengths", 4, DType::I32, &[b, 1])),
        }
    }

    pub fn outputs(&self) -> Outputs<'_> {
        let b = self.problem.b();
        Outputs {
            out: self.view_mut("out", 5, DType::Bf16, &[b, 1, HEADS, 512]),
            lse: self.view_mut("lse", 6, DType::F32, &[b, HEADS, 1]),
        }
    }

    /// Runs, and returns what `finish` said and the outputs.
    fn run(&self, options: &ScheduleOptions) -> (polymla::Result<()>, Vec<bf16>, Vec<f32>) {
        let (backend, problem) = (self.backend, &self.problem);
        let schedule = backend.schedule(problem, options, &self.inputs(), ()).expect("a schedule");
        let mut scratch = backend.alloc(backend.workspace_bytes(problem, &schedule)).expect("workspace");
        let mut workspace = backend.workspace(&mut scratch);
        backend.run(problem, &schedule, &mut workspace, &self.inputs(), &mut self.outputs(), ()).expect("enqueued");
        let verdict = backend.finish(&schedule, ());
        assert_eq!(backend.finish(&schedule, ()), Ok(()), "a failure is reported once");
        let (mut out, mut lse) = (vec![bf16::ZERO; problem.rows() * 512], vec![0f32; problem.rows()]);
        backend.download(&self.buffers[5], bytemuck::cast_slice_mut(&mut out)).expect("out");
        backend.download(&self.buffers[6], bytemuck::cast_slice_mut(&mut lse)).expect("lse");
        (verdict, out, lse)
    }
}

pub const TABLE: [i32; 12] = [0, 3, 1, 2, 2, -1, i32::MAX, 9, 3, 0, 2, 1];

/// Request 1 is spoilt in every way that only the device can see; the others keep their bits.
#[test]
fn bad_requests_are_reported_and_harm_no_other() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    for policy in [SplitPolicy::default(), SplitPolicy::BatchInvariant { split_blocks: 1 }] {
        let options = ScheduleOptions { num_sm_parts: Some(2), policy };
        let (verdict, good_out, good_lse) = Tensors::new(&backend, &[200, 40, 256], &TABLE, None).run(&options);
        assert_eq!(verdict, Ok(()));
        assert!(good_lse.iter().all(|x| x.is_finite()) && good_out.iter().all(|x| x.is_finite()));
        let table = |entry| {
            let mut table = TABLE;
            table[4] = entry;
            table
        };
        let spoilt = [
            ([200, -1, 256], TABLE, None),
            ([200, i32::MIN, 256], TABLE, None),
            ([200, 257, 256], TABLE, None),
            ([200, i32::MAX, 256], TABLE, None),
            ([200, 65, 256], TABLE, None), // reaches entry 5, which is -1
            ([200, 40, 256], table(4), None),
            ([200, 40, 256], table(-1), None),
            ([200, 40, 256], table(i32::MAX), None),
            ([200, 40, 256], TABLE, Some([200, 41, 256])),
            ([200, 40, 256], TABLE, Some([200, -1, 256])),
        ];
        for (lengths, table, visible) in spoilt {
            let tensors = Tensors::new(&backend, &lengths, &table, visible.as_ref().map(|v| &v[..]));
            let (verdict, out, lse) = tensors.run(&options);
            let what = format!("{lengths:?} {table:?} {visible:?} {policy:?}: {verdict:?}");
            assert!(matches!(verdict, Err(MlaError::DeviceCheck { request: 1, .. })), "{what}");
            let (row, rows) = (HEADS * 512, HEADS..2 * HEADS);
            assert!(out[row..2 * row].iter().all(|x| x.is_nan()) && lse[rows].iter().all(|x| x.is_nan()), "{what}");
            // Batch-invariant results do not depend on a neighbour; balanced ones only by where they are cut.
            for i in [0, 2] {
                let same = out[i * row..][..row] == good_out[i * row..][..row];
                let finite = out[i * row..][..row].iter().all(|x| x.is_finite());
                assert!(if policy == SplitPolicy::default() { finite } else { same }, "{what}, request {i}");
            }
        }
    }
}

/// The device's plan is the host's.
#[test]
fn schedules_equal_the_hosts() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let mut rng = fastrand::Rng::with_seed(5);
    for case in 0..120 {
        let b = rng.usize(0..40);
        let lengths: Vec<i32> = (0..b).map(|_| if rng.u8(0..4) == 0 { 0 } else { rng.i32(0..200_000) }).collect();
        let policy = match case % 3 {
            0 => SplitPolicy::Balanced { overhead_blocks: rng.u32(0..9) },
            1 => SplitPolicy::BatchInvariant { split_blocks: rng.u32(1..40) },
            _ => SplitPolicy::default(),
        };
        let parts = rng.usize(1..200);
        let builder = Problem::builder(b).h_q(HEADS).page_size(64).num_pages(1).max_pages_per_seq(4000);
        let problem = builder.build().expect("valid");
        let device = MlaBackend::info(&backend).device;
        let contents = [vec![0; b * HEADS * 576 * 2], vec![0; 64 * 576 * 2], vec![0; b * 4000 * 4]];
        let buffers = contents.map(|bytes| backend.upload(&bytes).expect("upload"));
        let lens = backend.upload(bytemuck::cast_slice(&lengths)).expect("upload");
        let view = |param, buffer: &'static str, i: Option<usize>, dtype, shape: &[usize]| {
            let memory = i.map_or(&lens, |i| &buffers[i]);
            let (dtype, shape, strides) = description(dtype, shape);
            let bytes = memory.bytes() as u64;
            TensorView::from_object(param, memory.buffer(), 0, bytes, dtype, &shape, &strides, device).expect(buffer)
        };
        let inputs = Inputs {
            query: Query::Fused(view("q", "q", Some(0), DType::Bf16, &[b, 1, HEADS, 576])),
            kv_cache: KvCache::Fused(view("k_cache", "k", Some(1), DType::Bf16, &[1, 64, 1, 576])),
            block_table: view("block_table", "table", Some(2), DType::I32, &[b, 4000]),
            cache_seqlens: view("cache_seqlens", "lengths", None, DType::I32, &[b]),
            visible_lengths: None,
        };
        let options = ScheduleOptions { num_sm_parts: Some(parts), policy };
        let schedule = backend.schedule(&problem, &options, &inputs, ()).expect("a schedule");
        let (got_parts, got_splits) = backend.plan(&schedule).expect("a copy");
        let want = get_mla_metadata(&lengths, parts, policy).expect("a plan");
        assert_eq!(got_splits, want.num_splits(), "{lengths:?} {policy:?} {parts} parts");
        assert_eq!(got_parts, want.tile_scheduler_metadata(), "{lengths:?} {policy:?} {parts} parts");
    }
}

#[test]
fn tiles_of_any_size_fill_buffers_to_the_end() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    // The last is what a copy of each tile would take minutes for.
    for (tile, bytes) in [(3, 1001), (4, 1001), (12, 12), (4096, 5), ((1 << 20) + 4, 5 << 20), (4, (128 << 20) + 2)] {
        let tile: Vec<u8> = (0..tile).map(|i| (i % 251) as u8 + 1).collect();
        let buffer = backend.upload_repeated(&tile, bytes).expect("a buffer");
        let mut whole = vec![0; bytes];
        backend.download(&buffer, &mut whole).expect("a copy");
        let right = whole.chunks(tile.len()).all(|piece| piece == &tile[..piece.len()]);
        assert!(right, "{} bytes repeated to {bytes}", tile.len());
    }
}

/// Copies to the device go by way of memory of wgpu's own, which is free again once they are submitted: a program that
/// uploads a model before it runs anything must not hold it twice.
#[test]
#[cfg(target_os = "linux")]
fn uploads_do_not_pile_up() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
        pages.split(' ').nth(1).expect("the second number").parse::<usize>().expect("a number") * 4096
    };
    let (bytes, before) = (vec![1u8; 32 << 20], resident());
    for _ in 0..64 {
        backend.upload(&bytes).expect("a buffer, which is dropped");
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 1 << 30, "64 buffers of 32 MiB, one at a time, left {} MiB", grown >> 20);
}

#[test]
fn a_lost_device_is_an_error_everywhere() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let tensors = Tensors::new(&backend, &[200, 40, 256], &TABLE, None);
    let (problem, options) = (&tensors.problem, ScheduleOptions::default());
    let schedule = backend.schedule(problem, &options, &tensors.inputs(), ()).expect("a schedule");
    let mut scratch = backend.alloc(backend.workspace_bytes(problem, &schedule)).expect("workspace");
    // wgpu tells of a loss once the queue is empty.
    assert_eq!(backend.finish(&schedule, ()), Ok(()));
    backend.device().destroy();
    let lost = |result: polymla::Result<()>| match result {
        Err(MlaError::Platform { backend: "wgpu", message, .. }) => assert!(!message.is_empty()),
        other => panic!("{other:?}"),
    };
    lost(backend.alloc(64).map(drop));
    lost(backend.upload(&[1, 2, 3, 4]).map(drop));
    lost(backend.download(&tensors.buffers[5], &mut [0; 4]));
    lost(backend.schedule(problem, &options, &tensors.inputs(), ()).map(drop));
    let mut workspace = backend.workspace(&mut scratch);
    lost(backend.run(problem, &schedule, &mut workspace, &tensors.inputs(), &mut tensors.outputs(), ()));
    lost(backend.finish(&schedule, ()));
}

/// Tensors need not begin at multiples of anything but their element.
#[test]
fn tensors_may_begin_anywhere_in_a_buffer() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    // With matrices rows that begin at 16 bytes would take another path than those that do not, and have other bits.
    let path = if backend.has(Path::Subgroups) { Path::Subgroups } else { Path::Plain };
    let backend = backend.with_path(path).expect("the adapter has it");
    let tensors = Tensors::new(&backend, &[200, 40, 256], &TABLE, None);
    let options = ScheduleOptions { num_sm_parts: None, policy: SplitPolicy::BATCH_INVARIANT };
    let (verdict, want_out, want_lse) = tensors.run(&options);
    assert_eq!(verdict, Ok(()));
    let device = MlaBackend::info(&backend).device;
    for shift in [2usize, 258, 1030] {
        let shifted: Vec<_> = [0usize, 1]
            .into_iter()
            .map(|i| {
                let mut bytes = vec![0xff; shift + tensors.buffers[i].bytes()];
                backend.download(&tensors.buffers[i], &mut bytes[shift..]).expect("a copy");
                backend.upload(&bytes).expect("upload")
            })
            .collect();
        let view = |param, i: usize, shape: &[usize]| {
            let (dtype, shape, strides) = description(DType::Bf16, shape);
            let (buffer, bytes) = (shifted[i].buffer(), tensors.buffers[i].bytes() as u64);
            TensorView::from_object(param, buffer, shift as u64, bytes, dtype, &shape, &strides, device).expect(param)
        };
        let mut inputs = tensors.inputs();
        inputs.query = Query::Fused(view("q", 0, &[3, 1, HEADS, 576]));
        inputs.kv_cache = KvCache::Fused(view("k_cache", 1, &[PAGES, 64, 1, 576]));
        let out_bytes = 3 * HEADS * 512 * 2;
        let out_buffer = backend.upload(&vec![0x77; shift + out_bytes + 2]).expect("out");
        let mut outputs = tensors.outputs();
        let (dtype, shape, strides) = description(DType::Bf16, &[3, 1, HEADS, 512]);
        outputs.out = TensorViewMut::from_object(
            "out",
            out_buffer.buffer(),
            shift as u64,
            out_bytes as u64,
            dtype,
            &shape,
            &strides,
            device,
        )
        .expect("out");
        polymla::flash_mla_with_kvcache(&backend, &tensors.problem, &options, &inputs, &mut outputs, ()).expect("runs");
        let mut bytes = vec![0u8; shift + out_bytes + 2];
        backend.download(&out_buffer, &mut bytes).expect("out");
        assert!(bytes[..shift].iter().chain(&bytes[shift + out_bytes..]).all(|b| *b == 0x77), "bytes around out");
        let got: Vec<bf16> =
            bytes[shift..shift + out_bytes].chunks(2).map(|c| bf16::from_le_bytes([c[0], c[1]])).collect();
        assert!(got == want_out, "shift {shift}");
        let mut lse = vec![0f32; want_lse.len()];
        backend.download(&tensors.buffers[6], bytemuck::cast_slice_mut(&mut lse)).expect("lse");
        assert_eq!(lse, want_lse);
    }
}

/// One backend from many threads: wgpu calls back on whichever thread polls.
#[test]
fn threads_may_share_a_backend() {
    let Some(backend) = super::backend(WgpuBackend::new) else { return };
    let options = ScheduleOptions { num_sm_parts: Some(2), policy: SplitPolicy::BATCH_INVARIANT };
    let (_, want_out, want_lse) = Tensors::new(&backend, &[200, 40, 256], &TABLE, None).run(&options);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..40 {
                    let (verdict, out, lse) = Tensors::new(&backend, &[200, 40, 256], &TABLE, None).run(&options);
                    assert_eq!(verdict, Ok(()));
                    assert!(out == want_out && lse == want_lse);
                }
            });
        }
    });
}

/// The answer of a future that natively is there at once.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("the future waits"),
    }
}

/// A device, queue and buffers of the caller's, which go on living when the backend is gone.
#[test]
fn a_callers_device_and_buffers_are_borrowed() {
    let Some(own) = super::backend(WgpuBackend::new) else { return };
    let options = ScheduleOptions { num_sm_parts: Some(2), policy: SplitPolicy::BATCH_INVARIANT };
    let (_, want_out, _) = Tensors::new(&own, &[200, 40, 256], &TABLE, None).run(&options);

    let instance = api::Instance::new(api::InstanceDescriptor::new_without_display_handle());
    let adapter = now(instance.request_adapter(&api::RequestAdapterOptions::default())).expect("an adapter");
    let (device, queue) = now(adapter.request_device(&api::DeviceDescriptor::default())).expect("a device");
    let lost = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = lost.clone();
    device.set_device_lost_callback(move |_, _| seen.store(true, std::sync::atomic::Ordering::SeqCst));
    let backend =
        WgpuBackend::from_device(adapter.get_info(), device.clone(), queue.clone()).expect("a backend over it");
    assert_eq!(backend.path(&Problem::builder(1).build().expect("valid")), Path::Plain, "no feature was asked for");
    let (verdict, out, _) = Tensors::new(&backend, &[200, 40, 256], &TABLE, None).run(&options);
    assert_eq!(verdict, Ok(()));
    let close = |(a, b): (&bf16, &bf16)| (a.to_f32() - b.to_f32()).abs() <= 0.01 * b.to_f32().abs().max(0.1);
    assert!(out.iter().zip(&want_out).all(close), "other paths, other roundings, the same values");
    drop(backend);
    assert!(device.poll(api::PollType::Poll).is_ok() && !lost.load(std::sync::atomic::Ordering::SeqCst));
    device.destroy();
    assert!(device.poll(api::PollType::Poll).is_ok());
    assert!(lost.load(std::sync::atomic::Ordering::SeqCst), "the caller's callback is still the caller's");
}
