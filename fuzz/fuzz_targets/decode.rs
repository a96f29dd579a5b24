//! Any problem, tables, lengths, strides, masks and schedule on the CPU backend, valid or not.
//!
//! Every buffer has exactly the size its tensor needs (or less), so that AddressSanitizer sees one byte too many. A call
//! that is refused must leave its outputs as they were; one that is accepted must agree with the f64 reference.
#![no_main]

use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use half::{bf16, f16};
use libfuzzer_sys::fuzz_target;
use polymla::cpu::{CpuBackend, Isa};
use polymla::tensor::contiguous_strides;
use polymla::{
    DType, HostWorkspace, Inputs, KvCache, Mask, MlaBackend, MlaError, Outputs, Problem, Query, ScheduleOptions,
    SplitPolicy, TensorView, TensorViewMut, get_mla_metadata, reference,
};

/// How one tensor departs from the plain one.
#[derive(Arbitrary, Debug, Clone)]
enum Form {
    Dense,
    /// Gaps of these many elements after each dimension.
    Gaps([u8; 4]),
    /// Dimensions ordered by these keys, gaps of one element.
    Permuted([u8; 4]),
    /// Any strides.
    Strides([u16; 4]),
    /// One stride is enormous.
    Huge(u8, u64),
    /// One dimension is longer or shorter.
    Shape(u8, i8),
    /// The memory is too small by so many elements.
    Short(u8),
    /// Another element type.
    Type(u8),
}

#[derive(Arbitrary, Debug)]
struct Case {
    b: u8,
    s_q: u8,
    heads_per_kv: u8,
    h_kv: u8,
    head_dim_v: u8,
    rope: u8,
    page_size: u8,
    num_pages: u8,
    columns: u8,
    dtype: u8,
    mask: u8,
    scale: Option<f32>,
    odd_problem: Option<(u8, u64)>,
    /// Lengths and table entries: mostly valid ones, by remainder.
    lengths: [u8; 4],
    bad_length: Option<(u8, i32)>,
    table: [u8; 32],
    bad_entry: Option<(u8, i32)>,
    visible: [u8; 8],
    bad_visible: Option<(u8, i32)>,
    split_query: bool,
    split_cache: bool,
    q: Form,
    k: Form,
    table_form: Form,
    out: Form,
    lse: Form,
    parts: Option<u8>,
    invariant: bool,
    blocks: u8,
    other_lengths: bool,
    workspace_short: u8,
    seed: u32,
    backend: u8,
    /// Which of the mistakes above are made: a bit must be set in all of these, so that most calls have few.
    mistakes: [u16; 3],
}

impl Case {
    fn makes(&self, mistake: u16) -> bool {
        self.mistakes.iter().all(|bits| bits >> mistake & 1 == 1)
    }

    /// The form of a tensor: one that makes no call invalid, unless the mistake is to be made.
    fn form(&self, form: &Form, mistake: u16) -> Form {
        match form {
            Form::Dense | Form::Gaps(_) | Form::Permuted(_) => form.clone(),
            _ if self.makes(mistake) => form.clone(),
            Form::Strides([a, b, c, d]) => Form::Gaps([*a as u8, *b as u8, *c as u8, *d as u8]),
            _ => Form::Dense,
        }
    }
}

/// Memory of exactly `len` elements.
enum Memory {
    Bf16(Box<[bf16]>),
    F16(Box<[f16]>),
    F32(Box<[f32]>),
    I32(Box<[i32]>),
}

