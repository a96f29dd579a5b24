//! The whole host code of HIP, MUSA, MACA and CoreX on this CPU: the backend as users open it, over a library that has the vendor's names
//! and runs the kernels in the fiber harness (`tests/shims/harness.cpp`). It proves our calls, not the vendor's ABI.

#![cfg(all(target_os = "linux", target_env = "gnu"))]

mod shims;

use std::ffi::{CStr, c_char};
use std::path::Path;

use libloading::Library;
use polymla::conformance::random::{Limits, random_call, random_options};
use polymla::conformance::{Layout, check_with};
use polymla::driver::{self, DeviceBuffer, OwnedStream, PortableBackend, PortableSchedule};
use polymla::{
    Device, Evidence, HostBackend, Inputs, KvCache, MlaBackend, MlaError, Outputs, Problem, Query, ScheduleOptions,
    SplitPolicy, TensorView, TensorViewMut, get_mla_metadata,
};
use shims::Case;

const CASES: &[Case] = &[
    #[cfg(feature = "hip")]
    shims::HIP,
    #[cfg(feature = "musa")]
    shims::MUSA,
    #[cfg(feature = "maca")]
    shims::MACA,
    #[cfg(feature = "corex")]
    shims::COREX,
];

/// One test: variables of the environment belong to the process, and a driver is loaded once in it.
#[test]
fn the_backends_are_right_from_library_to_result() {
    for case in CASES {
        one(case);
    }
}

fn one(case: &Case) {
    let (vendor, arch, warp) = (case.name, case.arch, case.vendor.devices[case.device].warp);
    let folder = shims::scratch(&format!("{vendor}-cpu"));
    let (library, cache) = (folder.join("library.so"), folder.join("cache"));
    shims::build(&library, case, warp, "");
    // SAFETY: this test is alone in its process, and no other thread reads the environment now.
    unsafe {
        for variable in case.variables {
            std::env::set_var(variable, &library);
        }
        std::env::set_var(driver::CACHE_VARIABLE, &cache);
    }
    // CoreX has no run-time compiler: its kernels come from the folder of modules.
    let compiles = case.vendor.compiler;
    if !compiles {
        std::fs::create_dir_all(&cache).expect("the target folder");
        for (name, _) in driver::kernel_source(vendor, arch).expect(arch).binaries {
            std::fs::write(cache.join(name), [shims::CODE, &[0; 31]].concat()).expect("the target folder");
        }
        // SAFETY: as above.
        unsafe { std::env::set_var(driver::MODULE_DIR_VARIABLE, &cache) };
    }
    let backend = driver::open(vendor).expect("the library has a device");
    let info = MlaBackend::info(&backend);
    assert_eq!(info.device, Device::Accelerator { platform: info.name, ordinal: 1 }, "device 0 has warps of 16");
    assert!(
        info.name == vendor
            && info.device_name.contains(arch)
            && info.device_name.contains(if compiles { "compiled by" } else { "module folder" }),
        "{info:?}"
    );
    assert_eq!(info.evidence, Evidence::T3, "the library says that it stands in for the vendor's");
    let cached = driver::open_device(vendor, 1).expect("again");
    let again = if compiles { "disk cache" } else { "module folder" };
    assert!(MlaBackend::info(&cached).device_name.contains(again), "{cached:?}");
    let refused = driver::open_device(vendor, 0).expect_err("warps of 16").to_string();
    assert!(refused.contains("warp size 16") && refused.contains(&warp.to_string()), "{refused}");
    assert!(matches!(driver::open_device(vendor, 7), Err(MlaError::Absent { .. })));

    nothing_leaks_where_a_call_fails(case, &library);
    shims::golden_files(&backend);
    random_problems(&backend);
    schedules(&backend);
    bad_lengths_are_reported(&backend);
    let _ = std::fs::remove_dir_all(&folder);
}

