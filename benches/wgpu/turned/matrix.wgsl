// A split by cooperative matrices: 16 x 16, f16 x f16 -> f32, each held by the 32 invocations of a subgroup together.
//
// Tile      ROWS (16, 32 or 64) query rows of one KV head x 32 tokens x all columns: 256 invocations, 8 subgroups.
// Memory    A step's 32 keys lie in shared memory, from where both products read them: global memory is read once, 16
//           bytes an invocation. Queries stay in matrices for the whole split, sums too.
// Step      for 32 tokens, whose keys are in shared memory:
//             1. scores: a subgroup multiplies 16 rows with 16 tokens (32 tokens where ROWS is 64) over its share of
//                head_dim_k's columns and leaves the sums in shared memory
//             2. softmax: the shares added up; weights, as f16, to shared memory, beside the keys
//             3. out += weights x V: every subgroup has 64 columns of all rows in matrices
//             4. the next step's keys -> shared memory; where the keys after that are
//             5. those are asked for; with 64 rows, which leave no registers for them, one word of every 32 bytes is, so
//                that they are in the processor's cache when they are loaded in 4.
//           A compiler moves a load down to its use, but not past the end of a loop: hence 5 is the last.
// Softmax   Matrices cannot be scaled row by row where they are. Weights are therefore relative to a reference that is
//           2^6 below the maximum and follows only when that has risen by more than 2^8; then, rarely, matrices go
//           through shared memory. Weights from 2^-14 to 2^14 have all bits in f16.
// Needs     what the host checks: f16, or bf16 as range.wgsl has it; no more columns than below, in multiples of 8; rows
//           of tensors that begin at multiples of 8 elements.

const SUBGROUP_COUNT: u32 = 8;
const THREADS: u32 = SUBGROUP_COUNT * 32u;
const TOKENS: u32 = 32;
//#if EMULATED
const K_COLUMNS: u32 = 192;                     // less of everything, to fit smaller memories
const COLUMNS: u32 = 128;
//#else
const K_COLUMNS: u32 = 576;                     // of head_dim_k, at most
const COLUMNS: u32 = 512;                       // of head_dim_v, at most
//#endif
// Each token has a line in shared memory: 16 bytes more than a multiple of 128, so that a matrix's rows begin in different
// banks. Once there are scores its rope columns are of no use: line t then has the weights of rows t and 32 + t.
const WEIGHTS_AT: u32 = COLUMNS;
const PITCH: u32 = COLUMNS + 72u;
const SUBGROUP_TOKENS: u32 = TOKENS / SUBGROUP_COUNT;   // that a subgroup copies
const VECTORS: u32 = K_COLUMNS / 8u;            // of 16 bytes, a token
const LANES: u32 = min(THREADS / ROWS, 8u);     // invocations that share a row's scores, of one subgroup anywhere
const TOKENS_PER_LANE: u32 = TOKENS / LANES;
const HEADROOM: f32 = 6.0;
const MOST: f32 = 14.0;

// Which 16 rows, which 16 tokens and which share of the columns a subgroup multiplies for scores.
//#if ROWS_64
const SHARES: u32 = 2;                          // added up before they are stored: memory is for one
const STORED_SHARES: u32 = 1;
//#elif ROWS_32
const SHARES: u32 = 2;
const STORED_SHARES: u32 = 2;
//#else
const SHARES: u32 = 4;
const STORED_SHARES: u32 = 4;
//#endif
const ROW_TILES: u32 = ROWS / 16u;
const TOKENS_APART: u32 = SUBGROUP_COUNT / (ROW_TILES * SHARES);     // 1 where a subgroup has both groups of 16 tokens
const SHARE_COLUMNS: u32 = K_COLUMNS / SHARES;
const SHARE_PITCH: u32 = TOKENS + 4u;           // again so that rows begin in different banks

