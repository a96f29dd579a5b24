//! A backend whose device is the fiber harness: the launch arithmetic of backends/portable/README.md.

use std::sync::Mutex;

use polymla::cpu::{CpuBackend, CpuBuffer};
use polymla::schedule::{DEFAULT_INVARIANT_BLOCKS, DEFAULT_OVERHEAD_BLOCKS, PartMetadata};
use polymla::{
    BackendInfo, DType, Device, Evidence, Inputs, KvCache, Mask, MlaBackend, MlaError, Outputs, Problem, Query, Result,
    ScheduleOptions, SplitPolicy, TensorView, Unsupported, Workspace,
};

use crate::library::{Kernels, Variant};

/// backends/portable/params.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct DecodeParams {
    pub q: [u64; 2],
    pub q_strides: [[i64; 3]; 2],
    pub kv: [u64; 2],
    pub kv_strides: [[i64; 3]; 2],
    pub block_table: u64,
    pub block_table_stride_b: i64,
    pub cache_seqlens: u64,
    pub visible_lens: u64,
    pub visible_lens_stride_b: i64,
    pub out: u64,
    pub out_strides: [i64; 4],
    pub lse: u64,
    pub lse_strides: [i64; 3],
    pub parts: u64,
    pub num_splits: u64,
    pub partial_out: u64,
    pub partial_lse: u64,
    pub status: u64,
    pub b: i32,
    pub s_q: i32,
    pub h_q: i32,
    pub h_kv: i32,
    pub heads_per_kv: i32,
    pub head_dim_k: i32,
    pub head_dim_v: i32,
    pub num_parts: i32,
    pub page_size: i32,
    pub page_shift: i32,
    pub num_pages: i32,
    pub max_pages_per_seq: i32,
    pub causal: i32,
    pub fixed_split_blocks: i32,
    pub slots: i32,
    pub combine_units: i32,
    pub combine_ways: i32,
    pub flags: i32,
    pub scale_log2: f32,
    pub requests_a_part: f32,
}
const _: () = assert!(size_of::<DecodeParams>() == 8 * 35 + 4 * 20);

/// backends/portable/params.h.
#[repr(C)]
pub struct ScheduleParams {
    pub cache_seqlens: u64,
    pub parts: u64,
    pub num_splits: u64,
    pub status: u64,
    pub max_tokens: i64,
    pub b: i32,
    pub num_parts: i32,
    pub overhead_blocks: i32,
    pub fixed_split_blocks: i32,
    pub merge_cost: i32,
    pub padding: i32,
}
const _: () = assert!(size_of::<ScheduleParams>() == 64);

/// What the status word holds while nothing is wrong.
pub const STATUS_OK: i32 = i32::MAX;

/// A plan that the schedule kernel made.
#[derive(Debug)]
pub struct DeviceSchedule {
    pub parts: Vec<PartMetadata>,
    pub num_splits: Vec<i32>,
    pub policy: SplitPolicy,
    pub slots: usize,
    pub status: Mutex<i32>,
}

pub struct SimtBackend {
    pub kernels: Kernels,
    pub seed: u64,
    variant: Variant,
    info: BackendInfo,
    memory: CpuBackend,
}

fn fixed(policy: SplitPolicy) -> i32 {
    match policy {
        SplitPolicy::BatchInvariant { split_blocks } => split_blocks as i32,
        SplitPolicy::Balanced { .. } => 0,
    }
}

impl SimtBackend {
    pub fn new(variant: Variant) -> Self {
        let info = BackendInfo {
            name: variant.name,
            device_name: format!("fiber harness, warp {}", variant.warp),
            device: Device::Host,
            evidence: Evidence::T3,
        };
        let memory = CpuBackend::new().unwrap();
        SimtBackend { kernels: Kernels::open(&variant), seed: 1, variant, info, memory }
    }

    /// Rows of the tuned kernel's tile, or none for head dimensions that the generic kernel serves.
    pub fn tile_rows(&self, p: &Problem, aligned: bool) -> Option<usize> {
        let tuned = matches!((p.head_dim_k(), p.head_dim_v()), (576 | 512, 512));
        let offered: &[usize] = match self.variant.shared_kib {
            163 => &[16, 32, 64],
            // The kernel with roles takes aligned rows only.
            227 if aligned => &[16, 32, 64],
            227 => &[16, 32],
            99 => &[16, 32],
            _ => &[16],
        };
        let rows = p.s_q() * p.heads_per_kv();
        tuned.then(|| *offered.iter().find(|m| **m >= rows).unwrap_or(&offered[offered.len() - 1]))
    }

