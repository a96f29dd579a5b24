//! The object-safe form of backends, over host tensors: decoding and timing.

use std::time::Duration;

use crate::backend::{BackendInfo, MlaBackend, Unsupported, flash_mla_with_kvcache};
use crate::call::{Inputs, KvCache, Outputs, Query};
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::schedule::ScheduleOptions;
use crate::tensor::{DType, Device, TensorView};

/// How to time a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Runs before the first timed one.
    pub warmups: usize,
    /// Timed runs.
    pub repeats: usize,
    /// Whether caches are flushed before each timed run.
    pub flush: bool,
}

impl Default for Timing {
    fn default() -> Self {
        Timing { warmups: 2, repeats: 15, flush: true }
    }
}

/// The object-safe form over host tensors: what the command line, the conformance suite and foreign-language bindings
/// use. Every [`MlaBackend`] has it.
pub trait HostBackend: Send + Sync {
    /// Identity and device.
    fn info(&self) -> &BackendInfo;

    /// Whether it can serve `problem`.
    ///
    /// # Errors
    /// [`Unsupported`], with the reason.
    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported>;

    /// All four steps on host tensors: copies in, schedules, runs, waits, copies out.
    ///
    /// # Errors
    /// As [`MlaBackend::run`] and [`MlaBackend::finish`].
    fn decode(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
    ) -> Result<()>;

    /// Times `run` alone, tensors in place and schedule made, on inputs that are made there from pieces: gigabytes need
    /// not travel. Returns one duration a repeat, in order.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    fn time(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &RepeatedInputs<'_>,
        timing: Timing,
    ) -> Result<Vec<Duration>>;
}

/// What [`HostBackend::time`] times on: tensors without gaps, fused, the large one as a piece of it.
#[derive(Debug, Clone, Copy)]
pub struct RepeatedInputs<'a> {
    /// Elements of `q`, repeated where they are fewer.
    pub q: &'a [u8],
    /// Elements of `k_cache`, likewise. Should exceed what any cache of the device holds.
    pub k_cache: &'a [u8],
    /// [b, max_pages_per_seq].
    pub block_table: &'a [i32],
    /// `[b]`.
    pub cache_seqlens: &'a [i32],
}

fn time_run<B: MlaBackend>(
    backend: &B,
    problem: &Problem,
    options: &ScheduleOptions,
    inputs: &Inputs<'_>,
    outputs: &mut Outputs<'_>,
    timing: Timing,
) -> Result<Vec<Duration>> {
    let stream = B::Stream::default();
    let schedule = backend.schedule(problem, options, inputs, stream)?;
    let mut scratch = backend.alloc(backend.workspace_bytes(problem, &schedule))?;
    let mut workspace = backend.workspace(&mut scratch);
    let mut times = Vec::new();
    for i in 0..timing.warmups.saturating_add(timing.repeats) {
        if timing.flush {
            backend.flush_caches(stream)?;
        }
        let took = backend.elapsed(&schedule, stream, &mut || {
            backend.run(problem, &schedule, &mut workspace, inputs, outputs, stream)
        })?;
        if i >= timing.warmups {
            times.push(took);
        }
    }
    Ok(times)
}

/// Copies of a call's input tensors where the backend's tensors live.
struct Uploaded<B: MlaBackend + ?Sized> {
    buffers: Vec<(&'static str, B::Buffer)>,
}

impl<B: MlaBackend + ?Sized> Uploaded<B> {
    fn new(backend: &B, inputs: &Inputs<'_>) -> Result<Self> {
        let buffers = inputs
            .tensors()
            .map(|(name, view)| Ok((name, backend.upload(view.host_bytes(name)?)?)))
            .collect::<Result<_>>()?;
        Ok(Uploaded { buffers })
    }

    fn view<'a>(&'a self, backend: &B, name: &'static str, like: &TensorView<'_>) -> Result<TensorView<'a>> {
        let found = self.buffers.iter().find(|(n, _)| *n == name);
        let (_, buffer) = found.ok_or(MlaError::MissingTensor { param: name, limit: "it was not uploaded" })?;
        backend.view(name, buffer, like)
    }

    fn inputs<'a>(&'a self, backend: &B, host: &Inputs<'_>) -> Result<Inputs<'a>> {
        let one = |name, like: &TensorView<'_>| self.view(backend, name, like);
        let maybe = |name, like: &Option<TensorView<'_>>| like.as_ref().map(|t| one(name, t)).transpose();
        Ok(Inputs {
            query: match &host.query {
                Query::Fused(q) => Query::Fused(one("q", q)?),
                Query::Split { q_nope, q_pe } => {
                    Query::Split { q_nope: one("q_nope", q_nope)?, q_pe: maybe("q_pe", q_pe)? }
                }
            },
            kv_cache: match &host.kv_cache {
                KvCache::Fused(k) => KvCache::Fused(one("k_cache", k)?),
                KvCache::Split { ckv, kpe } => KvCache::Split { ckv: one("ckv", ckv)?, kpe: maybe("kpe", kpe)? },
            },
            block_table: one("block_table", &host.block_table)?,
            cache_seqlens: one("cache_seqlens", &host.cache_seqlens)?,
            visible_lengths: maybe("visible_lengths", &host.visible_lengths)?,
        })
    }
}

