// Merges the partial results of every row and writes out and lse.
//
// One workgroup a row, or several, each with some blocks of 256 columns: invocation t has columns 2t and 2t + 1 of a block.
// 128 splits at a time: an invocation works out the weight of one, then all add, in the order of the splits, so that the
// bits never depend on timing.

//#include "params.wgsl"
//#include "store.wgsl"

@group(0) @binding(1) var<storage, read> plan: array<u32>;
@group(0) @binding(2) var<storage, read> workspace: array<f32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

const THREADS: u32 = 128;
const BLOCK: u32 = THREADS * 2u;
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

// Of each of 128 splits: how it is weighted, and what it adds to the two sums of weights.
var<workgroup> weights: array<f32, 128>;
var<workgroup> terms: array<vec2<f32>, 128>;

// Two columns of a split's accumulators, or of what a row begins with.
fn partial(row: u32, column: u32, second: u32) -> vec2<f32> {
    let at = params.accumulators_at + row * params.head_dim_v + column;
    return vec2<f32>(workspace[at], workspace[at + second]);
}

@compute @workgroup_size(THREADS)
fn combine(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
           @builtin(local_invocation_index) thread: u32) {
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

    // The largest maximum: of an invocation's splits, then of all.
    var top = LOWEST;
    for (var i = begin + thread; i < end; i += THREADS) {
        top = max(top, workspace[params.sums_at + (i * rows + local_row) * SUMS]);
    }
    weights[thread] = top;
    workgroupBarrier();
    for (var i = 0u; i < min(end - begin, THREADS); i += 1u) {
        top = max(top, weights[i]);
    }

    let bad = bitcast<u32>(workspace[request]) == BAD_LENGTH;
    let out_row = params.out.x + request * params.out.y + row.s * params.out.z + row.head * params.out.w;
    for (var block = group.z * BLOCK; block < params.head_dim_v; block += groups.z * BLOCK) {
        let column = block + thread * 2u;
        let exists = column < params.head_dim_v;
        let second = u32(column + 1u < params.head_dim_v);
        let source = select(0u, column, exists);
        var sum = 0.0;
        var lse_sum = 0.0;
        var pair = vec2<f32>(0.0);
        for (var chunk = begin; chunk < end; chunk += THREADS) {
            workgroupBarrier();         // the weights before have been read
            let split = chunk + thread;
            var weight = 0.0;
            if split < end {
                let at = params.sums_at + (split * rows + local_row) * SUMS;
                weight = exp2(workspace[at] - top);
                terms[thread] = weight * vec2<f32>(workspace[at + 1u], workspace[at + 2u]);
            }
            weights[thread] = weight;
            workgroupBarrier();
            let chunk_end = min(end, chunk + THREADS);
            for (var i = chunk; i < chunk_end; i += 1u) {
                sum += terms[i - chunk].x;
                lse_sum += terms[i - chunk].y;
            }
            var i = chunk;
            for (; i + 4u <= chunk_end; i += 4u) {      // four loads under way
                let a = partial(i * rows + local_row, source, second);
                let b = partial((i + 1u) * rows + local_row, source, second);
                let c = partial((i + 2u) * rows + local_row, source, second);
                let d = partial((i + 3u) * rows + local_row, source, second);
                let w = i - chunk;
                pair = pair + weights[w] * a + weights[w + 1u] * b + weights[w + 2u] * c + weights[w + 3u] * d;
            }
            for (; i < chunk_end; i += 1u) {
                pair += weights[i - chunk] * partial(i * rows + local_row, source, second);
            }
        }
        let blind = sum == 0.0;         // the row sees no key
        if block == 0u && thread == 0u {
            let at = params.lse.x + request * params.lse.y + row.head * params.lse.z + row.s * params.lse.w;
            if bad {
                lse[at] = bitcast<f32>(nan_bits());
            } else if blind {
                lse[at] = bitcast<f32>(infinity_bits());
            } else {
                lse[at] = (top - WEIGHT_SHIFT + precise_log2(lse_sum)) * LN_2;
            }
        }
        if !blind {
            // Still shifted, as the weights were: store_pair undoes it.
            pair /= sum * exp2(-WEIGHT_SHIFT);
        }
        if exists {
            store_pair(out_row + column * params.out_column, bad, pair, second == 1u);
        }
    }
}