    /// Whether partial results are pieces (backends/portable/pieces.h), which kernels on mma.sync leave.
    fn pieces(&self, p: &Problem) -> bool {
        self.variant.tile == "SIMT_TILE_MMA" && self.tile_rows(p, true).is_some()
    }

    /// Bytes of a slot of partial results, of a problem's rows.
    fn slot_bytes(&self, p: &Problem) -> usize {
        match self.pieces(p) {
            true => p.h_kv() * (p.s_q() * p.heads_per_kv()).div_ceil(8) * 16 * 768,
            false => p.s_q() * p.h_q() * p.head_dim_v() * 4,
        }
    }

    /// Plans with the schedule kernel. Lengths may be invalid: that is its to find.
    pub fn plan(&self, lens: &[i32], max_tokens: u64, num_parts: usize, policy: SplitPolicy) -> DeviceSchedule {
        let overhead = match policy {
            SplitPolicy::Balanced { overhead_blocks } => overhead_blocks as i32,
            SplitPolicy::BatchInvariant { .. } => 0,
        };
        self.plan_with(lens, max_tokens, num_parts, policy, overhead, 0)
    }

    /// As `plan`, with the overhead and the cost of a merge that the kernel is told.
    pub fn plan_with(
        &self,
        lens: &[i32],
        max_tokens: u64,
        num_parts: usize,
        policy: SplitPolicy,
        overhead_blocks: i32,
        merge_cost: i32,
    ) -> DeviceSchedule {
        let mut parts = vec![PartMetadata::default(); num_parts];
        let mut num_splits = vec![-1i32; lens.len() + 1];
        let mut status = STATUS_OK;
        let params = ScheduleParams {
            cache_seqlens: lens.as_ptr() as u64,
            parts: parts.as_mut_ptr() as u64,
            num_splits: num_splits.as_mut_ptr() as u64,
            status: &raw mut status as u64,
            max_tokens: i64::try_from(max_tokens).unwrap_or(i64::MAX),
            b: lens.len() as i32,
            num_parts: num_parts as i32,
            overhead_blocks,
            fixed_split_blocks: fixed(policy),
            merge_cost,
            padding: 0,
        };
        // SAFETY: the vectors have the lengths that the kernel writes.
        unsafe { self.kernels.launch("polymla_schedule", 1, 256 * 8 + 1024 * 4, &params, self.seed) };
        let longest = usize::try_from(max_tokens).unwrap().div_ceil(64);
        let slots = match policy {
            SplitPolicy::Balanced { .. } => lens.len() + num_parts,
            SplitPolicy::BatchInvariant { split_blocks } => lens.len() * longest.div_ceil(split_blocks as usize).max(1),
        };
        DeviceSchedule { parts, num_splits, policy, slots, status: Mutex::new(status) }
    }
}

/// Whether every row of a tensor of rank 4 starts at a multiple of `bytes`.
fn aligned(view: &TensorView<'_>, bytes: u64) -> bool {
    let size = view.dtype().size() as u64;
    let rows = view.shape().iter().zip(view.strides()).take(3);
    view.address().unwrap().is_multiple_of(bytes)
        && rows.into_iter().all(|(n, stride)| *n <= 1 || (*stride as u64 * size).is_multiple_of(bytes))
}

fn strides<const N: usize>(view: &TensorView<'_>) -> [i64; N] {
    std::array::from_fn(|i| view.strides()[i] as i64)
}

/// The two parts of a tensor that may be fused: addresses and strides. Without rope, the second is never read.
fn parts(nope: &TensorView<'_>, pe: Option<&TensorView<'_>>, fused_at: Option<usize>) -> ([u64; 2], [[i64; 3]; 2]) {
    let first = nope.address().unwrap();
    match (pe, fused_at) {
        (Some(pe), _) => ([first, pe.address().unwrap()], [strides(nope), strides(pe)]),
        (None, Some(columns)) => ([first, first + 2 * columns as u64], [strides(nope); 2]),
        (None, None) => ([first; 2], [strides(nope); 2]),
    }
}

