//! The decode of one class of problems as an ONNX graph.
//!
//! | step | operators | rank |
//! |---|---|---|
//! | pages | block-table entries that are not used or out of range become 0; `Gather` of whole pages | 2, 3 |
//! | keys | tokens that no row sees become 0 by `Where`, so that what is there, NaN included, is never multiplied | 4 |
//! | scores | Q K^T for all heads of a KV head and all rows of s_q at once | 4 |
//! | softmax | f32: maximum over visible keys, exp((score - maximum) * softmax_scale), 0 where not visible | 4 |
//! | results | P V, divided by the sum; 0 and +infinity for rows without a key; NaN for requests that are not valid | 4 |
//!
//! Rows are those of a KV head: row j * heads_per_kv + h is head h of query token j. No tensor has more than four
//! dimensions, no shape depends on data, and every operator is an elementwise one, a `MatMul`, a reduction over one
//! axis, or moves data: what ahead-of-time compilers for fixed shapes take.

use crate::error::{MlaError, Result};
use crate::problem::{Mask, Problem};
use crate::tensor::DType;

use super::proto::{Attribute, Constant, Elem, Model, Node, OPSET, Value};

/// In which type the two matrix products are computed. Softmax and lse are f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// Queries and keys are widened first: as exact as f32 sums are.
    #[default]
    F32,
    /// In the inputs' own type, for matrix units that have no f32: see `docs/onnx.md` for what that costs.
    F16,
}

struct Graph {
    constants: Vec<Constant>,
    nodes: Vec<Node>,
}

impl Graph {
    fn constant(&mut self, name: &str, elem: Elem, shape: &[usize], bytes: Vec<u8>) -> String {
        let value = Value { name: name.into(), elem, shape: shape.to_vec() };
        self.constants.push(Constant { value, bytes });
        name.into()
    }

    fn i32s(&mut self, name: &str, shape: &[usize], values: impl IntoIterator<Item = i32>) -> String {
        let bytes = values.into_iter().flat_map(i32::to_le_bytes).collect();
        self.constant(name, Elem::I32, shape, bytes)
    }

    fn f32(&mut self, name: &str, value: f32) -> String {
        self.constant(name, Elem::F32, &[1], value.to_le_bytes().to_vec())
    }

    fn i64s(&mut self, name: &str, values: &[i64]) -> String {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.constant(name, Elem::I64, &[values.len()], bytes)
    }

