//! The `onnx` backend: a decode step as an ONNX graph of fixed shapes, for compilers that take nothing else
//! (Intellifusion's TyTVM among them), and its execution here.
//!
//! [`graph`] writes the graph of one class of problems, [`proto::Model::to_bytes`] the file; [`to_f16`] converts bf16
//! tensors for it. [`OnnxBackend`] runs the same file by tract, a pure-Rust runtime, so that the conformance suite
//! checks what is exported. It is there to prove the graph, not to be fast.

use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, KvCache, Outputs, Query};
use crate::cpu::CpuBuffer;
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::schedule::{ScheduleOptions, get_mla_metadata};
use crate::tensor::{DType, Device};
use crate::workspace::Workspace;

#[cfg(feature = "conformance")]
mod call;
mod convert;
mod graph;
pub mod proto;
mod run;
#[cfg(test)]
mod tests;

#[cfg(feature = "conformance")]
pub use call::{call_for_graph, problem_in_f16};
pub use convert::{Losses, to_f16};
pub use graph::{Products, graph};

/// The backend's name.
pub const NAME: &str = "onnx";

/// Whether a graph can be made for a problem: f16 and f32; bf16 is converted on export.
///
/// # Errors
/// [`Unsupported`], with the reason.
pub fn supports(problem: &Problem) -> std::result::Result<(), Unsupported> {
    let refuse = |param, value, limit: &str| Err(Unsupported { backend: NAME, param, value, limit: limit.into() });
    if problem.dtype() == DType::Bf16 {
        return refuse("dtype", "bf16".into(), "f16, f32 (export converts bf16)");
    }
    if problem.max_tokens_per_seq() >= i32::MAX as u64 {
        return refuse("max_pages_per_seq * page_size", problem.max_tokens_per_seq().to_string(), "up to 2^31 - 2");
    }
    Ok(())
}

/// Runs exported graphs on this CPU.
pub struct OnnxBackend {
    info: BackendInfo,
    products: Products,
}

/// The graph of a problem, made ready to run: what there is to plan ahead of time. Good for every step of its class.
pub struct OnnxSchedule {
    problem: Problem,
    /// `None` where no row can see a key.
    program: Option<run::Program>,
}

impl OnnxBackend {
    /// With f32 products.
    pub fn new() -> Self {
        Self::with_products(Products::F32)
    }

    /// With products of the type given.
    pub fn with_products(products: Products) -> Self {
        let info = BackendInfo {
            name: NAME,
            device_name: format!("{} (tract, opset {})", std::env::consts::ARCH, proto::OPSET),
            device: Device::Host,
            evidence: Evidence::T3,
        };
        OnnxBackend { info, products }
    }
}