fn random_problems(backend: &PortableBackend) {
    let small = Limits { max_tokens: 300, max_work: 2_000_000, ..Limits::any() };
    let tuned = Limits {
        max_b: 4,
        max_s_q: 2,
        max_heads_per_kv: 20,
        max_tokens: 500,
        max_work: 4_000_000,
        ..Limits::deepseek()
    };
    for seed in 0..24 {
        let call = random_call(seed, if seed % 2 == 0 { &small } else { &tuned }).expect("a call");
        if HostBackend::supports(backend, &call.problem).is_err() {
            continue;
        }
        let outcome = check_with(backend, &call, Layout::Given, &random_options(seed));
        assert!(outcome.passed(), "{}: {}", call.name, outcome.failure());
    }
}

/// What a step makes on the device, in the order of giving it back.
#[derive(Default)]
struct Made {
    schedule: Option<PortableSchedule>,
    buffers: Vec<DeviceBuffer>,
    stream: Option<OwnedStream>,
    backend: Option<PortableBackend>,
}

/// Opens a device and decodes on it; on an error, what was made by then stays in `made`.
fn one_step(vendor: &str, made: &mut Made) -> polymla::Result<()> {
    let backend = &*made.backend.insert(driver::open_device(vendor, 1)?);
    let stream = made.stream.insert(backend.create_stream()?).stream();
    let problem = Problem::builder(1).h_q(1).num_pages(1).max_pages_per_seq(1).build()?;
    let (q, k, table, lengths) = (vec![half::bf16::ONE; 576], vec![half::bf16::ONE; 64 * 576], [0], [3]);
    for bytes in [bytemuck::cast_slice(&q), bytemuck::cast_slice(&k), bytemuck::cast_slice(&table)] {
        made.buffers.push(backend.upload(bytes)?);
    }
    for bytes in [bytemuck::bytes_of(&lengths), &[0; 512 * 2], &[0; 4]] {
        made.buffers.push(backend.upload(bytes)?);
    }
    let [q_at, k_at, table_at, lengths_at, out_at, lse_at, scratch @ ..] = &mut made.buffers[..] else {
        unreachable!()
    };
    assert!(scratch.is_empty());
    let inputs = Inputs {
        query: Query::Fused(backend.view("q", q_at, &TensorView::from_slice("", &q, &[1, 1, 1, 576])?)?),
        kv_cache: KvCache::Fused(backend.view("k_cache", k_at, &TensorView::from_slice("", &k, &[1, 64, 1, 576])?)?),
        block_table: backend.view("block_table", table_at, &TensorView::from_slice("", &table, &[1, 1])?)?,
        cache_seqlens: backend.view("cache_seqlens", lengths_at, &TensorView::from_slice("", &lengths, &[1])?)?,
        visible_lengths: None,
    };
    let (mut out, mut lse) = (vec![half::bf16::ZERO; 512], vec![0f32; 1]);
    let like = (TensorView::from_slice("", &out, &[1, 1, 1, 512])?, TensorView::from_slice("", &lse, &[1, 1, 1])?);
    let out_view = backend.view_mut("out", out_at, &like.0)?;
    let mut outputs = Outputs { out: out_view, lse: backend.view_mut("lse", lse_at, &like.1)? };
    let schedule = &*made.schedule.insert(backend.schedule(&problem, &ScheduleOptions::default(), &inputs, stream)?);
    let mut scratch = backend.alloc(backend.workspace_bytes(&problem, schedule))?;
    let ran = backend.run(&problem, schedule, &mut backend.workspace(&mut scratch), &inputs, &mut outputs, stream);
    made.buffers.push(scratch);
    ran?;
    backend.finish(schedule, stream)?;
    backend.download(&made.buffers[4], bytemuck::cast_slice_mut(&mut out))?;
    backend.download(&made.buffers[5], bytemuck::cast_slice_mut(&mut lse))?;
    assert!(out.iter().all(|x| *x == half::bf16::ONE) && lse[0].is_finite(), "{lse:?}");
    Ok(())
}

