//! Criterion benches of the CPU backend: the shapes of `benches/peers/cpu.sh`, on every instruction set of this CPU.
//!
//! `cargo bench --bench cpu`; one shape: `cargo bench --bench cpu -- h16`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use polymla::cpu::{CpuBackend, Isa};
use polymla::{
    HostWorkspace, Inputs, KvCache, MlaBackend, Outputs, Problem, Query, ScheduleOptions, TensorView, TensorViewMut,
};

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for (b, h_q, s_k) in [(4, 16, 4096), (4, 128, 4096), (1, 16, 16384), (1, 128, 8192)] {
        let columns = s_k / 64;
        let pages = b * columns;
        let problem = Problem::builder(b).h_q(h_q).num_pages(pages).max_pages_per_seq(columns).build().unwrap();
        let value = |i: usize| bf16::from_f32((i * 7919 % 1021) as f32 / 1021.0 - 0.5);
        let q: Vec<bf16> = (0..b * h_q * 576).map(value).collect();
        let k: Vec<bf16> = (0..pages * 64 * 576).map(value).collect();
        // 7919 is a prime that divides no page count here, so this is a permutation.
        let table: Vec<i32> = (0..pages).map(|i| (i * 7919 % pages) as i32).collect();
        let lengths = vec![s_k as i32; b];
        let mut out = vec![bf16::ZERO; b * h_q * 512];
        let mut lse = vec![0f32; b * h_q];
        let inputs = Inputs {
            query: Query::Fused(TensorView::from_slice("q", &q, &[b, 1, h_q, 576]).unwrap()),
            kv_cache: KvCache::Fused(TensorView::from_slice("k_cache", &k, &[pages, 64, 1, 576]).unwrap()),
            block_table: TensorView::from_slice("block_table", &table, &[b, columns]).unwrap(),
            cache_seqlens: TensorView::from_slice("cache_seqlens", &lengths, &[b]).unwrap(),
            visible_lengths: None,
        };
        let mut outputs = Outputs {
            out: TensorViewMut::from_slice("out", &mut out, &[b, 1, h_q, 512]).unwrap(),
            lse: TensorViewMut::from_slice("lse", &mut lse, &[b, h_q, 1]).unwrap(),
        };
        group.throughput(Throughput::Elements(problem.flop(&lengths) as u64));
        for isa in Isa::available() {
            let backend = CpuBackend::with_isa(isa).unwrap();
            let schedule = backend.schedule(&problem, &ScheduleOptions::default(), &inputs, ()).unwrap();
            let mut memory = HostWorkspace::new();
            let mut workspace = memory.lend(backend.workspace_bytes(&problem, &schedule));
            group.bench_function(format!("b{b}_h{h_q}_k{s_k}/{isa}"), |bench| {
                bench.iter(|| {
                    let run = backend.run(&problem, &schedule, &mut workspace, &inputs, black_box(&mut outputs), ());
                    run.unwrap();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
