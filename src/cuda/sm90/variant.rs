//! Which decode kernel serves which problem.

use super::Sm90Backend;
use super::params::{DecodeParams, FLAG_OUT_VEC16};
use crate::device::Function;
use crate::error::Result;
use crate::problem::{BLOCK_TOKENS, Problem};
use crate::tensor::DType;

/// Query rows that one CTA handles.
pub(super) const TILE_M: usize = 64;

/// How KV reaches shared memory, and what is multiplied with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// TMA.
    Tma,
    /// cp.async, for page sizes that neither divide a block nor are made of whole ones, for several query rows of head counts
    /// that boxes cannot hold, and for outputs that are not written 16 bytes at a time.
    Gather,
    /// TMA, and the matrix products transposed: for up to 16 rows, where most of a tile would be padding.
    Few,
}

/// Most packed query rows of [`Form::Few`].
const FEW_ROWS: usize = 16;

/// A decode kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Variant {
    bf16: bool,
    rope: bool,
    pub(super) form: Form,
}

/// Tiles of query rows that share a KV head of a request.
pub(super) fn m_tiles(problem: &Problem) -> usize {
    (problem.s_q() * problem.heads_per_kv()).div_ceil(TILE_M)
}

/// Rows of a box of queries: heads of one query position, packed without gaps. None where a box would be less than the eight
/// rows of the swizzle.
pub(super) fn q_box_rows(problem: &Problem) -> Option<u32> {
    let heads = problem.heads_per_kv();
    if problem.s_q() == 1 {
        return Some(heads.min(TILE_M) as u32);
    }
    [64, 32, 16, 8].into_iter().find(|rows| heads.is_multiple_of(*rows as usize))
}

impl Variant {
    /// How many there are.
    pub(super) const COUNT: usize = 12;

    /// The kernel for a problem whose `out` has rows of contiguous, aligned columns, as most have.
    pub(super) fn of(problem: &Problem) -> Variant {
        let page = problem.page_size();
        // The swizzle repeats every 8 rows, so a box of fewer would have to begin in the middle of a pattern.
        let tma = page.is_multiple_of(BLOCK_TOKENS) || (page >= 8 && BLOCK_TOKENS.is_multiple_of(page));
        let form = match tma && q_box_rows(problem).is_some() {
            true if problem.s_q() * problem.heads_per_kv() <= FEW_ROWS => Form::Few,
            true => Form::Tma,
            false => Form::Gather,
        };
        Variant { bf16: problem.dtype() == DType::Bf16, rope: problem.rope() > 0, form }
    }

    /// The kernel for a call, whatever its `out` is like.
    pub(super) fn of_call(problem: &Problem, params: &DecodeParams) -> Variant {
        let usual = Variant::of(problem);
        if params.flags & FLAG_OUT_VEC16 != 0 { usual } else { Variant { form: Form::Gather, ..usual } }
    }

    fn index(self) -> usize {
        usize::from(!self.bf16) * 6 + usize::from(!self.rope) * 3 + self.form as usize
    }

    /// The unit that holds it; the kernel's name is this with `polymla_` before it.
    fn unit(self) -> &'static str {
        const NAMES: [&str; Variant::COUNT] = [
            "decode_bf16_d576_tma",
            "decode_bf16_d576_gather",
            "decode_bf16_d576_few",
            "decode_bf16_d512_tma",
            "decode_bf16_d512_gather",
            "decode_bf16_d512_few",
            "decode_f16_d576_tma",
            "decode_f16_d576_gather",
            "decode_f16_d576_few",
            "decode_f16_d512_tma",
            "decode_f16_d512_gather",
            "decode_f16_d512_few",
        ];
        NAMES[self.index()]
    }
}

/// Dynamic shared memory of the decode kernels.
pub(super) const DECODE_SHARED_BYTES: u32 = 232_448;

/// `sizeof(CombineSmem)`, combine.cu.
pub(super) const COMBINE_SHARED_BYTES: u32 = 86_016;

impl Sm90Backend {
    /// Loads what a problem needs, compiling in parallel where it has to be compiled.
    pub(super) fn prepare(&self, problem: &Problem) -> Result<()> {
        self.loader.modules(&["combine", Variant::of(problem).unit()])?;
        self.decode(Variant::of(problem))?;
        self.combine(problem).map(drop)
    }

    pub(super) fn decode(&self, variant: Variant) -> Result<&Function> {
        let cell = &self.decode[variant.index()];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        let unit = variant.unit();
        let module = self.loader.module(unit)?;
        let function = Function::new(&module, &format!("polymla_{unit}"), DECODE_SHARED_BYTES)?;
        Ok(cell.get_or_init(|| function))
    }

    pub(super) fn combine(&self, problem: &Problem) -> Result<&Function> {
        let bf16 = problem.dtype() == DType::Bf16;
        let cell = &self.combine[usize::from(!bf16)];
        if let Some(function) = cell.get() {
            return Ok(function);
        }
        let name = if bf16 { "polymla_combine_bf16" } else { "polymla_combine_f16" };
        let function = Function::new(&self.loader.module("combine")?, name, COMBINE_SHARED_BYTES)?;
        Ok(cell.get_or_init(|| function))
    }
}
