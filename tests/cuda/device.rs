//! Calls whose tensors lie on the device, for tests that go past the host-side checks.

use polymla::conformance::{Call, PoisonedOutputs, required};
use polymla::cuda::sm90::{Sm90Backend, Sm90Schedule};
use polymla::cuda::{DeviceBuffer, Stream};
use polymla::{Inputs, KvCache, MlaBackend, MlaError, Outputs, Problem, Query, Result, ScheduleOptions, TensorView};

/// The backend; `None`, with the reason printed, where it is absent and not required.
pub fn backend() -> Option<Sm90Backend> {
    match Sm90Backend::new() {
        Ok(backend) => Some(backend),
        Err(reason) => {
            assert!(matches!(reason, MlaError::Absent { .. }), "opening must fail with a reason only: {reason}");
            let required = required().expect("POLYMLA_REQUIRE").iter().any(|name| name == "sm90");
            assert!(!required, "POLYMLA_REQUIRE lists sm90, but: {reason}");
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
pub struct Placed<'a> {
    backend: &'a Sm90Backend,
    call: &'a Call,
    pub buffers: Vec<(&'static str, DeviceBuffer)>,
}

/// A call's outputs: on the device, and where they are copied back to.
pub struct Results<'a> {
    backend: &'a Sm90Backend,
    pub host: PoisonedOutputs,
    out: DeviceBuffer,
    lse: DeviceBuffer,
}

impl<'a> Placed<'a> {
    pub fn new(backend: &'a Sm90Backend, call: &'a Call) -> Self {
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

impl<'a> Results<'a> {
    pub fn new(backend: &'a Sm90Backend, host: PoisonedOutputs) -> Self {
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
pub fn enqueue(
    backend: &Sm90Backend,
    call: &Call,
    options: &ScheduleOptions,
    inputs: &Inputs<'_>,
    results: &mut Results<'_>,
) -> Result<(Sm90Schedule, DeviceBuffer)> {
    let stream = Stream::default();
    let schedule = backend.schedule(&call.problem, options, inputs, stream)?;
    let mut scratch = backend.alloc(backend.workspace_bytes(&call.problem, &schedule))?;
    let mut workspace = backend.workspace(&mut scratch);
    backend.run(&call.problem, &schedule, &mut workspace, inputs, &mut results.outputs(), stream)?;
    Ok((schedule, scratch))
}