impl SimtBackend {
    pub fn params(
        &self,
        p: &Problem,
        schedule: &DeviceSchedule,
        workspace: u64,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
    ) -> DecodeParams {
        let (q, q_strides, q_aligned) = match &inputs.query {
            Query::Fused(t) => (parts(t, None, Some(p.head_dim_v())), aligned(t, 16)),
            Query::Split { q_nope, q_pe } => (
                parts(q_nope, q_pe.as_ref(), None),
                aligned(q_nope, 16) && q_pe.as_ref().is_none_or(|t| t.is_empty() || aligned(t, 16)),
            ),
        }
        .flatten();
        let (kv, kv_strides, kv_aligned) = match &inputs.kv_cache {
            KvCache::Fused(t) => (parts(t, None, Some(p.head_dim_v())), aligned(t, 16)),
            KvCache::Split { ckv, kpe } => (
                parts(ckv, kpe.as_ref(), None),
                aligned(ckv, 16) && kpe.as_ref().is_none_or(|t| t.is_empty() || aligned(t, 16)),
            ),
        }
        .flatten();
        let (out, lse) = (outputs.out.as_view(), outputs.lse.as_view());
        let out_vec = aligned(&out, 8) && (out.strides()[3] == 1 || p.head_dim_v() == 1);
        let rows = p.s_q() * p.h_q();
        let partial_out = schedule.slots * self.slot_bytes(p);
        DecodeParams {
            q,
            q_strides,
            kv,
            kv_strides,
            block_table: inputs.block_table.address().unwrap(),
            block_table_stride_b: inputs.block_table.strides()[0] as i64,
            cache_seqlens: inputs.cache_seqlens.address().unwrap(),
            visible_lens: inputs.visible_lengths.map_or(0, |t| t.address().unwrap()),
            visible_lens_stride_b: inputs.visible_lengths.map_or(0, |t| t.strides()[0] as i64),
            out: out.address().unwrap(),
            out_strides: strides(&out),
            lse: lse.address().unwrap(),
            lse_strides: strides(&lse),
            parts: schedule.parts.as_ptr() as u64,
            num_splits: schedule.num_splits.as_ptr() as u64,
            partial_out: workspace,
            partial_lse: workspace + partial_out as u64,
            status: 0,
            b: p.b() as i32,
            s_q: p.s_q() as i32,
            h_q: p.h_q() as i32,
            h_kv: p.h_kv() as i32,
            heads_per_kv: p.heads_per_kv() as i32,
            head_dim_k: p.head_dim_k() as i32,
            head_dim_v: p.head_dim_v() as i32,
            num_parts: schedule.parts.len() as i32,
            page_size: p.page_size().min(i32::MAX as usize) as i32,
            page_shift: if p.page_size().is_power_of_two() { p.page_size().ilog2().min(31) as i32 } else { -1 },
            num_pages: p.num_pages() as i32,
            max_pages_per_seq: p.max_pages_per_seq().min(i32::MAX as usize) as i32,
            causal: i32::from(p.mask() == Mask::Causal),
            fixed_split_blocks: fixed(schedule.policy),
            slots: schedule.slots as i32,
            // Small numbers make every path of the combine kernel run.
            combine_units: if rows > 32 { 16 } else { 3 },
            combine_ways: if rows > 32 { 1 } else { 1 << (rows % 4) },
            flags: i32::from(q_aligned) | i32::from(kv_aligned) << 1 | i32::from(out_vec) << 2,
            scale_log2: (p.softmax_scale() * std::f32::consts::LOG2_E).max(1e-30),
            requests_a_part: p.b() as f32 / schedule.parts.len() as f32,
        }
    }
}

/// `((a, b), c)` as `(a, b, c)`.
trait Flatten<A, B, C> {
    fn flatten(self) -> (A, B, C);
}
impl<A, B, C> Flatten<A, B, C> for ((A, B), C) {
    fn flatten(self) -> (A, B, C) {
        (self.0.0, self.0.1, self.1)
    }
}

impl MlaBackend for SimtBackend {
    type Buffer = CpuBuffer;
    type Schedule = DeviceSchedule;
    type Stream = ();

