//! A step: what is bound and dispatched, chunk by chunk.

use super::chunks::{Chunk, Shape};
use super::context::Context;
use super::memory::Place;
use super::params::Params;
use super::pipelines::Pipeline;
use super::plan::{PARAMS_SLOTS, WgpuSchedule};
use super::submit::{Binding, Dispatch, submit};
use crate::call::{Inputs, KvCache, Outputs, Query};
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::tensor::TensorView;

/// The kernels of a step.
pub(super) struct Kernels<'a> {
    pub(super) prepare: &'a Pipeline,
    pub(super) decode: &'a Pipeline,
    /// The kernel for what `decode` leaves, and how many of its row tiles are one of `decode`'s.
    pub(super) remains: Option<(&'a Pipeline, u32)>,
    pub(super) combine: &'a Pipeline,
    /// Columns of V that one workgroup of decode has.
    pub(super) columns: usize,
}

/// The scratch memory of a step: a buffer, where in it, how much.
#[derive(Clone, Copy)]
pub(super) struct Scratch<'a> {
    pub(super) buffer: &'a ::wgpu::Buffer,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// One kernel would read and write the same buffer, which wgpu refuses whatever the ranges.
const OWN_BUFFER: &str = "a buffer of its own";

/// The tensors of a call, as bindings see them.
struct Places<'a> {
    q_nope: Option<Place<'a>>,
    q_pe: Option<Place<'a>>,
    ckv: Option<Place<'a>>,
    kpe: Option<Place<'a>>,
    block_table: Option<Place<'a>>,
    cache_seqlens: Option<Place<'a>>,
    visible_lengths: Option<Place<'a>>,
    out: Option<Place<'a>>,
    lse: Option<Place<'a>>,
}

fn place<'a>(param: &'static str, view: Option<&TensorView<'a>>) -> Result<Option<Place<'a>>> {
    view.map_or(Ok(None), |view| Place::of(param, view))
}

fn cache_places<'a>(cache: &KvCache<'a>) -> Result<[Option<Place<'a>>; 2]> {
    Ok(match cache {
        KvCache::Fused(k) => [Place::of("k_cache", k)?, None],
        KvCache::Split { ckv, kpe } => [Place::of("ckv", ckv)?, place("kpe", kpe.as_ref())?],
    })
}

