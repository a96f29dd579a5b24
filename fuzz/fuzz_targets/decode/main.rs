//! Any problem, tables, lengths, strides, masks and schedule on the CPU backend, valid or not.
//!
//! Every buffer has exactly the size its tensor needs (or less), so that AddressSanitizer sees one byte too many. A call
//! that is refused must leave its outputs as they were; one that is accepted must agree with the f64 reference.
#![no_main]

use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use polymla::cpu::{CpuBackend, Isa};
use polymla::{
    DType, HostWorkspace, Inputs, MlaBackend, MlaError, Outputs, Problem, ScheduleOptions, SplitPolicy, TensorView,
    get_mla_metadata, reference,
};

mod case;
mod tensor;

use case::{Case, Data, data, problem};
use tensor::Tensor;

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
    // Values are within 2, so scores are within 4 head_dim_k scale. f32 sums of products are off by so much of that at
    // most; the random suite holds backends to what rounding explains, here only wrong results must show. Where scores
    // are so large that this says nothing about `out`, it still has to be a mean of the values.
    let reach = 4.0 * p.head_dim_k() as f64 * f64::from(p.softmax_scale());
    let score_error = 1e-5 * reach;
    let allowed = 4.0 * (score_error.exp() - 1.0) + if p.dtype() == DType::F32 { 1e-4 } else { 0.06 };
    for i in 0..p.b() {
        for j in 0..p.s_q() {
            for h in 0..p.h_q() {
                let x = lse.get_f64(&[i, h, j]).unwrap();
                let y = ref_lse[(i * p.h_q() + h) * p.s_q() + j];
                let off = 1e-4 + 1e-4 * y.abs() + score_error;
                // Beyond f32's largest number its infinity is the right answer.
                let overflows = x.is_infinite() && x.signum() == y.signum() && y.abs() + off > f64::from(f32::MAX);
                assert!(x == y || (x - y).abs() <= off || overflows, "lse {x}, not {y}");
                for d in 0..p.head_dim_v() {
                    let x = out.get_f64(&[i, j, h, d]).unwrap();
                    let y = ref_out[((i * p.s_q() + j) * p.h_q() + h) * p.head_dim_v() + d];
                    assert!((x - y).abs() <= allowed && x.abs() <= 2.02, "out [{i}, {j}, {h}, {d}] {x}, not {y}");
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
