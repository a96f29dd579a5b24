//! One step: what the kernels are told, and their launches. Allocates nothing, waits for nothing.

use std::ffi::c_void;

use cudarc::driver::sys::CUtensorMap;

use super::maps::Boxes;
use super::params::{DecodeParams, FLAG_OUT_VEC16, TensorMap};
use super::plan::Sm90Schedule;
use super::variant::{Form, TILE_M, Variant, m_tiles, q_box_rows};
use super::{NAME, Sm90Backend};
use crate::backend::Unsupported;
use crate::call::{Inputs, KvCache, Outputs, Query};
use crate::device::{Launch, MIN_SCALE_LOG2, Plan, PlanAddresses, Stream, usable_pages_per_seq};
use crate::error::{MlaError, Result};
use crate::problem::{BLOCK_TOKENS, Mask, Problem};
use crate::tensor::TensorView;
use crate::workspace::Workspace;

/// Rows of q and KV move 16 bytes at a time.
const ROW_ALIGN: u64 = 16;
/// The same in elements of 16 bits.
const ROW_ALIGN_ELEMENTS: usize = 8;
/// Alignment of the workspace.
const WORKSPACE_ALIGN: usize = 128;

/// Threads of the decode kernel.
const DECODE_THREADS: u32 = 512;

/// Whether the counts of a problem fit the kernels' 32-bit fields and the grid.
pub(super) fn check_sizes(problem: &Problem) -> std::result::Result<(), Unsupported> {
    const MAX_GRID_Y: usize = 65_535;
    for (param, value, limit, words) in [
        ("b", problem.b(), 65_536, "0..=65536"),
        ("h_kv", problem.h_kv(), MAX_GRID_Y, "1..=65535"),
        ("s_q x h_q", problem.s_q() * problem.h_q(), 1 << 24, "1..=16777216"),
        ("page_size", problem.page_size(), 1 << 24, "1..=16777216"),
        // Rows of the last tile included, so that the kernels' division by multiplication is exact.
        (
            "s_q x (h_q / h_kv)^2",
            (m_tiles(problem) * TILE_M).saturating_mul(problem.heads_per_kv()),
            (1 << 32) - 1,
            "1..=4294967295",
        ),
    ] {
        if value > limit {
            return Err(Unsupported { backend: NAME, param, value: value.to_string(), limit: words.to_string() });
        }
    }
    Ok(())
}

/// Address and strides of a tensor's outer dimensions, for reading rows of 16 bytes a step.
fn rows(param: &'static str, view: &TensorView<'_>) -> Result<(u64, [i64; 3])> {
    let address = view.address().unwrap_or(0);
    if view.is_empty() {
        return Ok((0, [0; 3]));
    }
    if !address.is_multiple_of(ROW_ALIGN) {
        return Err(MlaError::Alignment { param, value: address, limit: ROW_ALIGN as usize });
    }
    let mut strides = [0; 3];
    for (dim, stride) in strides.iter_mut().enumerate() {
        // A stride that is never stepped by may be anything.
        if view.shape()[dim] > 1 {
            let value = view.strides()[dim];
            if !value.is_multiple_of(ROW_ALIGN_ELEMENTS) {
                let limit = "multiples of 8 elements".to_string();
                return Err(Unsupported { backend: NAME, param, value: format!("stride {value}"), limit }.into());
            }
            *stride = value as i64;
        }
    }
    Ok((address, strides))
}

/// As [`rows`], of a tensor whose last columns are a second one.
fn rows_apart(
    problem: &Problem,
    (name, fused): (&'static str, &TensorView<'_>),
    second: Option<(&'static str, Option<&TensorView<'_>>)>,
) -> Result<[(u64, [i64; 3]); 2]> {
    let first = rows(name, fused)?;
    let rope = match second {
        None => {
            let offset = (problem.head_dim_v() * problem.dtype().size()) as u64;
            (if first.0 == 0 { 0 } else { first.0 + offset }, first.1)
        }
        Some((name, Some(view))) => rows(name, view)?,
        Some((_, None)) => (0, [0; 3]),
    };
    Ok([first, rope])
}

fn signed<const N: usize>(strides: &[usize]) -> [i64; N] {
    std::array::from_fn(|dim| strides[dim] as i64)
}

