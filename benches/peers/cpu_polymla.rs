//! polymla's side of `benches/peers/cpu.sh`: reads lines `b h_q s_k calls` and answers each with the milliseconds of
//! every call, in one line. bf16, page 64, shuffled pages, head_dim 576/512, s_q 1, schedule and workspace made before.

use std::io::{BufRead, Write};
use std::time::Instant;

use half::bf16;
use polymla::cpu::CpuBackend;
use polymla::{
    HostWorkspace, Inputs, KvCache, MlaBackend, Outputs, Problem, Query, ScheduleOptions, TensorView, TensorViewMut,
};

struct Data {
    shape: [usize; 3],
    problem: Problem,
    q: Vec<bf16>,
    k: Vec<bf16>,
    table: Vec<i32>,
    lengths: Vec<i32>,
    out: Vec<bf16>,
    lse: Vec<f32>,
    memory: HostWorkspace,
}

impl Data {
    fn new(shape: [usize; 3]) -> polymla::Result<Data> {
        let [b, h_q, s_k] = shape;
        let columns = s_k.div_ceil(64);
        let pages = b * columns;
        let problem = Problem::builder(b).h_q(h_q).num_pages(pages).max_pages_per_seq(columns).build()?;
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state >> 33
        };
        let mut values = |n| (0..n).map(|_| bf16::from_f32(random() as f32 / 2f32.powi(31) - 0.5)).collect::<Vec<_>>();
        let (q, k) = (values(b * h_q * 576), values(pages * 64 * 576));
        let mut table: Vec<i32> = (0..pages as i32).collect();
        for i in (1..pages).rev() {
            table.swap(i, random() as usize % (i + 1));
        }
        let (out, lse) = (vec![bf16::ZERO; b * h_q * 512], vec![0.0; b * h_q]);
        Ok(Data { shape, problem, q, k, table, lengths: vec![s_k as i32; b], out, lse, memory: HostWorkspace::new() })
    }

    fn time(&mut self, backend: &CpuBackend, calls: usize) -> polymla::Result<Vec<f64>> {
        let p = &self.problem;
        let inputs = Inputs {
            query: Query::Fused(TensorView::from_slice("q", &self.q, &[p.b(), 1, p.h_q(), 576])?),
            kv_cache: KvCache::Fused(TensorView::from_slice("k_cache", &self.k, &[p.num_pages(), 64, 1, 576])?),
            block_table: TensorView::from_slice("block_table", &self.table, &[p.b(), p.max_pages_per_seq()])?,
            cache_seqlens: TensorView::from_slice("cache_seqlens", &self.lengths, &[p.b()])?,
            visible_lengths: None,
        };
        let mut outputs = Outputs {
            out: TensorViewMut::from_slice("out", &mut self.out, &[p.b(), 1, p.h_q(), 512])?,
            lse: TensorViewMut::from_slice("lse", &mut self.lse, &[p.b(), p.h_q(), 1])?,
        };
        let schedule = backend.schedule(p, &ScheduleOptions::default(), &inputs, ())?;
        let mut workspace = self.memory.lend(backend.workspace_bytes(p, &schedule));
        (0..calls)
            .map(|_| {
                let start = Instant::now();
                backend.run(p, &schedule, &mut workspace, &inputs, &mut outputs, ())?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            })
            .collect()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let backend = CpuBackend::new()?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", polymla::MlaBackend::info(&backend).device_name)?;
    out.flush()?;
    let mut data: Option<Data> = None;
    for line in std::io::stdin().lock().lines() {
        let numbers: Vec<usize> = line?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let &[b, h_q, s_k, calls] = numbers.as_slice() else {
            return Err("expected: b h_q s_k calls".into());
        };
        if data.as_ref().is_none_or(|data| data.shape != [b, h_q, s_k]) {
            data = Some(Data::new([b, h_q, s_k])?);
        }
        let times = data.as_mut().ok_or("no data")?.time(&backend, calls)?;
        writeln!(out, "{}", times.iter().map(f64::to_string).collect::<Vec<_>>().join(" "))?;
        out.flush()?;
    }
    Ok(())
}
