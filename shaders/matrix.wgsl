// A split by cooperative matrices: 16 x 16, f16 x f16 -> f32, each held by the 32 invocations of a subgroup together.
//
// Tile      ROWS (32 or 64) query rows of one KV head x 32 tokens x 512 columns of V: 256 invocations, 8 subgroups.
// Step      for 32 tokens, which are two groups of 16 neighbours in a page:
//             1. scores: every subgroup multiplies 32 rows with all 32 tokens over its share of head_dim_k's columns
//                and leaves the sums in shared memory
//             2. softmax: the shares added up; weights, as f16, to shared memory
//             3. out += weights x V: every subgroup has 64 columns of all rows in matrices
// Softmax   Matrices cannot be scaled row by row where they are. Weights are therefore relative to a reference that
//           follows the maximum only when that has risen by more than 2^8; then, rarely, matrices go through shared
//           memory. Weights up to 2^8 are as precise in f16 as those up to 1.
// Needs     what the host checks: f16; columns, heads of a KV head and page size multiples of 16; rows of tensors that
//           begin at multiples of 8 elements.

//#if EMULATED
const SUBGROUP_COUNT: u32 = 4;                  // less of everything, to fit smaller memories
const COLUMNS: u32 = 64;
//#else
const SUBGROUP_COUNT: u32 = 8;
const COLUMNS: u32 = 512;                       // of V, a workgroup
//#endif
const THREADS: u32 = SUBGROUP_COUNT * 32u;
const TOKENS: u32 = 32;
const LANES: u32 = THREADS / ROWS;              // invocations that share a row's scores
const TOKENS_PER_LANE: u32 = TOKENS / LANES;
const SHARES: u32 = THREADS / ROWS;             // subgroups that share the columns of 32 rows' scores
const UNROLLED: u32 = 2;                        // matrices of a row of Q, or of keys, loaded at a time
const MAX_RISE: f32 = 8.0;

var<workgroup> shares: array<f32, SUBGROUP_COUNT * 1024>;       // for each subgroup 32 rows x 32 tokens
var<workgroup> weights: array<f16, ROWS * TOKENS>;
var<workgroup> tail: array<f16, SUBGROUP_COUNT * 256>;          // for each subgroup 16 tokens x 16 columns
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> risen: u32;                      // the last step, plus 1, in which a reference had to follow

//#if EMULATED
// For tests, on adapters without such matrices. What is multiplied stays in memory: a matrix is where it lies. Of what
// is added up, every invocation holds 8 elements.
struct InMemory {
    source: u32,
    at: u32,
    row_pitch: u32,
    column_pitch: u32,
}
alias MatrixA = InMemory;
alias MatrixB = InMemory;
alias MatrixC = array<f32, 8>;

var<private> invocation: u32;                   // of the subgroup

fn element(m: InMemory, row: u32, column: u32) -> f32 {
    let i = m.at + row * m.row_pitch + column * m.column_pitch;
    switch m.source {
        case 0u: { return q_nope_at(i); }
        case 1u: { return q_pe_at(i); }
        case 2u: { return ckv_at(i); }
        case 3u: { return kpe_at(i); }
        case 4u: { return f32(weights[i]); }
        default: { return f32(tail[i]); }
    }
}
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var sum = c;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        for (var k = 0u; k < 16u; k += 1u) {
            sum[e] += element(a, i / 16u, k) * element(b, k, i % 16u);
        }
    }
    return sum;
}
fn load_q_nope(at: u32, pitch: u32) -> MatrixA { return InMemory(0u, at, pitch, 1u); }
fn load_q_pe(at: u32, pitch: u32) -> MatrixA { return InMemory(1u, at, pitch, 1u); }
fn load_weights(at: u32) -> MatrixA { return InMemory(4u, at, TOKENS, 1u); }
fn load_keys_nope(at: u32, pitch: u32) -> MatrixB { return InMemory(2u, at, 1u, pitch); }
fn load_keys_pe(at: u32, pitch: u32) -> MatrixB { return InMemory(3u, at, 1u, pitch); }
fn load_values(at: u32, pitch: u32) -> MatrixB { return InMemory(2u, at, pitch, 1u); }
fn load_tail(at: u32) -> MatrixB { return InMemory(5u, at, 16u, 1u); }
fn store_share(m: MatrixC, at: u32, pitch: u32) {
    var x = m;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        shares[at + i / 16u * pitch + i % 16u] = x[e];
    }
}
fn load_share(at: u32) -> MatrixC {
    var m: MatrixC;
    for (var e = 0u; e < 8u; e += 1u) {
        m[e] = shares[at + invocation + e * 32u];
    }
    return m;
}
fn store_accumulators(m: MatrixC, at: u32) {
    var x = m;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        workspace[at + i / 16u * params.head_dim_v + i % 16u] = x[e];
    }
}
//#else
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixC = coop_mat16x16<f32, C>;