impl Sm90Backend {
    pub(super) fn enqueue(
        &self,
        problem: &Problem,
        schedule: &Sm90Schedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        stream: Stream,
    ) -> Result<()> {
        super::supports(problem)?;
        inputs.validate(problem, self.info.device)?;
        outputs.validate(problem, inputs, self.info.device)?;
        schedule.check(problem)?;
        let (partial_out, partial_rows) = self.partials(problem, schedule, workspace)?;
        let mut params = params(problem, schedule.shape(), &schedule.addresses(), inputs, outputs)?;
        (params.partial_out, params.partial_rows) = (partial_out, partial_rows);
        if problem.rows() == 0 {
            return Ok(());
        }

        let _current = self.context.enter()?;
        let variant = Variant::of_call(problem, &params);
        let mut maps = [TensorMap(CUtensorMap { opaque: [0; 16] }); 4];
        // Two M tiles of a request load each other's KV.
        let paired = variant.form == Form::Tma && params.m_tiles % 2 == 0;
        // Without pages nothing is ever loaded, and a map of no pages would be refused.
        if variant.form != Form::Gather && problem.num_pages() > 0 {
            self.encode_maps(problem, &params, paired, &mut maps)?;
        }
        let (decode, combine) = (self.decode(variant)?, self.combine(problem)?);
        let (tiles, heads) = (params.m_tiles as u32, params.h_kv as u32);
        let combine_blocks = COMBINE_BLOCKS_PER_SM * self.context.facts().multiprocessors;
        let [ckv, kpe, q_nope, q_pe] = &mut maps;
        let grid = [tiles, heads, params.num_parts as u32];
        let decode_launch =
            Launch { grid, block: DECODE_THREADS, programmatic: true, cluster: if paired { 2 } else { 1 } };
        let combine_launch =
            Launch { grid: [combine_blocks, 1, 1], block: COMBINE_THREADS, programmatic: true, cluster: 1 };
        // SAFETY: the kernels' parameters, in order. What their addresses name is vouched for by the views, checked
        // against the problem above, by the schedule and by the workspace, checked for its size.
        unsafe {
            decode_launch.enqueue(
                decode,
                stream,
                &mut [
                    (&raw mut params).cast::<c_void>(),
                    std::ptr::from_mut(ckv).cast(),
                    std::ptr::from_mut(kpe).cast(),
                    std::ptr::from_mut(q_nope).cast(),
                    std::ptr::from_mut(q_pe).cast(),
                ],
            )?;
            combine_launch.enqueue(combine, stream, &mut [(&raw mut params).cast::<c_void>()])
        }
    }

    /// The maps of ckv, kpe, q_nope and q_pe; those of the rotary parts where there are any.
    fn encode_maps(
        &self,
        problem: &Problem,
        params: &DecodeParams,
        paired: bool,
        maps: &mut [TensorMap; 4],
    ) -> Result<()> {
        let (driver, dtype) = (self.context.driver(), problem.dtype());
        let cache = |address, [page, token, head]: [i64; 3], columns| Boxes {
            address,
            shape: [problem.num_pages(), problem.h_kv(), problem.page_size(), columns],
            strides: [page, head, token].map(|stride| stride as usize),
            rows: problem.page_size().min(BLOCK_TOKENS) as u32,
            promote: paired,
        };
        let query = |address, strides: [i64; 3], columns| Boxes {
            address,
            shape: [problem.b(), problem.s_q(), problem.h_q(), columns],
            strides: strides.map(|stride| stride as usize),
            rows: params.q_box_rows as u32,
            promote: paired,
        };
        let (latent, rope) = (problem.head_dim_v(), problem.rope());
        maps[0] = cache(params.ckv, params.ckv_strides, latent).latent_map(driver, dtype)?;
        maps[2] = query(params.q_nope, params.q_nope_strides, latent).latent_map(driver, dtype)?;
        if rope > 0 {
            maps[1] = cache(params.kpe, params.kpe_strides, rope).rope_map(driver, dtype)?;
            maps[3] = query(params.q_pe, params.q_pe_strides, rope).rope_map(driver, dtype)?;
        }
        Ok(())
    }