impl Default for OnnxBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl MlaBackend for OnnxBackend {
    type Buffer = CpuBuffer;
    type Schedule = OnnxSchedule;
    type Stream = ();

    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        supports(problem)
    }

    fn alloc(&self, bytes: usize) -> Result<CpuBuffer> {
        CpuBuffer::new(bytes)
    }

    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<CpuBuffer> {
        CpuBuffer::repeated(tile, bytes)
    }

    fn download(&self, buffer: &CpuBuffer, bytes: &mut [u8]) -> Result<()> {
        buffer.read(bytes)
    }

    /// Makes the graph ready. Lengths are inputs of the graph, so they do not shape it; the splits asked for are
    /// checked and have no other meaning, since a graph is not split.
    fn schedule(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        _: (),
    ) -> Result<OnnxSchedule> {
        supports(problem)?;
        inputs.validate(problem, Device::Host)?;
        let lengths = inputs.check_host_lengths(problem)?;
        get_mla_metadata(&lengths, options.num_sm_parts.unwrap_or(1), options.policy)?;
        let empty = problem.b() == 0 || problem.num_pages() == 0 || problem.max_pages_per_seq() == 0;
        let program = match empty {
            true => None,
            false => Some(run::Program::new(&graph(problem, self.products)?)?),
        };
        Ok(OnnxSchedule { problem: problem.clone(), program })
    }

    /// None: the runtime has memory of its own.
    fn workspace_bytes(&self, _: &Problem, _: &OnnxSchedule) -> usize {
        0
    }

    /// Runs the graph. Unlike other backends' `run` it allocates: the runtime has no other way.
    fn run(
        &self,
        problem: &Problem,
        schedule: &OnnxSchedule,
        _: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        _: (),
    ) -> Result<()> {
        supports(problem)?;
        inputs.validate(problem, Device::Host)?;
        outputs.validate(problem, inputs, Device::Host)?;
        inputs.check_host_tables(problem)?;
        check_class(&schedule.problem, problem)?;
        let Some(program) = &schedule.program else { return no_keys(problem, outputs) };
        let pair = |name, whole, rest_name, rest| {
            std::iter::once((name, whole)).chain(Option::map(rest, |rest| (rest_name, rest))).collect::<Vec<_>>()
        };
        let query = match &inputs.query {
            Query::Fused(q) => pair("q", q, "q_pe", None),
            Query::Split { q_nope, q_pe } => pair("q_nope", q_nope, "q_pe", q_pe.as_ref()),
        };
        let cache = match &inputs.kv_cache {
            KvCache::Fused(k) => pair("k_cache", k, "kpe", None),
            KvCache::Split { ckv, kpe } => pair("ckv", ckv, "kpe", kpe.as_ref()),
        };
        let table = vec![("block_table", &inputs.block_table)];
        let lengths = vec![("cache_seqlens", &inputs.cache_seqlens)];
        let mut all = vec![query, cache, table, lengths];
        all.extend(inputs.visible_lengths.as_ref().map(|v| vec![("visible_lengths", v)]));
        program.run(&all, &mut outputs.out, &mut outputs.lse)
    }

    fn finish(&self, _: &OnnxSchedule, _: ()) -> Result<()> {
        Ok(())
    }
}

/// A graph serves the class it was made for.
fn check_class(made_for: &Problem, problem: &Problem) -> Result<()> {
    let fields = |p: &Problem| {
        [
            ("b", p.b()),
            ("s_q", p.s_q()),
            ("h_q", p.h_q()),
            ("h_kv", p.h_kv()),
            ("head_dim_k", p.head_dim_k()),
            ("head_dim_v", p.head_dim_v()),
            ("num_pages", p.num_pages()),
            ("page_size", p.page_size()),
            ("max_pages_per_seq", p.max_pages_per_seq()),
            ("dtype", p.dtype() as usize),
            ("mask", p.mask() as usize),
            ("softmax_scale bits", p.softmax_scale().to_bits() as usize),
        ]
    };
    let pairs = fields(made_for).into_iter().zip(fields(problem));
    match pairs.into_iter().find(|((_, made), (_, asked))| made != asked) {
        Some(((param, made), (_, asked))) => {
            Err(MlaError::ScheduleMismatch { param, value: made as i64, limit: asked as i64 })
        }
        None => Ok(()),
    }
}

/// The results of rows that see no key, for calls without pages: there is no graph over an empty cache.
fn no_keys(p: &Problem, outputs: &mut Outputs<'_>) -> Result<()> {
    let size = p.dtype().size();
    for i in 0..p.b() {
        for j in 0..p.s_q() {
            for h in 0..p.h_q() {
                let at = 4 * outputs.lse.as_view().offset(&[i, h, j]);
                outputs.lse.host_bytes_mut("lse")?[at..at + 4].copy_from_slice(&f32::INFINITY.to_ne_bytes());
                for d in 0..p.head_dim_v() {
                    let at = size * outputs.out.as_view().offset(&[i, j, h, d]);
                    outputs.out.host_bytes_mut("out")?[at..at + size].fill(0);
                }
            }
        }
    }
    Ok(())
}
