//! Calls whose tensors lie on the device, for tests that go past the host-side checks.

use polymla::conformance::{Call, PoisonedOutputs, required};
use polymla::cuda::sm90::{Sm90Backend, Sm90Schedule};
use polymla::cuda::{DeviceBuffer, HostPlan, OwnedStream, Stream};
use polymla::{
    HostBackend, Inputs, KvCache, MlaBackend, MlaError, Outputs, Problem, Query, Result, ScheduleOptions, TensorView,
};

/// A backend on CUDA, with what its trait leaves to it.
pub trait Tested: MlaBackend<Buffer = DeviceBuffer, Stream = Stream> + HostBackend + Sized {
    const NAME: &str;
    fn first_device() -> Result<Self>;
    fn new_stream(&self) -> Result<OwnedStream>;
    fn schedule_again(&self, into: &mut Self::Schedule, p: &Problem, lens: &TensorView<'_>, s: Stream) -> Result<()>;
    /// Whether a device-side check has found something that was not reported yet.
    fn has_failed(schedule: &Self::Schedule) -> bool;
    fn plan(schedule: &Self::Schedule) -> Result<HostPlan>;
}

impl Tested for Sm90Backend {
    const NAME: &str = "sm90";
    fn first_device() -> Result<Self> {
        Sm90Backend::new()
    }
    fn new_stream(&self) -> Result<OwnedStream> {
        self.create_stream()
    }
    fn schedule_again(&self, into: &mut Sm90Schedule, p: &Problem, lens: &TensorView<'_>, s: Stream) -> Result<()> {
        self.schedule_into(into, p, lens, s)
    }
    fn has_failed(schedule: &Sm90Schedule) -> bool {
        schedule.poll().is_some()
    }
    fn plan(schedule: &Sm90Schedule) -> Result<HostPlan> {
        schedule.to_host()
    }
}

#[cfg(feature = "cuda")]
mod portable {
    use polymla::cuda::portable::{PortableBackend, PortableSchedule, first_device};

    use super::*;

    impl Tested for PortableBackend {
        const NAME: &str = "cuda";
        fn first_device() -> Result<Self> {
            first_device()
        }
        fn new_stream(&self) -> Result<OwnedStream> {
            self.create_stream()
        }
        fn schedule_again(
            &self,
            into: &mut PortableSchedule,
            p: &Problem,
            lens: &TensorView<'_>,
            s: Stream,
        ) -> Result<()> {
            self.schedule_into(into, p, lens, s)
        }
        fn has_failed(schedule: &PortableSchedule) -> bool {
            schedule.poll().is_err()
        }
        fn plan(schedule: &PortableSchedule) -> Result<HostPlan> {
            schedule.to_host()
        }
    }
}

/// The backend; `None`, with the reason printed, where it is absent and not required.
pub fn backend<B: Tested>() -> Option<B> {
    match B::first_device() {
        Ok(backend) => Some(backend),
        Err(reason) => {
            assert!(matches!(reason, MlaError::Absent { .. }), "opening must fail with a reason only: {reason}");
            let required = required().expect("POLYMLA_REQUIRE").iter().any(|name| name == B::NAME);
            assert!(!required, "POLYMLA_REQUIRE lists {}, but: {reason}", B::NAME);
            eprintln!("SKIP: {reason}");
            None
        }
    }
}

/// The same problem with `b` requests and `num_pages` pages.
pub fn rebuilt(p: &Problem, b: usize, num_pages: usize) -> Problem {
    let builder = Problem::builder(b).s_q(p.s_q()).h_q(p.h_q()).h_kv(p.h_kv()).head_dim_k(p.head_dim_k());
    let builder = builder.head_dim_v(p.head_dim_v()).num_pages(num_pages).page_size(p.page_size());
    let builder = builder.max_pages_per_seq(p.max_pages_per_seq()).dtype(p.dtype()).mask(p.mask());
    builder.softmax_scale(p.softmax_scale()).build().expect("a valid problem, in other numbers")
}

/// A call's inputs on the device.
pub struct Placed<'a, B> {
    backend: &'a B,
    call: &'a Call,
    pub buffers: Vec<(&'static str, DeviceBuffer)>,
}

/// A call's outputs: on the device, and where they are copied back to.
pub struct Results<'a, B> {
    backend: &'a B,
    pub host: PoisonedOutputs,
    out: DeviceBuffer,
    lse: DeviceBuffer,
}