impl<'a> Places<'a> {
    fn new(inputs: &Inputs<'a>, out: &TensorView<'a>, lse: &TensorView<'a>) -> Result<Places<'a>> {
        let (q_nope, q_pe) = match &inputs.query {
            Query::Fused(q) => (Place::of("q", q)?, None),
            Query::Split { q_nope, q_pe } => (Place::of("q_nope", q_nope)?, place("q_pe", q_pe.as_ref())?),
        };
        let [ckv, kpe] = cache_places(&inputs.kv_cache)?;
        Ok(Places {
            q_nope,
            q_pe,
            ckv,
            kpe,
            block_table: Place::of("block_table", &inputs.block_table)?,
            cache_seqlens: Place::of("cache_seqlens", &inputs.cache_seqlens)?,
            visible_lengths: place("visible_lengths", inputs.visible_lengths.as_ref())?,
            out: Place::of("out", out)?,
            lse: Place::of("lse", lse)?,
        })
    }

    /// What a kernel writes must be apart from all else, and in other buffers than what the same kernel reads.
    fn check_apart(&self, scratch: &Scratch<'_>) -> Result<()> {
        let inputs = [
            ("q", self.q_nope),
            ("q_pe", self.q_pe),
            ("k_cache", self.ckv),
            ("kpe", self.kpe),
            ("block_table", self.block_table),
            ("cache_seqlens", self.cache_seqlens),
            ("visible_lengths", self.visible_lengths),
        ];
        let inputs = || inputs.into_iter().filter_map(|(name, place)| place.map(|p| (name, p)));
        let overlap = |param, a: &std::ops::Range<u64>, other, b: &std::ops::Range<u64>| {
            let start = a.start.max(b.start);
            match start < a.end.min(b.end) {
                true => Err(MlaError::Overlap { param, other, value: start - a.start }),
                false => Ok(()),
            }
        };
        let outputs = [("out", self.out), ("lse", self.lse)];
        for (param, written) in outputs.into_iter().filter_map(|(name, place)| place.map(|p| (name, p))) {
            let others = inputs().chain(self.lse.filter(|_| param == "out").map(|p| ("lse", p)));
            for (other, read) in others.filter(|(_, read)| read.buffer == written.buffer) {
                overlap(param, &written.range(), other, &read.range())?;
            }
            if written.buffer == scratch.buffer {
                return Err(super::refusal("workspace", format!("in the buffer of {param}"), OWN_BUFFER).into());
            }
        }
        match inputs().find(|(_, read)| read.buffer == scratch.buffer) {
            Some((name, _)) => Err(super::refusal("workspace", format!("in the buffer of {name}"), OWN_BUFFER).into()),
            None => Ok(()),
        }
    }

    /// The most requests whose queries, tables and outputs fit bindings of `bytes` bytes.
    fn requests_within(&self, bytes: u64) -> Result<u64> {
        let named = [
            ("q", self.q_nope),
            ("q_pe", self.q_pe),
            ("block_table", self.block_table),
            ("cache_seqlens", self.cache_seqlens),
            ("visible_lengths", self.visible_lengths),
            ("out", self.out),
            ("lse", self.lse),
        ];
        steps_within(&named, bytes, "one request")
    }
}

fn steps_within(places: &[(&'static str, Option<Place<'_>>)], bytes: u64, what: &str) -> Result<u64> {
    let mut most = u64::MAX;
    for (param, place) in places.iter().filter_map(|(param, place)| place.map(|p| (*param, p))) {
        let steps = place.steps_within(bytes);
        if steps == 0 {
            let value = format!("with {} bytes from the first to the last of {what}", place.span(0, 1));
            return Err(super::refusal(param, value, format!("{bytes} bytes, what a binding holds")).into());
        }
        most = most.min(steps);
    }
    Ok(most)
}

/// The most bytes of a tensor that a binding holds.
fn tensor_bytes(context: &Context) -> u64 {
    context.binding_bytes() - slack(u64::from(context.limits.min_storage_buffer_offset_alignment))
}

/// Whether a cache is larger than a binding.
pub(super) fn has_windows(context: &Context, problem: &Problem, cache: &KvCache<'_>) -> Result<bool> {
    Ok(window_pages(context, problem, cache)? < problem.num_pages() as u64)
}

/// The pages that a binding holds, of the cache's.
fn window_pages(context: &Context, problem: &Problem, cache: &KvCache<'_>) -> Result<u64> {
    let [ckv, kpe] = cache_places(cache)?;
    let most = steps_within(&[("k_cache", ckv), ("kpe", kpe)], tensor_bytes(context), "one page")?;
    Ok(most.clamp(1, (problem.num_pages() as u64).max(1)))
}

/// Whether matrices can be loaded straight from the tensors: every row begins at a multiple of 8 elements.
pub(super) fn rows_suit_matrices(inputs: &Inputs<'_>) -> bool {
    inputs.tensors().filter(|(_, view)| view.shape().len() == 4).all(|(_, view)| {
        let offset = view.object().map_or(1, |(_, offset)| offset);
        let strides = view.shape().iter().zip(view.strides()).take(3);
        offset.is_multiple_of(16) && strides.into_iter().all(|(n, stride)| *n <= 1 || stride.is_multiple_of(8))
    })
}

/// Fewer rows than this do not fill a device: four workgroups merge a row.
const FEW_ROWS: u64 = 1024;

/// Room that a binding needs beyond its tensor: it begins at a multiple of the alignment and ends with a whole word.
fn slack(align: u64) -> u64 {
    align + 4
}

/// Enqueues a step.
#[allow(clippy::too_many_arguments)]
pub(super) fn run(
    context: &Context,
    kernels: &Kernels<'_>,
    schedule: &WgpuSchedule,
    shape: &Shape,
    problem: &Problem,
    inputs: &Inputs<'_>,
    outputs: &Outputs<'_>,
    scratch: Scratch<'_>,
    dummy: &::wgpu::Buffer,
) -> Result<()> {
    let (out, lse) = (outputs.out.as_view(), outputs.lse.as_view());
    let places = Places::new(inputs, &out, &lse)?;
    places.check_apart(&scratch)?;
    let align = u64::from(context.limits.min_storage_buffer_offset_alignment);
    let limit = tensor_bytes(context);
    let window_pages = window_pages(context, problem, &inputs.kv_cache)?;
    let windows = (problem.num_pages() as u64).div_ceil(window_pages).max(1);
    let requests = places.requests_within(limit)?.min(shape.requests);
    let chunk = shape.chunk(requests, windows, scratch.bytes.min(limit))?;

    let mut dispatches = Vec::new();
    let call = Call { problem, schedule, shape, kernels, places: &places, scratch, dummy, align };
    for first_request in (0..shape.requests).step_by(chunk.requests as usize) {
        for first_row_tile in (0..shape.row_tiles).step_by(chunk.row_tiles as usize) {
            let here = Chunk {
                requests: chunk.requests.min(shape.requests - first_request),
                row_tiles: chunk.row_tiles.min(shape.row_tiles - first_row_tile),
            };
            call.dispatches(&mut dispatches, first_request, first_row_tile, here, window_pages, windows);
            if dispatches.len() >= PARAMS_SLOTS {
                submit(context, &schedule.params, &dispatches)?;
                dispatches.clear();
            }
        }
    }
    submit(context, &schedule.params, &dispatches)
}

struct Call<'a> {
    problem: &'a Problem,
    schedule: &'a WgpuSchedule,
    shape: &'a Shape,
    kernels: &'a Kernels<'a>,
    places: &'a Places<'a>,
    scratch: Scratch<'a>,
    dummy: &'a ::wgpu::Buffer,
    align: u64,
}

impl<'a> Call<'a> {
    fn part(&self, place: Option<Place<'a>>, first: u64, n: u64) -> (Binding<'a>, u32, [u32; 4]) {
        match place {
            Some(place) => {
                let (binding, start) = place.bind(first, n, self.align);
                (Binding::Part(binding), start, place.strides())
            }
            None => (Binding::Whole(self.dummy), 0, [0; 4]),
        }
    }

