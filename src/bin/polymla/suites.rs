//! Named lists of shapes, and the recorded figures of peers.

use polymla::{DType, Problem};
use serde::Deserialize;

/// One line of a suite: bf16, DeepSeek's dimensions, page 64.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    pub b: usize,
    pub s_q: usize,
    pub h_q: usize,
    /// Tokens a request; the mean where `varlen`.
    pub s_k: usize,
    pub varlen: bool,
    pub dtype: DType,
    pub page_size: usize,
    pub head_dim_k: usize,
    pub head_dim_v: usize,
    pub h_kv: usize,
}

impl Shape {
    pub fn new(b: usize, s_q: usize, h_q: usize, s_k: usize) -> Self {
        Shape {
            b,
            s_q,
            h_q,
            s_k,
            varlen: false,
            dtype: DType::Bf16,
            page_size: 64,
            head_dim_k: 576,
            head_dim_v: 512,
            h_kv: 1,
        }
    }

    /// The problem for requests of these lengths, pages enough for all of them.
    pub fn problem(&self, cache_seqlens: &[i32]) -> polymla::Result<Problem> {
        let pages = |len: &i32| (*len as usize).div_ceil(self.page_size);
        Problem::builder(self.b)
            .s_q(self.s_q)
            .h_q(self.h_q)
            .h_kv(self.h_kv)
            .head_dim_k(self.head_dim_k)
            .head_dim_v(self.head_dim_v)
            .dtype(self.dtype)
            .page_size(self.page_size)
            .num_pages(cache_seqlens.iter().map(pages).sum())
            .max_pages_per_seq(cache_seqlens.iter().map(pages).max().unwrap_or(0))
            .build()
    }

    /// `8192` or `8192 varlen`.
    pub fn length(&self) -> String {
        format!("{}{}", self.s_k, if self.varlen { " varlen" } else { "" })
    }
}

/// What a device can do at most: the two terms of the floor.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct Ceilings {
    #[serde(rename = "read_GBps")]
    pub read_gbps: f64,
    #[serde(rename = "bf16_matmul_TFLOPS")]
    pub tflops: f64,
}

impl Ceilings {
    /// The shortest time a step can take, in microseconds.
    pub fn floor_us(&self, flop: f64, bytes: f64) -> f64 {
        (bytes / (self.read_gbps * 1e3)).max(flop / (self.tflops * 1e6))
    }
}

/// Names of the peers in the recorded file.
pub const PEERS: [&str; 4] = ["flashmla", "flashinfer-fa3", "fa3-qv", "flashinfer-fa2"];

#[derive(Debug, Clone, Deserialize)]
struct Row {
    b: usize,
    s_q: usize,
    h_q: usize,
    s_k: usize,
    varlen: bool,
    best_us: f64,
    best: String,
    #[serde(flatten)]
    peers: std::collections::HashMap<String, serde_json::Value>,
}

/// Figures of other implementations, measured on one device by one protocol.
#[derive(Debug, Clone, Deserialize)]
pub struct Recorded {
    pub device: String,
    pub date: String,
    pub ceilings: Ceilings,
    rows: Vec<Row>,
}

/// The best recorded peer of a shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Best {
    pub name: String,
    pub us: f64,
}

impl Recorded {
    /// The figures of `benches/peers/h200_dense_decode.json`.
    pub fn h200() -> serde_json::Result<Self> {
        serde_json::from_str(include_str!("../../../benches/peers/h200_dense_decode.json"))
    }

    /// The shapes, in order.
    pub fn shapes(&self) -> Vec<Shape> {
        self.rows.iter().map(|r| Shape { varlen: r.varlen, ..Shape::new(r.b, r.s_q, r.h_q, r.s_k) }).collect()
    }

    fn row(&self, shape: &Shape) -> Option<&Row> {
        let same = |r: &&Row| Shape { varlen: r.varlen, ..Shape::new(r.b, r.s_q, r.h_q, r.s_k) } == *shape;
        self.rows.iter().find(same)
    }

    /// The fastest peer on this shape.
    pub fn best(&self, shape: &Shape) -> Option<Best> {
        self.row(shape).map(|r| Best { name: r.best.clone(), us: r.best_us })
    }

    /// One peer's microseconds on this shape.
    pub fn peer_us(&self, shape: &Shape, peer: &str) -> Option<f64> {
        self.row(shape)?.peers.get(peer)?.as_f64()
    }
}

/// The suites by name.
pub fn suite(name: &str) -> Result<Vec<Shape>, Box<dyn std::error::Error>> {
    match name {
        "h200" => Ok(Recorded::h200()?.shapes()),
        "cpu" => Ok(vec![
            Shape::new(4, 1, 16, 4096),
            Shape::new(4, 1, 128, 4096),
            Shape::new(1, 1, 16, 16384),
            Shape::new(1, 1, 128, 8192),
        ]),
        "quick" => Ok(vec![Shape::new(1, 1, 16, 2048), Shape::new(2, 2, 128, 1024)]),
        other => Err(format!("suite is {other:?}; it must be one of cpu, h200, quick").into()),
    }
}
