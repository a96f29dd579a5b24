//! bf16 by matrices of f16: numbers that f16 does not have.

use polymla::conformance::{Call, Expected, HostTensor, Layout, POLICIES, Tolerance, check};
use polymla::half::bf16;
use polymla::{DType, Problem};

const ROPE: usize = 64;

/// What queries and keys are: functions of (token or row, column, a number of -1 to 1).
struct Case {
    what: &'static str,
    /// 2 to this is `softmax_scale`.
    scale: i32,
    q: fn(usize, usize, f32) -> f32,
    k: fn(usize, usize, f32) -> f32,
}

fn two(n: i32) -> f32 {
    2f32.powi(n)
}

const CASES: [Case; 13] = [
    Case { what: "as usual", scale: -3, q: |_, _, x| x, k: |_, _, x| x },
    Case { what: "small keys, large queries", scale: -3, q: |_, _, x| x * two(40), k: |_, _, x| x * two(-40) },
    Case { what: "large keys, small queries", scale: -3, q: |_, _, x| x * two(-60), k: |_, _, x| x * two(60) },
    // Not smaller: below 2^-126 WGSL lets a device take numbers for 0, and the H200 does.
    Case { what: "keys near 2^-110", scale: 20, q: |_, _, x| x * two(87), k: |_, _, x| x * two(-110) },
    Case { what: "just within", scale: -3, q: |_, _, x| x * two(-15), k: |_, _, x| x * two(15) },
    Case { what: "just beyond", scale: -3, q: |_, _, x| x * two(-17), k: |_, _, x| x * two(17) },
    Case {
        what: "one number beyond, in the last token",
        scale: -3,
        q: |_, c, x| if c == 191 { 0.0 } else { x },
        k: |t, c, x| if (t, c) == (129, 191) { two(100) } else { x },
    },
    Case {
        what: "a column that is large in queries and tiny in keys",
        scale: -3,
        q: |_, c, x| if c == 150 { x * two(34) } else { x },
        k: |_, c, x| if c == 150 { x * two(-30) } else { x },
    },
    Case {
        what: "a column that is tiny in queries and large in keys",
        scale: -3,
        q: |_, c, x| if c == 150 { x * two(-9) } else { x * two(8) },
        k: |_, c, x| if c == 150 { x * two(14) } else { x * two(-8) },
    },
    Case {
        what: "tiny values beside rope as usual",
        scale: -3,
        q: |_, _, x| x,
        k: |_, c, x| if c < 128 { x * two(-28) } else { x },
    },
    // Only the first token keeps the split from being given up, and its weight is 0: the others are subnormal in f16.
    Case {
        what: "values that f16 has as subnormal numbers",
        scale: -3,
        q: |_, c, x| if c < 128 { x } else { 1.0 },
        k: |t, c, x| match (t % 130, c) {
            (0, 128..) => -40.0,
            (0, _) => two(-9),
            (_, 128..) => x,
            _ => x * two(-15),
        },
    },
    Case { what: "nothing but zeros", scale: -3, q: |_, _, x| x, k: |_, _, _| 0.0 },
    Case {
        what: "the second request's values are tiny",
        scale: -3,
        q: |_, _, x| x,
        k: |t, _, x| if t >= 130 { x * two(-30) } else { x },
    },
];

fn numbers(name: &'static str, shape: [usize; 4], f: fn(usize, usize, f32) -> f32) -> HostTensor {
    let h_kv = shape[2];
    let mut state = 4321u32;
    let columns = shape[3];
    let rows = shape[0] * shape[1] * shape[2];
    let mut bytes = Vec::new();
    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let x = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
        bytes.extend(bf16::from_f32(f(row / h_kv, column, x)).to_ne_bytes());
    }
    HostTensor::from_bytes(name, DType::Bf16, &shape, &bytes).unwrap()
}

/// A page a request: token t of request i is row 130 i + t of the cache, of two KV heads.
fn call(case: &Case) -> Call {
    call_of(case, 2, 130, &[0, 1], [130, 129])
}

/// Two requests of 18 heads for each KV head.
fn call_of(case: &Case, h_kv: usize, page_size: usize, table: &[i32], lengths: [i32; 2]) -> Call {
    let (b, heads, pages) = (2, 18 * h_kv, table.len());
    let builder = Problem::builder(b).h_q(heads).h_kv(h_kv).head_dim_k(128 + ROPE).head_dim_v(128).dtype(DType::Bf16);
    let builder = builder.num_pages(pages).page_size(page_size).max_pages_per_seq(pages / b);
    let problem = builder.softmax_scale(two(case.scale)).build().unwrap();
    let tensors = vec![
        ("q", numbers("q", [b, 1, heads, 128 + ROPE], case.q)),
        ("k_cache", numbers("k_cache", [pages, page_size, h_kv, 128 + ROPE], case.k)),
        ("block_table", HostTensor::from_i32("block_table", &[b, pages / b], table).unwrap()),
        ("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[b], &lengths).unwrap()),
    ];
    let name = case.what.into();
    let tolerance = Tolerance { out_abs: 0.0, out_rel: 0.0, cosine: 1e-5, lse_abs: 2e-4, lse_rel: 1e-5 };
    let mut call = Call { name, problem, tensors, output_strides: None, expected: None, tolerance };
    let (out, lse) = polymla::reference::decode(&call.problem, &call.inputs().unwrap()).unwrap();
    // Of each row, 2^-7 of its largest: averages of 130 numbers of either sign are small beside the numbers.
    let row_abs = |row: &[f64]| vec![two(-7) as f64 * row.iter().fold(0.0, |m: f64, x| m.max(x.abs())); row.len()];
    let out_abs = out.chunks_exact(128).flat_map(row_abs).collect();
    call.expected = Some(Expected { out, lse, out_abs, ..Expected::default() });
    call
}

/// Each case by every matrix path of the device, emulated ones too.
#[test]
fn bf16_of_any_size_is_right() {
    let taken = super::by_paths(super::matrix_paths(), |path, backend| {
        for (case, policy) in CASES.iter().zip(POLICIES.iter().cycle()) {
            let call = call(case);
            assert!(backend.path(&call.problem).is_matrix(), "{} is to go by matrices", call.name);
            let outcome = check(backend, &call, Layout::Given, *policy);
            assert!(outcome.passed(), "{}, {}, {policy:?}: {}", path.name(), call.name, outcome.failure());
        }
    });
    assert_ne!(taken, Some(0), "no device with matrices, not even emulated ones");
}

/// Numbers that f16 has, by the kernels for any problem and for the usual one. `mutants.rs` runs this without the kernel that
/// does what matrices leave: none of it may be left.
#[test]
fn ordinary_bf16_is_right() {
    let taken = super::by_paths(super::matrix_paths(), |path, backend| {
        for policy in POLICIES {
            for call in [call(&CASES[0]), call_of(&CASES[0], 1, 64, &[4, 2, 0, 3, 1, 5], [190, 97])] {
                let outcome = check(backend, &call, Layout::Given, policy);
                assert!(outcome.passed(), "{}, {policy:?}: {}", path.name(), outcome.failure());
            }
        }
    });
    assert_ne!(taken, Some(0), "no device with matrices, not even emulated ones");
}