// Rows of a matrix are `pitch` elements apart (coopLoadT); a tile of keys is a matrix of columns (coopLoad).
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC { return coopMultiplyAdd(a, b, c); }
fn load_q_nope(at: u32, pitch: u32) -> MatrixA { return coopLoadT<MatrixA>(&q_nope[at], pitch); }
fn load_q_pe(at: u32, pitch: u32) -> MatrixA { return coopLoadT<MatrixA>(&q_pe[at], pitch); }
fn load_weights(at: u32) -> MatrixA { return coopLoadT<MatrixA>(&weights[at], TOKENS); }
fn load_keys_nope(at: u32, pitch: u32) -> MatrixB { return coopLoad<MatrixB>(&ckv[at], pitch); }
fn load_keys_pe(at: u32, pitch: u32) -> MatrixB { return coopLoad<MatrixB>(&kpe[at], pitch); }
fn load_values(at: u32, pitch: u32) -> MatrixB { return coopLoadT<MatrixB>(&ckv[at], pitch); }
fn load_tail(at: u32) -> MatrixB { return coopLoadT<MatrixB>(&tail[at], 16u); }
fn store_share(m: MatrixC, at: u32, pitch: u32) { coopStoreT(m, &shares[at], pitch); }
fn load_share(at: u32) -> MatrixC { return coopLoadT<MatrixC>(&shares[at], 16u); }
fn store_accumulators(m: MatrixC, at: u32) {
    let pitch = params.head_dim_v;              // naga 30 needs what is stored with to have been computed before
    coopStoreT(m, &workspace[at], pitch);
}
//#endif

// Where a group of 16 tokens lies: offsets of its first token, or NOWHERE.
struct Group {
    ckv: u32,
    kpe: u32,
}

fn group_of(table_row: u32, token: u32, end: u32, kv_head: u32) -> Group {
    if token >= end {
        return Group(NOWHERE, NOWHERE);
    }
    let page = u32(block_table[table_row + token / params.page_size]) - params.first_page;
    if page >= params.window_pages {
        return Group(NOWHERE, NOWHERE);
    }
    let in_page = token % params.page_size;
    return Group(params.ckv.x + page * params.ckv.y + in_page * params.ckv.z + kv_head * params.ckv.w,
                 params.kpe.x + page * params.kpe.y + in_page * params.kpe.z + kv_head * params.kpe.w);
}

// The sum of `value`, or its maximum, over the lanes of a row, which are neighbours.
fn row_sum(value: f32) -> f32 {
    var s = value;
    for (var i = 1u; i < LANES; i *= 2u) {
        s += subgroupShuffleXor(s, i);
    }
    return s;
}
fn row_max(value: f32) -> f32 {
    var m = value;
    for (var i = 1u; i < LANES; i *= 2u) {
        m = max(m, subgroupShuffleXor(m, i));
    }
    return m;
}