    /// Both parts of a query or a cache. Of a fused one, the second begins head_dim_v columns into each row.
    fn parts(
        &self,
        first: Option<Place<'a>>,
        second: Option<Place<'a>>,
        from: u64,
        n: u64,
    ) -> [(Binding<'a>, [u32; 4]); 2] {
        let rows = |start: u32, s: [u32; 4]| [start, s[0], s[1], s[2]];
        let (a, a_start, a_strides) = self.part(first, from, n);
        let (b, b_start, b_strides) = match second {
            Some(second) => self.part(Some(second), from, n),
            None => {
                let (binding, start, strides) = self.part(first, from, n);
                (binding, start + self.problem.head_dim_v() as u32, strides)
            }
        };
        [(a, rows(a_start, a_strides)), (b, rows(b_start, b_strides))]
    }

    fn workspace(&self, words: u64) -> Binding<'a> {
        let Scratch { buffer, offset, .. } = self.scratch;
        Binding::Part(::wgpu::BufferBinding { buffer, offset, size: std::num::NonZeroU64::new(words.max(4) * 4) })
    }

    fn dispatches(
        &self,
        dispatches: &mut Vec<Dispatch<'a>>,
        first_request: u64,
        first_row_tile: u64,
        chunk: Chunk,
        window_pages: u64,
        windows: u64,
    ) {
        let layout = self.shape.layout(chunk, windows);
        let (p, requests) = (self.places, chunk.requests);
        let [q_nope, q_pe] = self.parts(p.q_nope, p.q_pe, first_request, requests);
        let (table, table_at, table_strides) = self.part(p.block_table, first_request, requests);
        let (lengths, lengths_at, _) = self.part(p.cache_seqlens, first_request, requests);
        let (visible, visible_at, visible_strides) = self.part(p.visible_lengths, first_request, requests);
        let (out, out_at, out_strides) = self.part(p.out, first_request, requests);
        let (lse, lse_at, lse_strides) = self.part(p.lse, first_request, requests);
        let params = Params {
            first_request: first_request as u32,
            requests: requests as u32,
            first_row_tile: first_row_tile as u32,
            row_tiles: chunk.row_tiles as u32,
            windows: windows as u32,
            ends_at: layout.ends as u32,
            sums_at: layout.sums as u32,
            accumulators_at: layout.accumulators as u32,
            q_nope: q_nope.1,
            q_pe: q_pe.1,
            out: [out_at, out_strides[0], out_strides[1], out_strides[2]],
            out_column: out_strides[3],
            lse: [lse_at, lse_strides[0], lse_strides[1], lse_strides[2]],
            block_table: [table_at, table_strides[0]],
            visible_lengths: [visible_at, visible_strides[0]],
            cache_seqlens: lengths_at,
            ..self.schedule.params(self.problem)
        };
        let plan = || Binding::Whole(&self.schedule.plan);
        dispatches.push(Dispatch {
            pipeline: self.kernels.prepare,
            bindings: vec![table, lengths, visible, self.workspace(layout.words), plan()],
            params,
            groups: [requests as u32, 1, 1],
        });
        let slices = self.problem.head_dim_v().div_ceil(self.kernels.columns) as u32;
        for window in 0..windows {
            let first_page = window * window_pages;
            let pages = window_pages.min(self.problem.num_pages() as u64 - first_page);
            let [q_nope, q_pe] = self.parts(p.q_nope, p.q_pe, first_request, requests);
            let [ckv, kpe] = self.parts(p.ckv, p.kpe, first_page, pages);
            let (table, ..) = self.part(p.block_table, first_request, requests);
            let decode = Dispatch {
                pipeline: self.kernels.decode,
                bindings: vec![q_nope.0, q_pe.0, ckv.0, kpe.0, table, plan(), self.workspace(layout.words)],
                params: Params {
                    window: window as u32,
                    first_page: first_page as u32,
                    window_pages: pages as u32,
                    ckv: ckv.1,
                    kpe: kpe.1,
                    ..params
                },
                groups: [chunk.row_tiles as u32, self.schedule.num_parts() as u32, slices],
            };
            let remains = self.kernels.remains.map(|(pipeline, subtiles)| Dispatch {
                pipeline,
                bindings: decode.bindings.clone(),
                params: Params {
                    subtiles,
                    first_row_tile: decode.params.first_row_tile * subtiles,
                    row_tiles: decode.params.row_tiles * subtiles,
                    ..decode.params
                },
                groups: [chunk.row_tiles as u32 * subtiles, self.schedule.num_parts() as u32, slices],
            });
            dispatches.push(decode);
            dispatches.extend(remains);
        }
        let rows = chunk.row_tiles * self.shape.rows;
        dispatches.push(Dispatch {
            pipeline: self.kernels.combine,
            bindings: vec![plan(), self.workspace(layout.words), out, lse],
            params,
            groups: [rows as u32, requests as u32, if rows * requests < FEW_ROWS { 4 } else { 1 }],
        });
    }
}
