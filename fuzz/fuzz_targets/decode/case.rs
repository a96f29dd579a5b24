//! What the fuzzer's bytes mean: a problem, its tables and lengths, and the mistakes made in them.

use arbitrary::Arbitrary;
use polymla::{DType, Inputs, KvCache, Mask, MlaError, Problem, Query, TensorView};

use crate::tensor::{Form, Tensor};

#[derive(Arbitrary, Debug)]
pub struct Case {
    pub b: u8,
    pub s_q: u8,
    pub heads_per_kv: u8,
    pub h_kv: u8,
    pub head_dim_v: u8,
    pub rope: u8,
    pub page_size: u8,
    pub num_pages: u8,
    pub columns: u8,
    pub dtype: u8,
    pub mask: u8,
    pub scale: Option<f32>,
    pub odd_problem: Option<(u8, u64)>,
    /// Lengths and table entries: mostly valid ones, by remainder.
    pub lengths: [u8; 4],
    pub bad_length: Option<(u8, i32)>,
    pub table: [u8; 32],
    pub bad_entry: Option<(u8, i32)>,
    pub visible: [u8; 8],
    pub bad_visible: Option<(u8, i32)>,
    pub split_query: bool,
    pub split_cache: bool,
    pub q: Form,
    pub k: Form,
    pub table_form: Form,
    pub out: Form,
    pub lse: Form,
    pub parts: Option<u8>,
    pub invariant: bool,
    pub blocks: u8,
    pub other_lengths: bool,
    pub workspace_short: u8,
    pub seed: u32,
    pub backend: u8,
    /// Which of the mistakes above are made: a bit must be set in all of these, so that most calls have few.
    pub mistakes: [u16; 3],
}

impl Case {
    pub fn makes(&self, mistake: u16) -> bool {
        self.mistakes.iter().all(|bits| bits >> mistake & 1 == 1)
    }

    /// The form of a tensor: one that makes no call invalid, unless the mistake is to be made.
    pub fn form(&self, form: &Form, mistake: u16) -> Form {
        match form {
            Form::Dense | Form::Gaps(_) | Form::Permuted(_) => form.clone(),
            _ if self.makes(mistake) => form.clone(),
            Form::Strides([a, b, c, d]) => Form::Gaps([*a as u8, *b as u8, *c as u8, *d as u8]),
            _ => Form::Dense,
        }
    }
}

/// -2 to 2, from a counter.
fn value(state: &mut u32) -> f64 {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    f64::from(*state >> 16) / 16384.0 - 2.0
}

pub fn problem(c: &Case) -> Result<Problem, MlaError> {
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
pub struct Data {
    query: [Option<Tensor>; 3],
    cache: [Option<Tensor>; 3],
    table: Tensor,
    lengths: Tensor,
    visible: Option<Tensor>,
    /// Lengths as they are in the tensor.
    pub values: Vec<i32>,
}

pub fn data(c: &Case, p: &Problem) -> Option<Data> {
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
    pub fn inputs(&self) -> Result<Inputs<'_>, MlaError> {
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