struct Tensor {
    memory: Memory,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Most elements a tensor may take; beyond, its memory is too small and the view says so.
const MOST: usize = 1 << 17;

fn extent(shape: &[usize], strides: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    let last: u128 = shape.iter().zip(strides).map(|(n, s)| (*n as u128 - 1) * *s as u128).sum();
    usize::try_from(last + 1).unwrap_or(usize::MAX).min(MOST)
}

impl Tensor {
    /// `inner`: the last dimension stays innermost, as rows of inputs must be.
    fn new(dtype: DType, shape: &[usize], form: &Form, inner: bool) -> Tensor {
        let (mut dtype, mut shape, mut short) = (dtype, shape.to_vec(), 0);
        let rank = shape.len();
        if let Form::Shape(dim, change) = form {
            let n = &mut shape[*dim as usize % rank];
            *n = n.saturating_add_signed(isize::from(*change % 3));
        }
        let mut strides = contiguous_strides(&shape)[..rank].to_vec();
        match form {
            Form::Dense | Form::Shape(..) => {}
            Form::Gaps(gaps) => {
                for d in (0..rank.saturating_sub(1)).rev() {
                    strides[d] =
                        strides[d + 1].saturating_mul(shape[d + 1].max(1)).saturating_add(gaps[d] as usize % 8);
                }
            }
            Form::Permuted(keys) => {
                let mut order: Vec<usize> = (0..rank).collect();
                order.sort_by_key(|d| if inner && *d + 1 == rank { -1 } else { i32::from(keys[*d]) });
                let mut stride = 1;
                for d in order {
                    strides[d] = stride;
                    stride = stride.saturating_mul(shape[d].max(1)).saturating_add(1);
                }
            }
            Form::Strides(any) => strides.iter_mut().zip(any).for_each(|(s, a)| *s = *a as usize % 700),
            Form::Huge(dim, stride) => strides[*dim as usize % rank] = *stride as usize,
            Form::Short(n) => short = *n as usize,
            Form::Type(t) => dtype = [DType::Bf16, DType::F16, DType::F32, DType::I32][*t as usize % 4],
        }
        let len = extent(&shape, &strides).saturating_sub(short);
        let memory = match dtype {
            DType::Bf16 => Memory::Bf16(vec![bf16::NAN; len].into()),
            DType::F16 => Memory::F16(vec![f16::NAN; len].into()),
            DType::F32 => Memory::F32(vec![f32::NAN; len].into()),
            _ => Memory::I32(vec![i32::MAX - 3; len].into()),
        };
        Tensor { memory, shape, strides }
    }