/// Every call of a step fails once: that is an error, or another compiler is asked, and whatever was made is given back.
fn nothing_leaks_where_a_call_fails(case: &Case, library: &Path) {
    // SAFETY: functions that `harness.cpp` has, of the library that the backend has loaded; they are called one at a time,
    // and the name is a static string. This test is alone in its process.
    let (fail_after, left, failed, alive) = unsafe {
        let library: &'static Library = Box::leak(Box::new(Library::new(library).expect("loaded before")));
        std::env::set_var(driver::CACHE_VARIABLE, "");
        let fail_after = library.get::<unsafe extern "C" fn(i32)>("polymla_stand_in_fail_after").expect("harness.cpp");
        let failed =
            library.get::<unsafe extern "C" fn() -> *const c_char>("polymla_stand_in_failed").expect("harness.cpp");
        let left = library.get::<unsafe extern "C" fn() -> i32>("polymla_stand_in_left").expect("harness.cpp");
        let alive = library.get::<unsafe extern "C" fn() -> usize>("polymla_stand_in_alive").expect("harness.cpp");
        (
            move |n| fail_after(n),
            move || left(),
            move || CStr::from_ptr(failed()).to_str().expect("a name"),
            move || alive(),
        )
    };
    let before = alive();
    fail_after(1000);
    driver::open_device(case.name, 1).expect("opened before");
    let opening = 1000 - left();
    for calls in 0.. {
        let mut made = Made::default();
        fail_after(calls);
        let result = one_step(case.name, &mut made);
        let call = failed();
        fail_after(-1);
        drop(made);
        assert_eq!(alive(), before, "made and not given back, where {call} fails as call {calls}: {result:?}");
        match result {
            Ok(()) if call.is_empty() => {
                assert!(calls > 50, "a step has only {calls} calls");
                break;
            }
            // The driver's library is looked into for a compiler too, and here has one.
            Ok(()) => assert!(calls < opening, "nobody noticed that {call} failed as call {calls}"),
            Err(e) => assert!(e.to_string().contains("invalid argument"), "{call}: {e}"),
        }
    }
}

/// A small call on the device with these lengths; `body` gets its tensors.
fn with_call(backend: &PortableBackend, lengths: &[i32], body: impl FnOnce(&Problem, &Inputs<'_>, &mut Outputs<'_>)) {
    let b = lengths.len();
    let problem = Problem::builder(b).h_q(3).num_pages(4).max_pages_per_seq(4).build().expect("valid");
    let upload = |bytes: &[u8]| backend.upload(bytes).expect("upload");
    let (q, k) = (vec![0u16; b * 3 * 576], vec![0u16; 4 * 64 * 576]);
    let table: Vec<i32> = (0..b * 4).map(|i| i as i32 % 4).collect();
    let buffers = [bytemuck::cast_slice(&q), bytemuck::cast_slice(&k), bytemuck::cast_slice(&table)].map(upload);
    let lens = upload(bytemuck::cast_slice(lengths));
    let (mut out, mut lse) = (upload(&vec![0; b * 3 * 512 * 2]), upload(&vec![0; b * 3 * 4]));
    let bf16 =
        |data, shape: &[usize]| TensorView::from_slice::<half::bf16>("", bytemuck::cast_slice(data), shape).unwrap();
    let i32s = |data, shape: &[usize]| TensorView::from_slice::<i32>("", data, shape).unwrap();
    let inputs = Inputs {
        query: Query::Fused(backend.view("q", &buffers[0], &bf16(&q, &[b, 1, 3, 576])).unwrap()),
        kv_cache: KvCache::Fused(backend.view("k_cache", &buffers[1], &bf16(&k, &[4, 64, 1, 576])).unwrap()),
        block_table: backend.view("block_table", &buffers[2], &i32s(&table, &[b, 4])).unwrap(),
        cache_seqlens: backend.view("cache_seqlens", &lens, &i32s(lengths, &[b])).unwrap(),
        visible_lengths: None,
    };
    let (mut host_out, mut host_lse) = (vec![half::bf16::ZERO; b * 3 * 512], vec![0f32; b * 3]);
    let like_out = TensorViewMut::from_slice("", &mut host_out, &[b, 1, 3, 512]).unwrap();
    let like_lse = TensorViewMut::from_slice("", &mut host_lse, &[b, 3, 1]).unwrap();
    let mut outputs = Outputs {
        out: backend.view_mut("out", &mut out, &like_out.as_view()).unwrap(),
        lse: backend.view_mut("lse", &mut lse, &like_lse.as_view()).unwrap(),
    };
    body(&problem, &inputs, &mut outputs);
}