// Matrices go to and from memory that begins at a multiple of 16 bytes: nothing here or in decode.wgsl has a size that
// is not one, so that the order in which a driver lays it out does not matter.
var<workgroup> keys: array<vec4<f16>, TOKENS * PITCH / 4u>;
// STORED_SHARES x ROWS x TOKENS; or 16 x 16 for each subgroup.
var<workgroup> shares: array<vec4<f32>, 64u * SHARE_PITCH / 4u>;
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> risen: array<u32, 4>;            // the last step, plus 1, in which a reference had to follow
// Where the tokens of this step and of the next are, in units of 16 bytes, and whether they are there: all bits or none.
var<workgroup> ckv_tokens: array<u32, 64>;
var<workgroup> kpe_tokens: array<u32, 64>;
var<workgroup> present: array<u32, 64>;

//#include "multiply.wgsl"
//#if BF16
//#include "range.wgsl"
//#endif
//#include "keys.wgsl"

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

// The page of a token before `end`.
fn page_before(table_row: u32, token: u32, end: u32) -> u32 {
    if token < end {
        return page_of(table_row, token);
    }
    return NOWHERE;
}

// Tokens [begin, end) of a request, for one row tile; the result goes to row `slot` of the partial results.
fn decode_split(request: u32, begin: u32, end: u32, slot: u32, tile: u32, slice: u32, thread: u32) {
    let row = thread / LANES % ROWS;    // for softmax, and whether there is one
    let has_row = thread / LANES < ROWS;
    let lane = thread % LANES;
    let subgroup = thread / 32u;
//#if EMULATED
    invocation = thread % 32u;
//#endif
    let kv_head = row_of(tile, 0u).kv_head;
    let table_row = params.block_table.x + request * params.block_table.y;
    let column = subgroup * (COLUMNS / SUBGROUP_COUNT);     // the subgroup's first column of V

    let row_tile = subgroup % ROW_TILES;
    let token_tile = subgroup / ROW_TILES % TOKENS_APART;
    let share = subgroup / (ROW_TILES * TOKENS_APART);

//#if BF16
    let query_scale = measure_queries(row, lane, has_row, thread);
    let scale_log2 = params.scale_log2 / query_scale;
//#else
    let scale_log2 = params.scale_log2;
//#endif

    // Queries, by way of the memory that keys will have: 32 rows at a time.
//#for q QUERY_TILES
    var q_$q: MatrixA;
//#endfor
    for (var first = 0u; first < ROWS; first += 32u) {
        workgroupBarrier();
        for (var n = thread; n < min(ROWS, 32u) * VECTORS; n += THREADS) {
            let v = query_vector(first + n / VECTORS, n % VECTORS);
//#if BF16
            store_vector(n / VECTORS, n % VECTORS, scaled_halves(v, query_scale));
//#else
            store_vector(n / VECTORS, n % VECTORS, halves(v));
//#endif
        }
        workgroupBarrier();
        if row_tile / 2u == first / 32u {
            let at = row_tile % 2u * 16u * PITCH + share * SHARE_COLUMNS;
//#for q QUERY_TILES
            q_$q = load_queries(at + $qu * 16u, $qu);
//#endfor
        }
    }

//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
    var sum_$m_$c: MatrixC;
    sum_$m_$c = MatrixC();              // stored, not left to the variable's initial value
//#endfor
//#endfor
    var top = LOWEST;                   // the row's reference, in powers of two
    var sum = 0.0;                      // this lane's share of the row's sum of weights as they are multiplied
    var lse_sum = 0.0;                  // and as they were before they were rounded
    if thread == 0u {
        risen[0] = 0u;
    }

    var step = seek(table_row, begin, end);
    var next_step = seek(table_row, step + TOKENS, end);
    var third_step = seek(table_row, next_step + TOKENS, end);
    var here = 0u;                      // the half of the offsets that is this step's
    var third_page = NOWHERE;           // of invocation t: the page of token t of the third step
    if thread < TOKENS {
        locate(page_before(table_row, step + thread, end), step + thread, end, kv_head, thread);
        locate(page_before(table_row, next_step + thread, end), next_step + thread, end, kv_head, TOKENS + thread);
        third_page = page_before(table_row, third_step + thread, end);
    }
    workgroupBarrier();
//#for n LOADS
    let place_$n = vector_of($nu, subgroup, thread % 32u);
    let first_$n = key_vector($nu, 0u, place_$n);
//#endfor
//#for n LOADS
    store_key(0u, $nu, place_$n, first_$n);
//#endfor
    workgroupBarrier();
//#if PREFETCH
//#for n LOADS
    var next_$n = key_vector($nu, TOKENS, place_$n);
//#endfor
//#endif
//#if TOUCH
    var touched = 0u;
//#for n TOUCHES
    var touch_$n = touch(TOKENS, $nu * THREADS + thread);
//#endfor
//#endif
    while step < end {
        let fourth_step = seek(table_row, third_step + TOKENS, end);
        let there = TOKENS - here;

        // Scores.
        let first_key = token_tile * 16u * PITCH + share * SHARE_COLUMNS;
//#for s SCORE_TILES
        var score_$s: MatrixC;
        score_$s = MatrixC();
//#endfor
//#for q QUERY_TILES
//#for s SCORE_TILES
        score_$s = multiply_add(q_$q, load_keys(first_key + $su * 16u * PITCH + $qu * 16u), score_$s);
//#endfor
//#endfor
        let share_at = ((share % STORED_SHARES) * ROWS + row_tile * 16u) * SHARE_PITCH + token_tile * 16u;
//#if ROWS_64
        if share == 1u {
//#for s SCORE_TILES
            store_share(score_$s, share_at + $su * 16u, SHARE_PITCH);
//#endfor
        }
        workgroupBarrier();
        if share == 0u {
//#for s SCORE_TILES
            score_$s = plus(score_$s, load_share(share_at + $su * 16u, SHARE_PITCH));
            store_share(score_$s, share_at + $su * 16u, SHARE_PITCH);
//#endfor
        }
//#else
//#for s SCORE_TILES
        store_share(score_$s, share_at + $su * 16u, SHARE_PITCH);
//#endfor
//#endif
        workgroupBarrier();

        // Softmax: this lane has 4 or 8 neighbouring tokens. One that the row does not see, or that is in another window,
        // weighs exactly 0.
        let first_token = lane * TOKENS_PER_LANE;
        var highest = LOWEST;
//#for i LANE_VECTORS
        var score_at_$i = shares[(row * SHARE_PITCH + first_token) / 4u + $iu];
        for (var s = 1u; s < STORED_SHARES; s += 1u) {
            score_at_$i += shares[((s * ROWS + row) * SHARE_PITCH + first_token) / 4u + $iu];
        }
        score_at_$i *= scale_log2;
        let token_$i = step + first_token + $iu * 4u + vec4<u32>(0u, 1u, 2u, 3u);
        let slot_$i = here + first_token + $iu * 4u;
        let there_$i = vec4<u32>(present[slot_$i], present[slot_$i + 1u], present[slot_$i + 2u], present[slot_$i + 3u]);
        let seen_$i = (token_$i < vec4<u32>(ends[row])) & (there_$i != vec4<u32>(0u));
        score_at_$i = select(vec4<f32>(LOWEST), score_at_$i, seen_$i);
        highest = max(highest, max(max(score_at_$i.x, score_at_$i.y), max(score_at_$i.z, score_at_$i.w)));
//#endfor
        highest = row_max(highest);
        var factor = 1.0;
        if highest > top + MOST || (top == LOWEST && highest > LOWEST) {
            factor = exp2(top - (highest - HEADROOM));
            if top != LOWEST && has_row {
                risen[0] = step + 1u;   // several may write: the same number
            }
            top = highest - HEADROOM;
            sum *= factor;
            lse_sum *= factor;
        }
        if has_row && lane == 0u {
            factors[row] = factor;
        }
        let weights_at = (row % 32u * PITCH + WEIGHTS_AT + row / 32u * 32u + first_token) / 4u;
//#for i LANE_VECTORS
        let weight_$i = select(vec4<f32>(0.0), exp2(score_at_$i - top), seen_$i);
        let rounded_$i = vec4<f16>(weight_$i);
        lse_sum += weight_$i.x + weight_$i.y + weight_$i.z + weight_$i.w;
        let as_multiplied_$i = vec4<f32>(rounded_$i);
        sum += as_multiplied_$i.x + as_multiplied_$i.y + as_multiplied_$i.z + as_multiplied_$i.w;
        if has_row {
            keys[weights_at + $iu] = rounded_$i;
        }
//#endfor
        let rescale = workgroupUniformLoad(&risen[0]) == step + 1u;
        if rescale {
            // The shares have been read: their memory serves, 16 x 16 for each subgroup.
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
            store_share(sum_$m_$c, subgroup * 256u, 16u);
            workgroupBarrier();
            for (var i = thread % 32u; i < 64u; i += 32u) {
                shares[subgroup * 64u + i] *= factors[$mu * 16u + i / 4u];
            }
            workgroupBarrier();
            sum_$m_$c = load_share(subgroup * 256u, 16u);
            workgroupBarrier();
//#endfor
//#endfor
        }


        // Weights x V, 16 tokens at a time.
//#for g 2
//#for m MATRIX_ROWS
        let weights_$g_$m = load_weights($mu % 2u * 16u * PITCH + WEIGHTS_AT + $mu / 2u * 32u + $gu * 16u);
//#endfor
//#for c MATRIX_COLUMNS
        let v_$g_$c = load_values($gu * 16u * PITCH + column + $cu * 16u);
//#for m MATRIX_ROWS
        sum_$m_$c = multiply_add(weights_$g_$m, v_$g_$c, sum_$m_$c);
//#endfor
//#endfor
//#endfor

        // The next keys, and where those after them are.
//#if TOUCH
//#for n TOUCHES
        touched ^= touch_$n;
//#endfor
//#endif
//#if !PREFETCH
//#for n LOADS
        let next_$n = key_vector($nu, there, place_$n);
//#endfor
//#endif
        workgroupBarrier();             // this step has been read
//#for n LOADS
        store_key(there, $nu, place_$n, next_$n);
//#endfor
        if thread < TOKENS {
            locate(third_page, third_step + thread, end, kv_head, here + thread);
            third_page = page_before(table_row, fourth_step + thread, end);
        }
        workgroupBarrier();
//#if PREFETCH
//#for n LOADS
        next_$n = key_vector($nu, here, place_$n);
//#endfor
//#endif
//#if TOUCH
//#for n TOUCHES
        touch_$n = touch(here, $nu * THREADS + thread);
//#endfor
//#endif
        step = next_step;
        next_step = third_step;
        third_step = fourth_step;
        here = there;
    }

//#if TOUCH
    if touched == 1u && params.zero != 0u {
        workspace[0] = 0.0;             // never; without a use there would be no loads
    }
//#endif
    let partial_row = slot * params.row_tiles * ROWS + (tile - params.first_row_tile) * ROWS;
    let all = row_sum(sum);
    let lse_all = row_sum(lse_sum);
    var shifted = select(top + WEIGHT_SHIFT, LOWEST, top == LOWEST);
//#if BF16
    shifted = select(UNFIT, shifted, range_fits(thread));
//#endif
    if has_row && lane == 0u {
        store_sums(partial_row + row, shifted, all, lse_all);
    }
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
    if column + $cu * 16u < params.head_dim_v {
        store_accumulators(sum_$m_$c, params.accumulators_at + (partial_row + $mu * 16u) * params.head_dim_v + column + $cu * 16u);
    }
//#endfor
//#endfor
    workgroupBarrier();                 // the next split's keys
}