    /// Where partial outputs go, and what there is about their rows.
    fn partials(&self, problem: &Problem, schedule: &Sm90Schedule, workspace: &Workspace<'_>) -> Result<(u64, u64)> {
        let address = workspace.checked(schedule.workspace_bytes(problem), WORKSPACE_ALIGN, self.info.device)?;
        Ok((address, address + schedule.workspace_layout(problem).0 as u64))
    }
}

/// Threads of the combine kernel.
const COMBINE_THREADS: u32 = 512;

/// Blocks of the combine kernel for each multiprocessor: they share whatever there is to merge.
const COMBINE_BLOCKS_PER_SM: u32 = 2;

/// What divides a packed row by the heads of a KV head with one multiplication, `row * magic >> 32`; 0 stands for one head.
/// Right while rows x heads stays below 2^32, see [`check_sizes`].
fn heads_magic(heads: usize) -> u32 {
    if heads == 1 { 0 } else { ((1 << 32) / heads as u64 + 1) as u32 }
}

/// What the kernels are told, but for the workspace.
pub(super) fn params(
    problem: &Problem,
    plan: &Plan,
    at: &PlanAddresses,
    inputs: &Inputs<'_>,
    outputs: &Outputs<'_>,
) -> Result<DecodeParams> {
    let [(q_nope, q_nope_strides), (q_pe, q_pe_strides)] = match &inputs.query {
        Query::Fused(q) => rows_apart(problem, ("q", q), None)?,
        Query::Split { q_nope, q_pe } => rows_apart(problem, ("q_nope", q_nope), Some(("q_pe", q_pe.as_ref())))?,
    };
    let [(ckv, ckv_strides), (kpe, kpe_strides)] = match &inputs.kv_cache {
        KvCache::Fused(k) => rows_apart(problem, ("k_cache", k), None)?,
        KvCache::Split { ckv, kpe } => rows_apart(problem, ("ckv", ckv), Some(("kpe", kpe.as_ref())))?,
    };
    let (out, lse) = (outputs.out.as_view(), outputs.lse.as_view());
    let address = |view: &TensorView<'_>| view.address().unwrap_or(0);
    let aligned = address(&out).is_multiple_of(ROW_ALIGN)
        && out.strides()[3] == 1
        && out.strides()[..3].iter().all(|s| s.is_multiple_of(ROW_ALIGN_ELEMENTS));
    let visible = inputs.visible_lengths.as_ref();
    Ok(DecodeParams {
        q_nope,
        q_pe,
        q_nope_strides,
        q_pe_strides,
        ckv,
        kpe,
        ckv_strides,
        kpe_strides,
        block_table: address(&inputs.block_table),
        block_table_stride_b: inputs.block_table.strides()[0] as i64,
        cache_seqlens: address(&inputs.cache_seqlens),
        visible_lens: visible.map_or(0, address),
        visible_lens_stride_b: visible.map_or(0, |v| v.strides()[0] as i64),
        out: address(&out),
        out_strides: signed(out.strides()),
        lse: address(&lse),
        // The contract's order is b, h_q, s_q, as here.
        lse_strides: signed(lse.strides()),
        parts: at.parts,
        num_splits: at.num_splits,
        owners: at.scratch,
        status: at.status,
        b: problem.b() as i32,
        s_q: problem.s_q() as i32,
        h_q: problem.h_q() as i32,
        h_kv: problem.h_kv() as i32,
        heads_per_kv: problem.heads_per_kv() as i32,
        m_tiles: m_tiles(problem) as i32,
        num_parts: plan.num_parts() as i32,
        page_size: problem.page_size() as i32,
        num_pages: problem.num_pages() as i32,
        max_pages_per_seq: usable_pages_per_seq(problem),
        causal: i32::from(problem.mask() == Mask::Causal),
        fixed_split_blocks: plan.fixed_split_blocks(),
        flags: if aligned { FLAG_OUT_VEC16 } else { 0 },
        heads_magic: heads_magic(problem.heads_per_kv()),
        q_box_rows: q_box_rows(problem).unwrap_or(TILE_M as u32) as i32,
        scale_log2: problem.scale_log2().max(MIN_SCALE_LOG2),
        ..DecodeParams::default()
    })
}