    fn with(
        &mut self,
        output: &str,
        op: &'static str,
        inputs: &[&str],
        attributes: Vec<(&'static str, Attribute)>,
    ) -> String {
        let inputs = inputs.iter().map(ToString::to_string).collect();
        self.nodes.push(Node { op, inputs, output: output.into(), attributes });
        output.into()
    }

    fn node(&mut self, output: &str, op: &'static str, inputs: &[&str]) -> String {
        self.with(output, op, inputs, Vec::new())
    }

    fn reshape(&mut self, output: &str, input: &str, shape: &[usize]) -> String {
        let dims: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
        let shape = self.i64s(&format!("{output}_shape"), &dims);
        self.node(output, "Reshape", &[input, &shape])
    }

    fn transpose(&mut self, output: &str, input: &str, perm: [i64; 4]) -> String {
        self.with(output, "Transpose", &[input], vec![("perm", Attribute::Ints(perm.to_vec()))])
    }

    fn cast(&mut self, output: &str, input: &str, to: Elem) -> String {
        self.with(output, "Cast", &[input], vec![("to", Attribute::Int(to as i64))])
    }

    fn max(&mut self, output: &str, input: &str, axis: i64) -> String {
        let attributes = vec![("axes", Attribute::Ints(vec![axis])), ("keepdims", Attribute::Int(1))];
        self.with(output, "ReduceMax", &[input], attributes)
    }
}

/// The sizes of a class, as the graph names them.
struct Sizes {
    b: usize,
    s_q: usize,
    h_kv: usize,
    /// Heads of a KV head.
    group: usize,
    d_k: usize,
    d_v: usize,
    pages: usize,
    /// max_pages_per_seq.
    columns: usize,
    /// Tokens that a request may have.
    tokens: usize,
    /// Query rows of a KV head.
    rows: usize,
}

impl Sizes {
    fn of(p: &Problem) -> Result<Sizes> {
        for (param, size) in [("b", p.b()), ("num_pages", p.num_pages()), ("max_pages_per_seq", p.max_pages_per_seq())]
        {
            // An empty tensor has no static shape that compilers take.
            if size == 0 {
                return Err(MlaError::ZeroSize { param });
            }
        }
        let limit = i32::MAX as u64 - 1;
        let tokens = p.max_tokens_per_seq();
        if tokens > limit {
            return Err(MlaError::Overflow { param: "tokens a request", value: tokens.to_string(), limit });
        }
        Ok(Sizes {
            b: p.b(),
            s_q: p.s_q(),
            h_kv: p.h_kv(),
            group: p.heads_per_kv(),
            d_k: p.head_dim_k(),
            d_v: p.head_dim_v(),
            pages: p.num_pages(),
            columns: p.max_pages_per_seq(),
            tokens: tokens as usize,
            rows: p.s_q() * p.heads_per_kv(),
        })
    }
}

/// What follows from the integer inputs.
struct Lengths {
    /// [b, columns]: page numbers that may be read.
    page: String,
    /// [b, tokens, 1, 1]: tokens that some row sees.
    live: String,
    /// [b, 1, rows or 1, 1]: the keys each row sees.
    ends: String,
    /// [b, 1, 1, 1]: whether the request's table and lengths are as they must be.
    valid: String,
}

fn lengths(g: &mut Graph, p: &Problem, z: &Sizes) -> Lengths {
    let minus_one = g.i32s("minus_one", &[1], [-1]);
    let zero = g.i32s("zero", &[1], [0]);
    let one = g.i32s("one", &[1], [1]);
    let length = g.reshape("length", "cache_seqlens", &[z.b, 1]);
    // Length and table of each request.
    let not_negative = g.node("length_not_negative", "Less", &[&minus_one, &length]);
    let too_long = g.i32s("tokens_plus_one", &[1], [z.tokens as i32 + 1]);
    let inside = g.node("length_inside_table", "Less", &[&length, &too_long]);
    let mut valid = g.node("length_valid", "And", &[&not_negative, &inside]);
    // What follows adds to it and compares with it: a length that is not valid must not overflow on the way to NaN.
    let length = g.node("length_or_zero", "Where", &[&valid, &length, &zero]);
    let page_size = p.page_size();
    let starts = g.i32s("page_starts", &[1, z.columns], (0..z.columns).map(|c| (c * page_size) as i32));
    let used = g.node("entry_used", "Less", &[&starts, &length]);
    let pages = g.i32s("num_pages", &[1], [z.pages as i32]);
    let lower = g.node("entry_not_negative", "Less", &[&minus_one, "block_table"]);
    let upper = g.node("entry_below_num_pages", "Less", &["block_table", &pages]);
    let in_range = g.node("entry_in_range", "And", &[&lower, &upper]);
    let readable = g.node("entry_readable", "And", &[&used, &in_range]);
    let page = g.node("page", "Where", &[&readable, "block_table", &zero]);
    let out_of_range = g.node("entry_out_of_range", "Where", &[&in_range, &zero, &one]);
    let wrong = g.node("entry_wrong", "Where", &[&used, &out_of_range, &zero]);
    let any_wrong = g.max("any_entry_wrong", &wrong, 1);
    let table_valid = g.node("table_valid", "Less", &[&any_wrong, &one]);
    valid = g.node("request_valid", "And", &[&valid, &table_valid]);
    // How many keys each row sees.
    let (by_row, longest) = match p.mask() {
        Mask::VisibleLengths => {
            let lower = g.node("visible_not_negative", "Less", &[&minus_one, "visible_lengths"]);
            let upper = g.node("visible_beyond_length", "Less", &[&length, "visible_lengths"]);
            let beyond = g.node("visible_beyond", "Where", &[&upper, &one, &zero]);
            let wrong = g.node("visible_wrong", "Where", &[&lower, &beyond, &one]);
            let any = g.max("any_visible_wrong", &wrong, 1);
            let right = g.node("visible_valid", "Less", &[&any, &one]);
            valid = g.node("call_valid", "And", &[&valid, &right]);
            ("visible_lengths".to_string(), g.max("longest", "visible_lengths", 1))
        }
        Mask::Causal if z.s_q > 1 => {
            let behind = g.i32s("causal_offset", &[1, z.s_q], (0..z.s_q).map(|j| j as i32 + 1 - z.s_q as i32));
            (g.node("causal_end", "Add", &[&length, &behind]), length)
        }
        _ => (length.clone(), length),
    };
    let token = g.i32s("token", &[1, z.tokens], 0..z.tokens as i32);
    let live = g.node("token_live", "Less", &[&token, &longest]);
    let live = g.reshape("live", &live, &[z.b, z.tokens, 1, 1]);
    let ends = if by_row == "length_or_zero" {
        g.reshape("end", &by_row, &[z.b, 1, 1, 1])
    } else {
        // One entry a query token; every head of it has the same.
        let row = g.i32s("query_token_of_row", &[z.rows], (0..z.rows).map(|r| (r / z.group) as i32));
        let all = g.with("end_of_row", "Gather", &[&by_row, &row], vec![("axis", Attribute::Int(1))]);
        g.reshape("end", &all, &[z.b, 1, z.rows, 1])
    };
    let valid = g.reshape("valid", &valid, &[z.b, 1, 1, 1]);
    Lengths { page, live, ends, valid }
}

/// Swaps KV heads and query tokens: [b, x, y, group * width] from `input`.
fn regroup(g: &mut Graph, name: &str, input: &str, shape: [usize; 4]) -> String {
    let apart = g.reshape(&format!("{name}_apart"), input, &shape);
    g.transpose(&format!("{name}_regrouped"), &apart, [0, 2, 1, 3])
}

/// The graph of a class of problems: those that differ in tensor contents alone.
///
/// Inputs, fused and without gaps: `q`, `k_cache`, `block_table`, `cache_seqlens`, and `visible_lengths` with that
/// mask; outputs `out` and `lse`; shapes as the contract has them.
///
/// # Errors
/// [`MlaError::DTypeMismatch`] for bf16, which is converted first (see [`super::to_f16`]), and for f16 products of f32;
/// [`MlaError::ZeroSize`] for a class without requests or pages; [`MlaError::Overflow`].
pub fn graph(p: &Problem, products: Products) -> Result<Model> {
    let elem = match (p.dtype(), products) {
        (DType::F16, _) => Elem::F16,
        (DType::F32, Products::F32) => Elem::F32,
        (value, _) => return Err(MlaError::DTypeMismatch { param: "dtype", value, limit: DType::F16 }),
    };
    let z = &Sizes::of(p)?;
    let narrow = products == Products::F16;
    let g = &mut Graph { constants: Vec::new(), nodes: Vec::new() };
    let Lengths { page, live, ends, valid } = lengths(g, p, z);
    let (zero, one) = (g.f32("f32_zero", 0.0), g.f32("f32_one", 1.0));

    // Keys: whole pages, a row of elements each.
    let flat = g.reshape("k_pages", "k_cache", &[z.pages, p.page_size() * z.h_kv * z.d_k]);
    let gathered = g.with("k_gathered", "Gather", &[&flat, &page], vec![("axis", Attribute::Int(0))]);
    let mut k = g.reshape("k_tokens", &gathered, &[z.b, z.tokens, z.h_kv, z.d_k]);
    let nothing = if narrow { g.constant("f16_zero", Elem::F16, &[1], vec![0, 0]) } else { zero.clone() };
    if elem == Elem::F16 && !narrow {
        k = g.cast("k_f32", &k, Elem::F32);
    }
    let k = g.node("k", "Where", &[&live, &k, &nothing]);
    let k_t = g.transpose("k_transposed", &k, [0, 2, 3, 1]);
    let mut v = g.transpose("v_heads", &k, [0, 2, 1, 3]);
    if z.d_v < z.d_k {
        let (begin, end) = (g.i64s("v_begin", &[0]), g.i64s("v_end", &[z.d_v as i64]));
        let axis = g.i64s("v_axis", &[3]);
        v = g.node("v", "Slice", &[&v, &begin, &end, &axis]);
    }

    // Queries: [b, h_kv, rows, d_k].
    let mut q = "q".to_string();
    if elem == Elem::F16 && !narrow {
        q = g.cast("q_f32", &q, Elem::F32);
    }
    if z.s_q > 1 && z.h_kv > 1 {
        q = regroup(g, "q", &q, [z.b, z.s_q, z.h_kv, z.group * z.d_k]);
    }
    let q = g.reshape("q_rows", &q, &[z.b, z.h_kv, z.rows, z.d_k]);

    // Scores, not scaled: the maximum is subtracted first, so that no rounding of a product is left between the two.
    let mut scores = g.node("scores", "MatMul", &[&q, &k_t]);
    if narrow {
        scores = g.cast("scores_f32", &scores, Elem::F32);
    }
    let token = g.i32s("key", &[1, 1, 1, z.tokens], 0..z.tokens as i32);
    let visible = g.node("visible", "Less", &[&token, &ends]);
    let lowest = g.f32("lowest", f32::MIN);
    let scale = g.f32("softmax_scale", p.softmax_scale());
    let masked = g.node("scores_visible", "Where", &[&visible, &scores, &lowest]);
    let max = g.max("max", &masked, 3);
    let below = g.node("below_max", "Sub", &[&masked, &max]);
    let scaled = g.node("scaled", "Mul", &[&below, &scale]);
    let exp = g.node("exp", "Exp", &[&scaled]);
    let mut weights = g.node("weights", "Where", &[&visible, &exp, &zero]);
    let axis = g.i64s("key_axis", &[3]);
    let sum = g.with("sum", "ReduceSum", &[&weights, &axis], vec![("keepdims", Attribute::Int(1))]);
    let no_key = g.i32s("no_key", &[1], [0]);
    let some = g.node("sees_some", "Less", &[&no_key, &ends]);
    let divisor = g.node("divisor", "Where", &[&some, &sum, &one]);

    // out: divided before the product where that is f16, whose range a sum of weights could leave.
    let mut out = if narrow {
        weights = g.node("weights_divided", "Div", &[&weights, &divisor]);
        weights = g.cast("weights_f16", &weights, Elem::F16);
        let out = g.node("out_f16", "MatMul", &[&weights, &v]);
        g.cast("out_f32", &out, Elem::F32)
    } else {
        let out = g.node("out_sum", "MatMul", &[&weights, &v]);
        g.node("out_divided", "Div", &[&out, &divisor])
    };
    let nan = g.f32("nan", f32::NAN);
    out = g.node("out_or_zero", "Where", &[&some, &out, &zero]);
    out = g.node("out_or_nan", "Where", &[&valid, &out, &nan]);
    if z.s_q > 1 && z.h_kv > 1 {
        out = regroup(g, "out", &out, [z.b, z.h_kv, z.s_q, z.group * z.d_v]);
    }
    let shape = [z.b, z.s_q, z.h_kv * z.group, z.d_v];
    if elem == Elem::F16 {
        out = g.reshape("out_rows", &out, &shape);
        g.cast("out", &out, elem);
    } else {
        g.reshape("out", &out, &shape);
    }

    // lse: [b, h_kv, rows, 1] to [b, h_q, s_q].
    let top = g.node("max_scaled", "Mul", &[&max, &scale]);
    let log = g.node("log_sum", "Log", &[&divisor]);
    let lse = g.node("lse_seen", "Add", &[&top, &log]);
    let infinity = g.f32("infinity", f32::INFINITY);
    let lse = g.node("lse_or_infinity", "Where", &[&some, &lse, &infinity]);
    let mut lse = g.node("lse_or_nan", "Where", &[&valid, &lse, &nan]);
    if z.s_q > 1 {
        let apart = g.reshape("lse_apart", &lse, &[z.b, z.h_kv, z.s_q, z.group]);
        lse = g.transpose("lse_heads", &apart, [0, 1, 3, 2]);
    }
    g.reshape("lse", &lse, &[z.b, z.h_kv * z.group, z.s_q]);

    let value = |name: &str, elem, shape: &[usize]| Value { name: name.into(), elem, shape: shape.to_vec() };
    let mut inputs = vec![
        value("q", elem, &[z.b, z.s_q, p.h_q(), z.d_k]),
        value("k_cache", elem, &[z.pages, p.page_size(), z.h_kv, z.d_k]),
        value("block_table", Elem::I32, &[z.b, z.columns]),
        value("cache_seqlens", Elem::I32, &[z.b]),
    ];
    if p.mask() == Mask::VisibleLengths {
        inputs.push(value("visible_lengths", Elem::I32, &[z.b, z.s_q]));
    }
    let outputs = vec![value("out", elem, &shape), value("lse", Elem::F32, &[z.b, p.h_q(), z.s_q])];
    let metadata = vec![
        ("kind", "dense_decode".to_string()),
        ("head_dim_v", z.d_v.to_string()),
        ("softmax_scale", p.softmax_scale().to_string()),
        ("causal", (p.mask() == Mask::Causal).to_string()),
        ("products", if narrow { "f16" } else { "f32" }.to_string()),
    ];
    let doc = format!("MLA decode over a paged KV cache, opset {OPSET}: {p}");
    let Graph { constants, nodes } = std::mem::replace(g, Graph { constants: Vec::new(), nodes: Vec::new() });
    Ok(Model { doc, metadata, inputs, outputs, constants, nodes })
}