/// The device's plan is the host's, and planning again in place serves a smaller batch.
fn schedules(backend: &PortableBackend) {
    let lengths = [200, 0, 64, 1, 130];
    for policy in [SplitPolicy::Balanced { overhead_blocks: 1 }, SplitPolicy::BatchInvariant { split_blocks: 2 }] {
        with_call(backend, &lengths, |problem, inputs, _| {
            let options = ScheduleOptions { num_sm_parts: Some(3), policy };
            let stream = backend.create_stream().expect("a stream");
            let mut schedule = backend.schedule(problem, &options, inputs, stream.stream()).expect("a schedule");
            let want = get_mla_metadata(&lengths, 3, policy).expect("a plan");
            let plan = schedule.to_host().expect("a copy");
            assert_eq!(
                (&plan.tile_scheduler_metadata[..], &plan.num_splits[..]),
                (want.tile_scheduler_metadata(), want.num_splits()),
                "{policy:?}"
            );

            let fewer = Problem::builder(2).h_q(3).num_pages(4).max_pages_per_seq(4).build().expect("valid");
            with_call(backend, &lengths[..2], |_, inputs, _| {
                backend.schedule_into(&mut schedule, &fewer, &inputs.cache_seqlens, stream.stream()).expect("again");
            });
            let want = get_mla_metadata(&lengths[..2], 3, policy).expect("a plan");
            assert_eq!(schedule.to_host().expect("a copy").num_splits, want.num_splits());
            let error = backend.schedule_into(&mut schedule, problem, &inputs.block_table, stream.stream());
            assert!(matches!(error, Err(MlaError::Shape { param: "cache_seqlens", .. })), "{error:?}");
        });
    }
}

/// What only the device sees is reported by `finish`, once.
fn bad_lengths_are_reported(backend: &PortableBackend) {
    for (bad, request) in [([64, -1, 9], 1), ([64, 9, 257], 2)] {
        with_call(backend, &bad, |problem, inputs, outputs| {
            let stream = Default::default();
            let schedule = backend.schedule(problem, &ScheduleOptions::default(), inputs, stream).expect("a schedule");
            let mut scratch = backend.alloc(backend.workspace_bytes(problem, &schedule)).expect("workspace");
            let mut small = backend.alloc(16).expect("a small one");
            let mut too_small = backend.workspace(&mut small);
            let refused = backend.run(problem, &schedule, &mut too_small, inputs, outputs, stream);
            assert!(matches!(refused, Err(MlaError::WorkspaceTooSmall { value: 16, .. })), "{refused:?}");
            let mut workspace = backend.workspace(&mut scratch);
            backend.run(problem, &schedule, &mut workspace, inputs, outputs, stream).expect("enqueued");
            match backend.finish(&schedule, stream) {
                Err(MlaError::DeviceCheck { request: found, .. }) => assert_eq!(found, request, "{bad:?}"),
                other => panic!("{bad:?}: {other:?}"),
            }
            assert_eq!(backend.finish(&schedule, stream), Ok(()), "a failure is reported once");
        });
    }
}