impl<'a, B: Tested> Placed<'a, B> {
    pub fn new(backend: &'a B, call: &'a Call) -> Self {
        let buffers = call.tensors.iter().map(|(n, t)| (*n, backend.upload(t.bytes()).expect("upload"))).collect();
        Placed { backend, call, buffers }
    }

    pub fn buffer(&mut self, name: &str) -> &mut DeviceBuffer {
        &mut self.buffers.iter_mut().find(|(n, _)| *n == name).expect("a tensor of the call").1
    }

    pub fn inputs(&self) -> Inputs<'_> {
        self.first_requests(self.call.problem.b(), 0)
    }

    /// The inputs of `count` requests from request `first` on, over the same memory.
    pub fn first_requests(&self, count: usize, first: usize) -> Inputs<'_> {
        let host = self.call.inputs().expect("the call's inputs");
        let view = |name: &'static str, like: &TensorView<'_>, batched: bool| {
            let buffer = &self.buffers.iter().find(|(n, _)| *n == name).expect("uploaded").1;
            let mut shape = like.shape().to_vec();
            let mut skip = 0;
            if batched {
                shape[0] = count;
                skip = (first * like.strides()[0] * like.dtype().size()) as u64;
            }
            // A tensor of no columns has no bytes to skip.
            let skip = skip.min(buffer.bytes() as u64);
            let (address, bytes) = (buffer.address() + skip, buffer.bytes() as u64 - skip);
            let device = MlaBackend::info(self.backend).device;
            // SAFETY: memory of a buffer that `self` keeps.
            unsafe { TensorView::from_raw_parts(name, address, bytes, like.dtype(), &shape, like.strides(), device) }
                .expect("inside the buffer")
        };
        Inputs {
            query: match &host.query {
                Query::Fused(q) => Query::Fused(view("q", q, true)),
                Query::Split { q_nope, q_pe } => Query::Split {
                    q_nope: view("q_nope", q_nope, true),
                    q_pe: q_pe.as_ref().map(|t| view("q_pe", t, true)),
                },
            },
            kv_cache: match &host.kv_cache {
                KvCache::Fused(k) => KvCache::Fused(view("k_cache", k, false)),
                KvCache::Split { ckv, kpe } => {
                    KvCache::Split { ckv: view("ckv", ckv, false), kpe: kpe.as_ref().map(|t| view("kpe", t, false)) }
                }
            },
            block_table: view("block_table", &host.block_table, true),
            cache_seqlens: view("cache_seqlens", &host.cache_seqlens, true),
            visible_lengths: host.visible_lengths.as_ref().map(|t| view("visible_lengths", t, true)),
        }
    }
}

impl<'a, B: Tested> Results<'a, B> {
    pub fn new(backend: &'a B, host: PoisonedOutputs) -> Self {
        let [out, lse] = [&host.out, &host.lse].map(|t| backend.upload(t.bytes()).expect("upload"));
        Results { backend, host, out, lse }
    }

    pub fn outputs(&mut self) -> Outputs<'_> {
        let (out, lse) = (self.host.out.view("out").expect("view"), self.host.lse.view("lse").expect("view"));
        Outputs {
            out: self.backend.view_mut("out", &mut self.out, &out).expect("view"),
            lse: self.backend.view_mut("lse", &mut self.lse, &lse).expect("view"),
        }
    }

    /// Copies back, and returns the bytes of both.
    pub fn read(&mut self) -> (Vec<u8>, Vec<u8>) {
        self.backend.download(&self.out, self.host.out.bytes_mut()).expect("download");
        self.backend.download(&self.lse, self.host.lse.bytes_mut()).expect("download");
        (self.host.out.to_dense_bytes(), self.host.lse.to_dense_bytes())
    }
}

/// Schedules and runs a call whose tensors are in place; does not wait.
pub fn enqueue<B: Tested>(
    backend: &B,
    call: &Call,
    options: &ScheduleOptions,
    inputs: &Inputs<'_>,
    results: &mut Results<'_, B>,
) -> Result<(B::Schedule, DeviceBuffer)> {
    let stream = Stream::default();
    let schedule = backend.schedule(&call.problem, options, inputs, stream)?;
    let mut scratch = backend.alloc(backend.workspace_bytes(&call.problem, &schedule))?;
    let mut workspace = backend.workspace(&mut scratch);
    backend.run(&call.problem, &schedule, &mut workspace, inputs, &mut results.outputs(), stream)?;
    Ok((schedule, scratch))
}