    fn info(&self) -> &BackendInfo {
        &self.info
    }
    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        if matches!(problem.dtype(), DType::Bf16 | DType::F16) {
            return Ok(());
        }
        Err(Unsupported {
            backend: self.info.name,
            param: "dtype",
            value: problem.dtype().to_string(),
            limit: "bf16, f16".into(),
        })
    }
    fn alloc(&self, bytes: usize) -> Result<CpuBuffer> {
        self.memory.alloc(bytes)
    }
    fn upload_repeated(&self, tile: &[u8], bytes: usize) -> Result<CpuBuffer> {
        self.memory.upload_repeated(tile, bytes)
    }
    fn download(&self, buffer: &CpuBuffer, bytes: &mut [u8]) -> Result<()> {
        self.memory.download(buffer, bytes)
    }

    fn schedule(
        &self,
        problem: &Problem,
        options: &ScheduleOptions,
        inputs: &Inputs<'_>,
        _: (),
    ) -> Result<DeviceSchedule> {
        let lens = inputs.host_seqlens()?;
        Ok(self.plan(&lens, problem.max_tokens_per_seq(), options.num_sm_parts.unwrap_or(5), options.policy))
    }

    fn workspace_bytes(&self, p: &Problem, schedule: &DeviceSchedule) -> usize {
        schedule.slots * (self.slot_bytes(p) + p.s_q() * p.h_q() * 4)
    }

    fn run(
        &self,
        p: &Problem,
        schedule: &DeviceSchedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        _: (),
    ) -> Result<()> {
        inputs.validate(p, Device::Host)?;
        outputs.validate(p, inputs, Device::Host)?;
        if p.b() == 0 {
            return Ok(());
        }
        let bytes = self.workspace_bytes(p, schedule);
        let scratch = workspace.host(bytes)?;
        scratch.fill(0xff); // NaN: nothing may be read that was not written
        let scratch = scratch.as_mut_ptr() as u64;
        let mut status = *schedule.status.lock().unwrap();
        let mut params = self.params(p, schedule, scratch, inputs, outputs);
        params.status = &raw mut status as u64;
        let (dtype, rows) = (p.dtype().name(), p.s_q() * p.heads_per_kv());
        let parts = schedule.parts.len() * p.h_kv();
        let (name, grid) = match self.tile_rows(p, params.flags == 7) {
            Some(m) => (format!("polymla_decode_{dtype}_d{}_m{m}", p.head_dim_k()), rows.div_ceil(m) * parts),
            None => (format!("polymla_generic_{dtype}"), rows * p.head_dim_v().div_ceil(1024) * parts),
        };
        let units = match self.pieces(p) {
            true => p.h_kv() * rows.div_ceil(8) * params.combine_ways as usize,
            false => p.s_q() * p.h_q() * p.head_dim_v().div_ceil(128),
        };
        let combine = format!("polymla_{}_{dtype}", if self.pieces(p) { "merge" } else { "combine" });
        let combine_grid = p.b() * units.div_ceil(params.combine_units as usize);
        // SAFETY: every tensor was validated against the problem, tables are checked by the kernels before use, and the
        // workspace has the size that the parameters say.
        unsafe {
            self.kernels.launch(&name, grid, self.kernels.shared_bytes(&name), &params, self.seed);
            self.kernels.launch(&combine, combine_grid, self.kernels.shared_bytes(&combine), &params, self.seed);
        }
        *schedule.status.lock().unwrap() = status;
        Ok(())
    }

    fn finish(&self, schedule: &DeviceSchedule, _: ()) -> Result<()> {
        match *schedule.status.lock().unwrap() {
            STATUS_OK => Ok(()),
            request => Err(MlaError::DeviceCheck {
                request: request as usize,
                reason: "a length or a block-table entry is out of range",
            }),
        }
    }
}

/// Policies of every kind, by number.
pub fn policy(n: u64) -> SplitPolicy {
    match n % 4 {
        0 => SplitPolicy::Balanced { overhead_blocks: DEFAULT_OVERHEAD_BLOCKS },
        1 => SplitPolicy::Balanced { overhead_blocks: (n / 4 % 7) as u32 },
        2 => SplitPolicy::BatchInvariant { split_blocks: DEFAULT_INVARIANT_BLOCKS },
        _ => SplitPolicy::BatchInvariant { split_blocks: 1 + (n / 4 % 6) as u32 },
    }
}
