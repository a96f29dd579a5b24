// Merges the partial results of every row and writes out and lse.
//
// Grid      (rows, requests, 1 or 4): where there are few rows, 4 workgroups share one.
// Tile      512 columns of a row (128 of 4 workgroups): an invocation adds 4 columns, of all splits; of 4 workgroups, of
//           every fourth split, and then the four sums are added.
// Order     first the weights of 128 splits, one an invocation; then sums. There are four, of splits 0, 4, 8, .., of 1, 5, 9,
//           and so on, whoever adds them: the bits depend neither on timing nor on how many rows there are. Of up to four
//           splits an invocation asks for all at once and shares nothing.

//#include "params.wgsl"
//#include "store.wgsl"

@group(0) @binding(1) var<storage, read> plan: array<u32>;
//#if QUADS
@group(0) @binding(2) var<storage, read> workspace: array<vec4<f32>>;
//#else
@group(0) @binding(2) var<storage, read> workspace: array<f32>;
//#endif
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

const THREADS: u32 = 128;
const SUMS_APART: u32 = 4;              // sums of a column, which are added last
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

var<workgroup> group_sums: array<vec4<f32>, THREADS>;

fn word(i: u32) -> f32 {
//#if QUADS
    return workspace[i / 4u][i % 4u];
//#else
    return workspace[i];
//#endif
}

// Four columns of a row's accumulators, 0 where there are none.
fn partial(row: u32, column: u32) -> vec4<f32> {
    let at = params.accumulators_at + row * params.head_dim_v + column;
//#if QUADS
    // head_dim_v and the place of the accumulators are multiples of 4.
    if column < params.head_dim_v {
        return workspace[at / 4u];
    }
    return vec4<f32>(0.0);
//#else
    var v = vec4<f32>(0.0);
    for (var i = 0u; i < min(4u, max(column, params.head_dim_v) - column); i += 1u) {
        v[i] = workspace[at + i];
    }
    return v;
//#endif
}

// Four columns of a row, from their sum of weighted accumulators; `sums` are the row's two sums of weights. lse with the first four.
fn store_row(row: Row, request: u32, bad: bool, column: u32, accumulated: vec4<f32>, top: f32, sums: vec2<f32>) {
    let blind = sums.x == 0.0;          // the row sees no key
    if column == 0u {
        let at = params.lse.x + request * params.lse.y + row.head * params.lse.z + row.s * params.lse.w;
        if bad {
            lse[at] = bitcast<f32>(nan_bits());
        } else if blind {
            lse[at] = bitcast<f32>(infinity_bits());
        } else {
            lse[at] = (top - WEIGHT_SHIFT + precise_log2(sums.y)) * LN_2;
        }
    }
    var quad = accumulated;
    if !blind {
        // Still shifted, as the weights were: store_pair undoes it.
        quad /= sums.x * exp2(-WEIGHT_SHIFT);
    }
    if column < params.head_dim_v {
        let at = params.out.x + request * params.out.y + row.s * params.out.z + row.head * params.out.w + column * params.out_column;
        store_pair(at, bad, quad.xy, column + 1u < params.head_dim_v);
        if column + 2u < params.head_dim_v {
            store_pair(at + 2u * params.out_column, bad, quad.zw, column + 3u < params.head_dim_v);
        }
    }
}