    fn view(&self, name: &'static str) -> Result<TensorView<'_>, MlaError> {
        match &self.memory {
            Memory::Bf16(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F16(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F32(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::I32(m) => TensorView::from_slice_strided(name, m, &self.shape, &self.strides),
        }
    }

    fn view_mut(&mut self, name: &'static str) -> Result<TensorViewMut<'_>, MlaError> {
        match &mut self.memory {
            Memory::Bf16(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F16(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::F32(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
            Memory::I32(m) => TensorViewMut::from_slice_strided(name, m, &self.shape, &self.strides),
        }
    }

    fn at(&self, index: &[usize]) -> usize {
        let wide: u128 = index.iter().zip(&self.strides).map(|(i, s)| *i as u128 * *s as u128).sum();
        usize::try_from(wide).unwrap_or(usize::MAX)
    }

    fn set(&mut self, index: &[usize], x: f64) {
        if index.iter().zip(&self.shape).any(|(i, n)| i >= n) {
            return;
        }
        let at = self.at(index);
        match &mut self.memory {
            Memory::Bf16(m) => m.get_mut(at).map_or((), |e| *e = bf16::from_f64(x)),
            Memory::F16(m) => m.get_mut(at).map_or((), |e| *e = f16::from_f64(x)),
            Memory::F32(m) => m.get_mut(at).map_or((), |e| *e = x as f32),
            Memory::I32(m) => m.get_mut(at).map_or((), |e| *e = x as i32),
        }
    }

    fn untouched(&self) -> bool {
        match &self.memory {
            Memory::Bf16(m) => m.iter().all(|x| x.is_nan()),
            Memory::F16(m) => m.iter().all(|x| x.is_nan()),
            Memory::F32(m) => m.iter().all(|x| x.is_nan()),
            Memory::I32(m) => m.iter().all(|x| *x == i32::MAX - 3),
        }
    }
}

/// -2 to 2, from a counter.
fn value(state: &mut u32) -> f64 {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    f64::from(*state >> 16) / 16384.0 - 2.0
}

fn backends() -> &'static [CpuBackend] {
    static BACKENDS: OnceLock<Vec<CpuBackend>> = OnceLock::new();
    BACKENDS.get_or_init(|| {
        // The fuzzer's own thread works too: no hand-over for each input.
        let here = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
        let one = Arc::new(here.build().unwrap());
        let three = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
        let mut all: Vec<_> =
            Isa::available().into_iter().map(|isa| CpuBackend::with_isa_and_pool(isa, one.clone()).unwrap()).collect();
        all.push(CpuBackend::with_pool(three).unwrap());
        all
    })
}

fn problem(c: &Case) -> Result<Problem, MlaError> {
    let h_kv = 1 + c.h_kv as usize % 3;
    let h_q = h_kv * (1 + c.heads_per_kv as usize % 18);
    let head_dim_v = 1 + c.head_dim_v as usize % 36;
    let mut builder = Problem::builder(c.b as usize % 4)
        .s_q(1 + c.s_q as usize % 2)
        .h_q(h_q)
        .h_kv(h_kv)
        .head_dim_v(head_dim_v)
        .head_dim_k(head_dim_v + c.rope as usize % 10)
        .page_size(1 + c.page_size as usize % 130)
        .num_pages(c.num_pages as usize % 12)
        .max_pages_per_seq(c.columns as usize % 7)
        .dtype([DType::Bf16, DType::F16, DType::F32][c.dtype as usize % 3])
        .mask([Mask::None, Mask::Causal, Mask::VisibleLengths][c.mask as usize % 3]);
    if let Some(scale) = c.scale {
        builder = builder.softmax_scale(scale);
    }
    if let Some((field, value)) = c.odd_problem.filter(|_| c.makes(5)) {
        let value = value as usize;
        builder = match field % 9 {
            0 => builder.s_q(value),
            1 => builder.h_q(value),
            2 => builder.h_kv(value),
            3 => builder.head_dim_v(value),
            4 => builder.head_dim_k(value),
            5 => builder.page_size(value),
            6 => builder.num_pages(value),
            7 => builder.max_pages_per_seq(value),
            _ => builder.dtype(DType::I32),
        };
    }
    builder.build()
}

/// The tensors that a call reads.
struct Data {
    query: [Option<Tensor>; 3],
    cache: [Option<Tensor>; 3],
    table: Tensor,
    lengths: Tensor,
    visible: Option<Tensor>,
    /// Lengths as they are in the tensor.
    values: Vec<i32>,
}

fn data(c: &Case, p: &Problem) -> Option<Data> {
    // An odd problem that is valid may still be larger than a fuzzer should run.
    let (rows, d_k) = (p.b().max(1) * p.s_q() * p.h_q(), p.head_dim_k());
    let tokens = p.num_pages().checked_mul(p.page_size())?.checked_mul(p.h_kv())?;
    if rows.checked_mul(d_k)? > 10_000 || tokens.checked_mul(d_k)? > 100_000 || p.max_pages_per_seq() > 500 {
        return None;
    }
    let mut values = Vec::new();
    let room = p.max_tokens_per_seq().min(200) as usize;
    for i in 0..p.b() {
        values.push(if p.num_pages() == 0 || i >= c.lengths.len() {
            0
        } else {
            (c.lengths[i] as usize % (room + 1)) as i32
        });
    }
    if let Some((i, value)) = c.bad_length.filter(|_| c.makes(6) && p.b() > 0) {
        values[i as usize % p.b()] = value;
    }
    let mut lengths = Tensor::new(DType::I32, &[p.b()], &Form::Dense, true);
    let mut table = Tensor::new(DType::I32, &[p.b(), p.max_pages_per_seq()], &c.form(&c.table_form, 0), true);
    for (i, len) in values.iter().enumerate() {
        lengths.set(&[i], f64::from(*len));
        let used = (*len).max(0) as usize / p.page_size() + 1;
        for column in 0..used.min(p.max_pages_per_seq()) {
            let page = c.table[(i * 7 + column) % c.table.len()] as usize % p.num_pages().max(1);
            table.set(&[i, column], page as f64);
        }
    }
    if let Some((at, entry)) = c.bad_entry.filter(|_| c.makes(7) && p.b() * p.max_pages_per_seq() > 0) {
        let at = at as usize;
        table.set(&[at % p.b(), at / p.b() % p.max_pages_per_seq()], f64::from(entry));
    }
    // (page, tokens of it that are used). Read back, since strides may alias; all the rest of the cache stays NaN.
    let mut pages = Vec::new();
    if let Ok(view) = table.view("block_table") {
        for (i, len) in values.iter().enumerate() {
            let len = (*len).max(0) as usize;
            for column in 0..len.div_ceil(p.page_size()).min(p.max_pages_per_seq()) {
                let page =
                    view.get::<i32>(&[i, column]).map_or(usize::MAX, |e| usize::try_from(e).unwrap_or(usize::MAX));
                pages.push((page, (len - column * p.page_size()).min(p.page_size())));
            }
        }
    }
    let mut visible = None;
    if p.mask() == Mask::VisibleLengths {
        let mut tensor = Tensor::new(DType::I32, &[p.b(), p.s_q()], &Form::Dense, true);
        for i in 0..p.b() {
            for j in 0..p.s_q() {
                let v = c.visible[(i * 2 + j) % c.visible.len()] as i32 % values[i].max(0).saturating_add(1);
                tensor.set(&[i, j], f64::from(v));
            }
        }
        if let Some((at, value)) = c.bad_visible.filter(|_| c.makes(8) && p.b() > 0) {
            tensor.set(&[at as usize % p.b(), at as usize / p.b() % p.s_q()], f64::from(value));
        }
        visible = Some(tensor);
    }
    let state = &mut c.seed.clone();
    let mut fill = |split: bool, shape: [usize; 3], form: &Form, rows: &mut dyn Iterator<Item = [usize; 3]>| {
        let [x, y, z] = shape;
        let mut parts = match split {
            false => [Some(Tensor::new(p.dtype(), &[x, y, z, d_k], form, true)), None, None],
            true => [
                None,
                Some(Tensor::new(p.dtype(), &[x, y, z, p.head_dim_v()], form, true)),
                (p.rope() > 0).then(|| Tensor::new(p.dtype(), &[x, y, z, p.rope()], &Form::Dense, true)),
            ],
        };
        for [x, y, z] in rows {
            for d in 0..d_k {
                let v = value(state);
                match (&mut parts, d.checked_sub(p.head_dim_v())) {
                    ([Some(whole), ..], _) => whole.set(&[x, y, z, d], v),
                    ([_, Some(left), _], None) => left.set(&[x, y, z, d], v),
                    ([.., Some(right)], Some(d)) => right.set(&[x, y, z, d], v),
                    _ => {}
                }
            }
        }
        parts
    };
    let (s_q, h_q, h_kv, page_size) = (p.s_q(), p.h_q(), p.h_kv(), p.page_size());
    let mut rows = (0..p.b() * s_q * h_q).map(|n| [n / h_q / s_q, n / h_q % s_q, n % h_q]);
    let query = fill(c.split_query, [p.b(), s_q, h_q], &c.form(&c.q, 1), &mut rows);
    let tokens = pages.iter().flat_map(|(page, n)| (0..*n).map(|slot| [*page, slot]));
    let mut used = tokens.flat_map(|[page, slot]| (0..h_kv).map(move |g| [page, slot, g]));
    let cache = fill(c.split_cache, [p.num_pages(), page_size, h_kv], &c.form(&c.k, 2), &mut used);
    Some(Data { query, cache, table, lengths, visible, values })
}

impl Data {
    fn inputs(&self) -> Result<Inputs<'_>, MlaError> {
        fn view<'a>(t: &'a Option<Tensor>, name: &'static str) -> Result<Option<TensorView<'a>>, MlaError> {
            t.as_ref().map(|t| t.view(name)).transpose()
        }
        Ok(Inputs {
            query: match &self.query {
                [Some(q), ..] => Query::Fused(q.view("q")?),
                [_, Some(nope), pe] => Query::Split { q_nope: nope.view("q_nope")?, q_pe: view(pe, "q_pe")? },
                _ => unreachable!(),
            },
            kv_cache: match &self.cache {
                [Some(k), ..] => KvCache::Fused(k.view("k_cache")?),
                [_, Some(ckv), kpe] => KvCache::Split { ckv: ckv.view("ckv")?, kpe: view(kpe, "kpe")? },
                _ => unreachable!(),
            },
            block_table: self.table.view("block_table")?,
            cache_seqlens: self.lengths.view("cache_seqlens")?,
            visible_lengths: view(&self.visible, "visible_lengths")?,
        })
    }
}

fn decode(c: &Case) -> Result<(), MlaError> {
    let p = problem(c)?;
    if let Ok(schedule) = get_mla_metadata(&vec![100; p.b().min(50)], 7, SplitPolicy::BATCH_INVARIANT) {
        // Sizes too large for any memory must not wrap.
        backends().iter().for_each(|b| assert!(b.workspace_bytes(&p, &schedule) > 0));
    }
    let Some(data) = data(c, &p) else { return Ok(()) };
    let inputs = data.inputs()?;
    let (other_lengths, short) = (c.other_lengths && c.makes(9), c.makes(10));
    let policy = match c.invariant {
        true => SplitPolicy::BatchInvariant { split_blocks: u32::from(c.blocks % 6) },
        false => SplitPolicy::Balanced { overhead_blocks: u32::from(c.blocks % 8) },
    };
    let options = ScheduleOptions { num_sm_parts: c.parts.map(usize::from), policy };
    let expected = reference::decode(&p, &inputs);
    // One of them an input: five times the inputs in the same time.
    let backends = backends();
    for backend in [&backends[c.backend as usize % backends.len()]] {
        let mut out = Tensor::new(p.dtype(), &[p.b(), p.s_q(), p.h_q(), p.head_dim_v()], &c.form(&c.out, 3), false);
        let mut lse = Tensor::new(DType::F32, &[p.b(), p.h_q(), p.s_q()], &c.form(&c.lse, 4), false);
        let outputs = &mut Outputs { out: out.view_mut("out")?, lse: lse.view_mut("lse")? };
        let valid = outputs.validate(&p, &inputs, polymla::Device::Host).is_ok();
        let result = run(c, backend, &p, &options, &data, &inputs, outputs);
        match (&result, &expected) {
            (Err(_), Ok(_)) => {
                // What can still be wrong: outputs, schedule, workspace.
                let schedule = c.parts == Some(0) || (c.invariant && c.blocks % 6 == 0);
                let other = other_lengths || short;
                assert!(!valid || schedule || other, "refused without a reason: {result:?}");
            }
            (Ok(()), Err(error)) => panic!("accepted, but the reference says: {error}"),
            _ => {}
        }
        if result.is_err() {
            assert!(out.untouched() && lse.untouched(), "written in spite of {result:?}");
            continue;
        }
        let (Ok((ref_out, ref_lse)), out, lse) = (&expected, out.view("out")?, lse.view("lse")?) else { continue };
        compare(&p, &out, &lse, ref_out, ref_lse);
    }
    Ok(())
}

fn run(
    c: &Case,
    backend: &CpuBackend,
    p: &Problem,
    options: &ScheduleOptions,
    data: &Data,
    inputs: &Inputs<'_>,
    outputs: &mut Outputs<'_>,
) -> Result<(), MlaError> {
    let schedule = if c.other_lengths && c.makes(9) {
        // A schedule of other lengths: some of them one block off.
        let other: Vec<i32> =
            data.values.iter().map(|n| n.saturating_add(i32::from(c.blocks)).clamp(0, 3000)).collect();
        get_mla_metadata(&other, options.num_sm_parts.unwrap_or(3), options.policy)?
    } else {
        MlaBackend::schedule(backend, p, options, inputs, ())?
    };
    let bytes = backend.workspace_bytes(p, &schedule);
    let mut scratch = HostWorkspace::new();
    let mut workspace =
        scratch.lend(if c.makes(10) { bytes.saturating_sub(c.workspace_short as usize) } else { bytes });
    backend.run(p, &schedule, &mut workspace, inputs, outputs, ())
}

fn compare(p: &Problem, out: &TensorView<'_>, lse: &TensorView<'_>, ref_out: &[f64], ref_lse: &[f64]) {
    // Values are within 2, so scores are within 4 head_dim_k scale. Beyond a million, neighbouring f32 scores are so far
    // apart that a kernel which folds the scale into its exponent, as all do, may return anything: only memory counts.
    let reach = 4.0 * p.head_dim_k() as f64 * f64::from(p.softmax_scale());
    if reach > 1e6 {
        return;
    }
    // The random suite holds backends to what rounding explains; here only wrong results must show.
    let score_error = (1e-5 * reach).min(10.0);
    let allowed = 4.0 * (score_error.exp() - 1.0) + if p.dtype() == DType::F32 { 1e-4 } else { 0.06 };
    for i in 0..p.b() {
        for j in 0..p.s_q() {
            for h in 0..p.h_q() {
                let x = lse.get_f64(&[i, h, j]).unwrap();
                let y = ref_lse[(i * p.h_q() + h) * p.s_q() + j];
                assert!(x == y || (x - y).abs() <= 1e-4 + 1e-4 * y.abs() + score_error, "lse {x}, not {y}");
                for d in 0..p.head_dim_v() {
                    let x = out.get_f64(&[i, j, h, d]).unwrap();
                    let y = ref_out[((i * p.s_q() + j) * p.h_q() + h) * p.head_dim_v() + d];
                    assert!((x - y).abs() <= allowed, "out [{i}, {j}, {h}, {d}] {x}, not {y}");
                }
            }
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(case) = Case::arbitrary(&mut Unstructured::new(bytes)) {
        // An error is one of the right answers.
        let _ = decode(&case);
    }
});