// Tokens [begin, end) of a request, for one row tile; the result goes to row `slot` of the partial results.
fn decode_split(request: u32, begin: u32, end: u32, slot: u32, tile: u32, slice: u32, thread: u32) {
    let row = thread / LANES;
    let lane = thread % LANES;
    let subgroup = thread / 32u;
//#if EMULATED
    invocation = thread % 32u;
//#endif
    let kv_head = row_of(tile, 0u).kv_head;
    let table_row = params.block_table.x + request * params.block_table.y;
    let column = slice * COLUMNS + subgroup * (COLUMNS / SUBGROUP_COUNT);      // the subgroup's first column of V

    // The subgroup's 32 rows for scores, as two groups of 16. Of a group that does not exist the first is read again:
    // rows do not mix, and these are never combined.
    let row_half = subgroup / SHARES;
    let share = subgroup % SHARES;
    let first_row = row_half * 32u;
    let first_a = select(first_row, 0u, q_nope_rows[first_row] == NOWHERE);
    let first_b = select(first_row + 16u, first_a, q_nope_rows[first_row + 16u] == NOWHERE);

//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
    var sum_$m_$c: MatrixC;
    sum_$m_$c = MatrixC();              // stored, not left to the variable's initial value
//#endfor
//#endfor
    var top = LOWEST;                   // the row's reference, in powers of two
    var sum = 0.0;                      // this lane's share of the row's sum of weights as they are multiplied
    var lse_sum = 0.0;                  // and as they were before they were rounded

    for (var step = begin; step < end; step += TOKENS) {
        var group_0 = group_of(table_row, step, end, kv_head);
        var group_1 = group_of(table_row, step + 16u, end, kv_head);
        if group_0.ckv == NOWHERE && group_1.ckv == NOWHERE {
            continue;                   // the whole step is in other windows
        }
        // Of a group that is nowhere the other one is read: its scores are masked.
        let keys_0 = Group(select(group_0.ckv, group_1.ckv, group_0.ckv == NOWHERE),
                           select(group_0.kpe, group_1.kpe, group_0.ckv == NOWHERE));
        let keys_1 = Group(select(group_1.ckv, group_0.ckv, group_1.ckv == NOWHERE),
                           select(group_1.kpe, group_0.kpe, group_1.ckv == NOWHERE));

        var score_0_0 = MatrixC();
        var score_0_1 = MatrixC();
        var score_1_0 = MatrixC();
        var score_1_1 = MatrixC();
        // Loads of several matrices are under way before the first is needed.
        let pitch = SHARES * 16u;
        var c = share * 16u;
        while c + (UNROLLED - 1u) * pitch < params.head_dim_v {
//#for u 2
            let q_0_$u = load_q_nope(q_nope_rows[first_a] + c + $uu * pitch, params.q_nope.w);
            let q_1_$u = load_q_nope(q_nope_rows[first_b] + c + $uu * pitch, params.q_nope.w);
            let k_0_$u = load_keys_nope(keys_0.ckv + c + $uu * pitch, params.ckv.z);
            let k_1_$u = load_keys_nope(keys_1.ckv + c + $uu * pitch, params.ckv.z);
//#endfor
//#for u 2
            score_0_0 = multiply_add(q_0_$u, k_0_$u, score_0_0);
            score_0_1 = multiply_add(q_0_$u, k_1_$u, score_0_1);
            score_1_0 = multiply_add(q_1_$u, k_0_$u, score_1_0);
            score_1_1 = multiply_add(q_1_$u, k_1_$u, score_1_1);
//#endfor
            c += UNROLLED * pitch;
        }
        for (; c < params.head_dim_v; c += pitch) {
            let q_0 = load_q_nope(q_nope_rows[first_a] + c, params.q_nope.w);
            let q_1 = load_q_nope(q_nope_rows[first_b] + c, params.q_nope.w);
            let k_0 = load_keys_nope(keys_0.ckv + c, params.ckv.z);
            let k_1 = load_keys_nope(keys_1.ckv + c, params.ckv.z);
            score_0_0 = multiply_add(q_0, k_0, score_0_0);
            score_0_1 = multiply_add(q_0, k_1, score_0_1);
            score_1_0 = multiply_add(q_1, k_0, score_1_0);
            score_1_1 = multiply_add(q_1, k_1, score_1_1);
        }
        // The shares of the rope part go to the subgroups that had least before.
        let rope = params.head_dim_k - params.head_dim_v;
        for (var c = (SHARES - 1u - share) * 16u; c < rope; c += pitch) {
            let q_0 = load_q_pe(q_pe_rows[first_a] + c, params.q_pe.w);
            let q_1 = load_q_pe(q_pe_rows[first_b] + c, params.q_pe.w);
            let k_0 = load_keys_pe(keys_0.kpe + c, params.kpe.z);
            let k_1 = load_keys_pe(keys_1.kpe + c, params.kpe.z);
            score_0_0 = multiply_add(q_0, k_0, score_0_0);
            score_0_1 = multiply_add(q_0, k_1, score_0_1);
            score_1_0 = multiply_add(q_1, k_0, score_1_0);
            score_1_1 = multiply_add(q_1, k_1, score_1_1);
        }
        store_share(score_0_0, subgroup * 1024u, TOKENS);
        store_share(score_0_1, subgroup * 1024u + 16u, TOKENS);
        store_share(score_1_0, subgroup * 1024u + 512u, TOKENS);
        store_share(score_1_1, subgroup * 1024u + 528u, TOKENS);
        workgroupBarrier();

        // Softmax. A token that the row does not see, or that is in another window, weighs exactly 0.
        var scores: array<f32, TOKENS_PER_LANE>;
        var seen: array<bool, TOKENS_PER_LANE>;
        var highest = LOWEST;
        for (var i = 0u; i < TOKENS_PER_LANE; i += 1u) {
            let t = lane + i * LANES;
            var score = 0.0;
            for (var s = 0u; s < SHARES; s += 1u) {
                score += shares[(row / 32u * SHARES + s) * 1024u + row % 32u * TOKENS + t];
            }
            seen[i] = step + t < ends[row] && select(group_1.ckv, group_0.ckv, t < 16u) != NOWHERE;
            scores[i] = score * params.scale_log2;
            highest = select(highest, max(highest, scores[i]), seen[i]);
        }
        highest = row_max(highest);
        var factor = 1.0;
        if highest > top + MAX_RISE || (top == LOWEST && highest > LOWEST) {
            factor = exp2(top - highest);
            if top != LOWEST {
                risen = step + 1u;      // several may write: the same number
            }
            top = highest;
            sum *= factor;
            lse_sum *= factor;
        }
        if lane == 0u {
            factors[row] = factor;
        }
        for (var i = 0u; i < TOKENS_PER_LANE; i += 1u) {
            var weight = 0.0;
            if seen[i] {
                weight = exp2(scores[i] - top);
            }
            let rounded = f16(weight);
            lse_sum += weight;
            sum += f32(rounded);
            weights[row * TOKENS + lane + i * LANES] = rounded;
        }
        let rescale = workgroupUniformLoad(&risen) == step + 1u;
        if rescale {
            // The shares have been read: their memory serves, 16 x 16 for each subgroup.
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
            store_share(sum_$m_$c, subgroup * 1024u, 16u);
            workgroupBarrier();
            for (var i = thread % 32u; i < 256u; i += 32u) {
                shares[subgroup * 1024u + i] *= factors[$mu * 16u + i / 16u];
            }
            workgroupBarrier();
            sum_$m_$c = load_share(subgroup * 1024u);
            workgroupBarrier();
//#endfor
//#endfor
        }

        // Weights x V, 16 tokens at a time.
        for (var g = 0u; g < 2u; g += 1u) {
            let values = select(group_1.ckv, group_0.ckv, g == 0u);
            if values == NOWHERE {
                continue;
            }
            let valid = min(end - step - g * 16u, 16u);
//#for m MATRIX_ROWS
            let weights_$m = load_weights($mu * 16u * TOKENS + g * 16u);
//#endfor
            if valid == 16u && slice * COLUMNS + COLUMNS <= params.head_dim_v {
//#for c MATRIX_COLUMNS
                let v_$c = load_values(values + column + $cu * 16u, params.ckv.z);
//#endfor
//#for c MATRIX_COLUMNS
//#for m MATRIX_ROWS
                sum_$m_$c = multiply_add(weights_$m, v_$c, sum_$m_$c);
//#endfor
//#endfor
                continue;
            }
//#for c MATRIX_COLUMNS
            if valid == 16u {
                if column + $cu * 16u < params.head_dim_v {
                    let v = load_values(values + column + $cu * 16u, params.ckv.z);
//#for m MATRIX_ROWS
                    sum_$m_$c = multiply_add(weights_$m, v, sum_$m_$c);
//#endfor
                }
            } else {
                // The end of the sequence: what lies beyond may be anything, and 0 x NaN is NaN.
                workgroupBarrier();
                for (var i = thread % 32u; i < 256u; i += 32u) {
                    let source = column + $cu * 16u + i % 16u;
                    var x = f16(0.0);
                    if i / 16u < valid && source < params.head_dim_v {
                        x = ckv[values + i / 16u * params.ckv.z + source];
                    }
                    tail[subgroup * 256u + i] = x;
                }
                workgroupBarrier();
                let v = load_tail(subgroup * 256u);
//#for m MATRIX_ROWS
                sum_$m_$c = multiply_add(weights_$m, v, sum_$m_$c);
//#endfor
            }
//#endfor
        }
    }

    let partial_row = slot * params.row_tiles * ROWS + (tile - params.first_row_tile) * ROWS;
    let all = row_sum(sum);
    let lse_all = row_sum(lse_sum);
    if lane == 0u && slice == 0u {
        store_sums(partial_row + row, select(top + WEIGHT_SHIFT, LOWEST, top == LOWEST), all, lse_all);
    }
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
    if column + $cu * 16u < params.head_dim_v {
        store_accumulators(sum_$m_$c, params.accumulators_at + (partial_row + $mu * 16u) * params.head_dim_v + column + $cu * 16u);
    }
//#endfor
//#endfor
    workgroupBarrier();                 // the next split's shares and weights
}
