//! The merge kernel alone, over partial results that are written here as backends/portable/pieces.h says.

use crate::host::{DecodeParams, STATUS_OK};
use crate::library::{Kernels, by_name};

const ROWS: usize = 11;
const COLUMNS: usize = 512;

/// A number from -1 to 1 for each place.
fn value(split: usize, row: usize, col: usize) -> f32 {
    let mixed = (split * 7919 + row * 104_729 + col * 1_299_709).wrapping_mul(2_654_435_761) >> 7;
    (mixed % 200_003) as f32 / 100_001.0 - 1.0
}
/// The base-2 logarithm of a split's sum; some splits have seen no key.
fn lse(split: usize, row: usize) -> f32 {
    if (split + row) % 13 == 5 { f32::NEG_INFINITY } else { value(split, row, 600) * 4.0 }
}

/// Bytes of one slot.
fn slot(split: usize) -> Vec<u8> {
    let groups = ROWS.div_ceil(8);
    let mut bytes = vec![0xff; groups * 16 * 768];
    for row in 0..ROWS {
        for col in 0..COLUMNS {
            let bits = if lse(split, row) == f32::NEG_INFINITY { 0 } else { value(split, row, col).to_bits() };
            let piece = &mut bytes[(row / 8 * 16 + col / 32) * 768..][..768];
            // The lane has columns 2 t and 2 t + 1 of each of four blocks of eight.
            let (block, t, odd) = (col % 32 / 8, col % 8 / 2, col % 2);
            let lane = row % 8 * 4 + t;
            piece[lane * 16 + block * 4 + odd * 2..][..2].copy_from_slice(&((bits >> 16) as u16).to_le_bytes());
            piece[512 + lane * 8 + block * 2 + odd] = (bits >> 8) as u8;
        }
    }
    bytes
}

/// What the merge kernel makes of `n` splits, of which `slots` had somewhere to go: out in f16, and lse.
fn merge(kernels: &Kernels, n: usize, slots: usize, ways: i32, units: i32) -> (Vec<u16>, [f32; ROWS]) {
    let pieces: Vec<u8> = (0..slots).flat_map(slot).collect();
    let sums: Vec<f32> = (0..slots).flat_map(|split| (0..ROWS).map(move |row| lse(split, row))).collect();
    let num_splits = [0, n as i32];
    // What no row can be.
    let (mut out, mut lse_out) = (vec![half::f16::from_f32(10.0).to_bits(); ROWS * COLUMNS], [1.5e9; ROWS]);
    let mut status = STATUS_OK;
    let params = DecodeParams {
        num_splits: num_splits.as_ptr() as u64,
        partial_out: pieces.as_ptr() as u64,
        partial_lse: sums.as_ptr() as u64,
        out: out.as_mut_ptr() as u64,
        out_strides: [(ROWS * COLUMNS) as i64, (ROWS * COLUMNS) as i64, COLUMNS as i64, 1],
        lse: lse_out.as_mut_ptr() as u64,
        lse_strides: [ROWS as i64, 1, 1],
        status: &raw mut status as u64,
        b: 1,
        s_q: 1,
        h_q: ROWS as i32,
        h_kv: 1,
        heads_per_kv: ROWS as i32,
        head_dim_v: COLUMNS as i32,
        slots: slots as i32,
        combine_units: units,
        combine_ways: ways,
        flags: 4,
        ..DecodeParams::default()
    };
    let turns = ROWS.div_ceil(8) * ways as usize;
    let shared = kernels.shared_bytes("polymla_merge_f16");
    // SAFETY: every pointer is to a vector of the size that the kernel takes from these numbers; past `slots` it reads nothing.
    unsafe { kernels.launch("polymla_merge_f16", turns.div_ceil(units as usize), shared, &params, 3) };
    (out, lse_out)
}

/// More splits than are weighed at a time, than a way loads at a time, or just as many, or one fewer; every number of ways.
#[test]
fn the_merge_kernel_takes_any_number_of_splits() {
    for variant in ["mma-32-99", "mma-32-227"] {
        let kernels = Kernels::open(&by_name(variant));
        for (n, ways, units) in [
            (2, 1, 1),
            (3, 1, 2),
            (8, 2, 5),
            (9, 4, 1),
            (12, 1, 3),
            (13, 16, 2),
            (16, 8, 1),
            (17, 4, 2),
            (7, 8, 3),
            (32, 2, 5),
            (33, 8, 1),
            (64, 16, 3),
            (65, 8, 1),
            (160, 4, 2),
            (161, 2, 64),
            (403, 1, 5),
            (330, 8, 2),
            (90, 16, 2),
        ] {
            let (out, lse_out) = merge(&kernels, n, n, ways, units);
            for row in 0..ROWS {
                let weights: Vec<f64> = (0..n).map(|split| f64::from(lse(split, row)).exp2()).collect();
                let total: f64 = weights.iter().sum();
                let want = total.ln();
                assert!(
                    (f64::from(lse_out[row]) - want).abs() < 1e-5,
                    "{n} splits, row {row}: {} {want}",
                    lse_out[row]
                );
                for col in 0..COLUMNS {
                    let sum: f64 = (0..n).map(|split| weights[split] * f64::from(value(split, row, col))).sum();
                    let (got, want) = (half::f16::from_bits(out[row * COLUMNS + col]).to_f64(), sum / total);
                    // Rounding to f16, and what pieces drop: 2^-16 of each value.
                    let allowed = 6e-4 * want.abs() + 2.5e-5;
                    assert!(
                        (got - want).abs() <= allowed,
                        "{n} splits, {ways} ways, row {row} column {col}: {got} {want}"
                    );
                }
            }
        }
    }
}

/// A request of whose splits the last had no slot is NaN, whatever form its splits would have taken.
#[test]
fn the_merge_kernel_makes_nan_of_lost_splits() {
    let kernels = Kernels::open(&by_name("mma-32-227"));
    for (n, ways, units) in [(2, 1, 1), (8, 2, 5), (12, 8, 1), (20, 4, 1), (50, 16, 3), (100, 8, 2), (200, 2, 1)] {
        let (out, lse_out) = merge(&kernels, n, n - 1, ways, units);
        assert!(lse_out.iter().all(|x| x.is_nan()), "{n} splits: {lse_out:?}");
        assert!(out.iter().all(|x| half::f16::from_bits(*x).is_nan()), "{n} splits, {ways} ways: out");
    }
}