// A row of at most SUMS_APART splits, from this column on.
fn merge_few(row: Row, request: u32, local_row: u32, begin: u32, end: u32, rows: u32, bad: bool, first_column: u32) {
    for (var column = first_column; column < params.head_dim_v; column += THREADS * 4u) {
        var tops = array<f32, SUMS_APART>(LOWEST, LOWEST, LOWEST, LOWEST);
        var terms = array<vec2<f32>, SUMS_APART>();
        var parts = array<vec4<f32>, SUMS_APART>();
//#for i 4
        if begin + $iu < end {
            let split_$i = (begin + $iu) * rows + local_row;
            let sums_$i = params.sums_at + split_$i * SUMS;
            tops[$i] = word(sums_$i);
            terms[$i] = vec2<f32>(word(sums_$i + 1u), word(sums_$i + 2u));
            parts[$i] = partial(split_$i, column);
        }
//#endfor
        let top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
        var sums = vec2<f32>(0.0);
//#for i 4
        if begin + $iu < end {
            let weight_$i = exp2(tops[$i] - top);
            sums += weight_$i * terms[$i];
            parts[$i] *= weight_$i;
        }
//#endfor
        store_row(row, request, bad, column, (parts[0] + parts[1]) + (parts[2] + parts[3]), top, sums);
    }
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

    let bad = bitcast<u32>(word(request)) == BAD_LENGTH;
    let shared_row = groups.z > 1u;
    let lanes = select(THREADS, THREADS / SUMS_APART, shared_row);
    if end - begin <= SUMS_APART {
        if thread < lanes {
            merge_few(row, request, local_row, begin, end, rows, bad, (group.z * lanes + thread) * 4u);
        }
        return;
    }

    // The largest maximum: of an invocation's splits, then of all.
    var top = LOWEST;
    for (var i = begin + thread; i < end; i += THREADS) {
        top = max(top, word(params.sums_at + (i * rows + local_row) * SUMS));
    }
    weights[thread] = top;
    workgroupBarrier();
    for (var i = 0u; i < min(end - begin, THREADS); i += 1u) {
        top = max(top, weights[i]);
    }

    let part = thread / lanes;          // which of the four sums is this invocation's, where it has one
    for (var block = group.z * lanes * 4u; block < params.head_dim_v; block += groups.z * lanes * 4u) {
        let column = block + thread % lanes * 4u;
        var sum = 0.0;
        var lse_sum = 0.0;
        var a = vec4<f32>(0.0);
        var b = vec4<f32>(0.0);
        var c = vec4<f32>(0.0);
        var d = vec4<f32>(0.0);
        for (var chunk = begin; chunk < end; chunk += THREADS) {
            workgroupBarrier();         // the weights before have been read
            let split = chunk + thread;
            var weight = 0.0;
            var term = vec2<f32>(0.0);
            if split < end {
                let at = params.sums_at + (split * rows + local_row) * SUMS;
                weight = exp2(word(at) - top);
                term = weight * vec2<f32>(word(at + 1u), word(at + 2u));
            }
            weights[thread] = weight;
            terms[thread] = term;
            workgroupBarrier();
            let n = min(end - chunk, THREADS);
            for (var i = 0u; i < n; i += 1u) {
                sum += terms[i].x;
                lse_sum += terms[i].y;
            }
            if shared_row {
                for (var i = part; i < n; i += SUMS_APART) {
                    a += weights[i] * partial((chunk + i) * rows + local_row, column);
                }
            } else {
                var i = 0u;
                for (; i + 4u <= n; i += 4u) {      // four loads under way
                    let at = (chunk + i) * rows + local_row;
                    let x = partial(at, column);
                    let y = partial(at + rows, column);
                    let z = partial(at + 2u * rows, column);
                    let w = partial(at + 3u * rows, column);
                    a += weights[i] * x;
                    b += weights[i + 1u] * y;
                    c += weights[i + 2u] * z;
                    d += weights[i + 3u] * w;
                }
                let at = (chunk + i) * rows + local_row;
                if i < n {
                    a += weights[i] * partial(at, column);
                }
                if i + 1u < n {
                    b += weights[i + 1u] * partial(at + rows, column);
                }
                if i + 2u < n {
                    c += weights[i + 2u] * partial(at + 2u * rows, column);
                }
            }
        }
        if shared_row {
            workgroupBarrier();
            group_sums[thread] = a;
            workgroupBarrier();
            a = group_sums[thread % lanes];
            b = group_sums[thread % lanes + lanes];
            c = group_sums[thread % lanes + 2u * lanes];
            d = group_sums[thread % lanes + 3u * lanes];
        }
        if part == 0u {
            store_row(row, request, bad, column, (a + b) + (c + d), top, vec2<f32>(sum, lse_sum));
        }
    }
}
