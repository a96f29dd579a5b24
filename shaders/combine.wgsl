// Merges the partial results of every row and writes out and lse.
//
// One workgroup a row: invocation t has columns 2t and 2t + 1, and so on. Partial results are added in the order of
// their splits, so that the bits never depend on timing.

//#include "params.wgsl"
//#include "store.wgsl"

@group(0) @binding(1) var<storage, read> plan: array<u32>;
@group(0) @binding(2) var<storage, read> workspace: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

const THREADS: u32 = 128;
const LN_2: f32 = 0.6931471805599453;
// The maximum of no scores. Finite, so that differences of two are defined.
const LOWEST: f32 = -3.0e38;

// log2, to a few units in the last place: implementations' own may have an absolute error of 2^-21 near 1.
fn precise_log2(x: f32) -> f32 {
    // x = 2^e * m, m in [sqrt(1/2), sqrt(2)); log(m) = 2 artanh(z).
    let bits = bitcast<u32>(x) - 0x3f3504f3u;
    let e = bitcast<i32>(bits) >> 23u;
    let m = bitcast<f32>((bits & 0x007fffffu) + 0x3f3504f3u);
    let z = (m - 1.0) / (m + 1.0);
    let z2 = z * z;
    let artanh = z + z * z2 * (0.33333333 + z2 * (0.2 + z2 * (0.14285714 + z2 * 0.11111111)));
    return f32(e) + artanh * 2.885390081777927;
}

@compute @workgroup_size(THREADS)
fn combine(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let local_row = group.x;
    let request = group.y;
    let row = row_of(params.first_row_tile + local_row / ROWS, local_row % ROWS);
    if !row.exists {
        return;
    }
    let first = plan[NUM_SPLITS_AT + params.first_request];
    let begin = (plan[NUM_SPLITS_AT + params.first_request + request] - first) * params.windows;
    let end = (plan[NUM_SPLITS_AT + params.first_request + request + 1u] - first) * params.windows;
    let rows = params.row_tiles * ROWS;

    // The largest maximum, and the sum of all weights relative to it.
    var top = LOWEST;
    for (var i = begin; i < end; i += 1u) {
        top = max(top, workspace[params.sums_at + (i * rows + local_row) * SUMS]);
    }
    var sum = 0.0;
    var lse_sum = 0.0;
    for (var i = begin; i < end; i += 1u) {
        let at = params.sums_at + (i * rows + local_row) * SUMS;
        let weight = exp2(workspace[at] - top);
        sum += weight * workspace[at + 1u];
        lse_sum += weight * workspace[at + 2u];
    }
    let bad = bitcast<u32>(workspace[request]) == BAD_LENGTH;
    let blind = sum == 0.0;             // the row sees no key
    if thread == 0u {
        let at = params.lse.x + request * params.lse.y + row.head * params.lse.z + row.s * params.lse.w;
        if bad {
            lse[at] = bitcast<f32>(nan_bits());
        } else if blind {
            lse[at] = bitcast<f32>(infinity_bits());
        } else {
            lse[at] = (top - WEIGHT_SHIFT + precise_log2(lse_sum)) * LN_2;
        }
    }
    let out_row = params.out.x + request * params.out.y + row.s * params.out.z + row.head * params.out.w;
    for (var column = thread * 2u; column < params.head_dim_v; column += THREADS * 2u) {
        let second = column + 1u < params.head_dim_v;
        var pair = vec2<f32>(0.0);
        for (var i = begin; i < end; i += 1u) {
            let weight = exp2(workspace[params.sums_at + (i * rows + local_row) * SUMS] - top);
            let at = params.accumulators_at + (i * rows + local_row) * params.head_dim_v + column;
            pair += weight * vec2<f32>(workspace[at], workspace[at + u32(second)]);
        }
        if !blind {
            // Still shifted, as the weights were: store_pair undoes it.
            pair /= sum * exp2(-WEIGHT_SHIFT);
        }
        store_pair(out_row + column * params.out_column, bad, pair, second);
    }
}