/// Runs `body` with every tensor of a host call where the backend's tensors live, and copies the outputs back.
fn with_tensors<B: MlaBackend, R>(
    backend: &B,
    problem: &Problem,
    inputs: &Inputs<'_>,
    outputs: &mut Outputs<'_>,
    body: impl FnOnce(&Inputs<'_>, &mut Outputs<'_>) -> Result<R>,
) -> Result<R> {
    backend.supports(problem)?;
    inputs.validate(problem, Device::Host)?;
    outputs.validate(problem, inputs, Device::Host)?;
    inputs.check_host_tables(problem)?;
    if backend.info().device == Device::Host {
        return body(inputs, outputs);
    }
    let uploaded = Uploaded::new(backend, inputs)?;
    let device_inputs = uploaded.inputs(backend, inputs)?;
    // Outputs travel both ways, so that bytes between strided rows keep what the caller had there.
    let mut out = backend.upload(outputs.out.host_bytes_mut("out")?)?;
    let mut lse = backend.upload(outputs.lse.host_bytes_mut("lse")?)?;
    let result = {
        let mut device_outputs = Outputs {
            out: backend.view_mut("out", &mut out, &outputs.out.as_view())?,
            lse: backend.view_mut("lse", &mut lse, &outputs.lse.as_view())?,
        };
        body(&device_inputs, &mut device_outputs)?
    };
    backend.download(&out, outputs.out.host_bytes_mut("out")?)?;
    backend.download(&lse, outputs.lse.host_bytes_mut("lse")?)?;
    Ok(result)
}

impl<B: MlaBackend> HostBackend for B {
    fn info(&self) -> &BackendInfo {
        MlaBackend::info(self)
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        MlaBackend::supports(self, problem)
    }

    fn decode(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
    ) -> Result<()> {
        with_tensors(self, problem, inputs, outputs, |inputs, outputs| {
            flash_mla_with_kvcache(self, problem, options, inputs, outputs, B::Stream::default())
        })
    }

    fn time(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &RepeatedInputs<'_>,
        timing: Timing,
    ) -> Result<Vec<Duration>> {
        let p = problem;
        MlaBackend::supports(self, p)?;
        let q_shape = [p.b(), p.s_q(), p.h_q(), p.head_dim_k()];
        let k_shape = [p.num_pages(), p.page_size(), p.h_kv(), p.head_dim_k()];
        let table_shape = [p.b(), p.max_pages_per_seq()];
        let bytes = |shape: &[usize], dtype: DType| shape.iter().product::<usize>() * dtype.size();
        // Tables and lengths are small, and are checked like any caller's before a device reads through them.
        let host = Inputs {
            query: Query::Fused(TensorView::description(p.dtype(), &q_shape)),
            kv_cache: KvCache::Fused(TensorView::description(p.dtype(), &k_shape)),
            block_table: TensorView::from_slice("block_table", inputs.block_table, &table_shape)?,
            cache_seqlens: TensorView::from_slice("cache_seqlens", inputs.cache_seqlens, &[p.b()])?,
            visible_lengths: None,
        };
        host.validate(p, Device::Host)?;
        host.check_host_tables(p)?;
        let uploaded = Uploaded {
            buffers: vec![
                ("q", self.upload_repeated(inputs.q, bytes(&q_shape, p.dtype()))?),
                ("k_cache", self.upload_repeated(inputs.k_cache, bytes(&k_shape, p.dtype()))?),
                ("block_table", self.upload(bytemuck::cast_slice(inputs.block_table))?),
                ("cache_seqlens", self.upload(bytemuck::cast_slice(inputs.cache_seqlens))?),
            ],
        };
        let device_inputs = uploaded.inputs(self, &host)?;
        let (out_shape, lse_shape) = ([p.b(), p.s_q(), p.h_q(), p.head_dim_v()], [p.b(), p.h_q(), p.s_q()]);
        let mut out = self.alloc(bytes(&out_shape, p.dtype()))?;
        let mut lse = self.alloc(bytes(&lse_shape, DType::F32))?;
        let mut outputs = Outputs {
            out: self.view_mut("out", &mut out, &TensorView::description(p.dtype(), &out_shape))?,
            lse: self.view_mut("lse", &mut lse, &TensorView::description(DType::F32, &lse_shape))?,
        };
        time_run(self, p, options, &device_inputs, &mut outputs, timing)
    }
}

#[cfg(all(test, feature = "cpu"))]
mod tests {
    use super::*;

    #[test]
    fn repeated_uploads_fill_to_the_end() {
        let backend = crate::cpu::CpuBackend::new().unwrap();
        for (tile, bytes) in [(&b"abc"[..], 10), (b"abc", 2), (b"abc", 3), (b"a", 7), (b"abc", 0)] {
            let buffer = backend.upload_repeated(tile, bytes).unwrap();
            let mut whole = vec![0; bytes];
            backend.download(&buffer, &mut whole).unwrap();
            let expected: Vec<u8> = tile.iter().copied().cycle().take(bytes).collect();
            assert_eq!(whole, expected);
        }
    }

    #[test]
    fn timing_from_pieces_runs_and_checks_its_tables() {
        let backend: Box<dyn HostBackend> = Box::new(crate::cpu::CpuBackend::new().unwrap());
        let p = Problem::builder(2).h_q(3).num_pages(3).max_pages_per_seq(2).build().unwrap();
        let tile = vec![0u8; 4096];
        let timing = Timing { warmups: 1, repeats: 3, flush: true };
        let time = |block_table: &[i32]| {
            let inputs = RepeatedInputs { q: &tile, k_cache: &tile, block_table, cache_seqlens: &[100, 20] };
            backend.time(&p, &ScheduleOptions::default(), &inputs, timing)
        };
        assert_eq!(time(&[0, 2, 1, -1]).unwrap().len(), 3);
        assert!(matches!(
            time(&[0, 3, 1, -1]),
            Err(MlaError::BlockTableEntry { request: 0, position: 1, value: 3, .. })
        ));
        assert!(time(&[0, 2, 1]).is_err(), "a table too short");
    }
}
