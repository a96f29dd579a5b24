// A split by cooperative matrices: 16 x 16, f16 x f16 -> f32, each held by the 32 invocations of a subgroup together.
//
// Tile      ROWS query rows of one KV head x 16 tokens x all columns:
//             16 rows, 4 subgroups; small enough for two workgroups to fill one processor in turn
//             32 rows, 8 subgroups
//             64 rows, 8 subgroups, which have all registers; keys of two steps in memory
// Memory    A step's keys lie in shared memory, from where both products read them: global memory is read once, 16 bytes an
//           invocation. Queries stay in matrices for the whole split, sums too.
// Step      for TOKENS tokens, whose keys are in shared memory:
//             1. the next keys are asked for
//             2. scores: a subgroup multiplies 16 rows with all tokens over its share of head_dim_k's columns and leaves the
//                sums in shared memory
//             3. softmax: the shares added up; weights, as f16, to shared memory, beside the keys
//             4. out += weights x V: every subgroup has its columns of all rows in matrices. With 64 rows of the step before,
//                so that subgroups need not wait for each other's weights, and what is slow in 3 runs beside products
//             5. the next keys -> shared memory
//           A compiler waits at once for what one round of a loop hands to the next, and moves a load down into the branch
//           where it is used: what is asked for is therefore used in the same round, and a round of a kernel that is built
//           FULL has no branches. With 64 rows, where registers are short, it moves loads behind the products as well, so
//           that what they bring is waited for; that kernel is built VOLATILE.
// Softmax   Matrices cannot be scaled row by row where they are. Weights are therefore relative to a reference that is
//           2^6 below the maximum and follows only when that has risen by more than 2^8; then, rarely, matrices go
//           through shared memory. Weights from 2^-14 to 2^14 have all bits in f16.
// Needs     what the host checks: f16, or bf16 as range.wgsl has it; no more columns than below, in multiples of 8; rows
//           of tensors that begin at multiples of 8 elements. Built FULL: exactly so many columns; pages of whole steps, at
//           least one, all in one window.

//#if EMULATED
const K_COLUMNS: u32 = 192;                     // less of everything, to fit smaller memories
const COLUMNS: u32 = 128;
//#else
const K_COLUMNS: u32 = 576;                     // of head_dim_k, at most
const COLUMNS: u32 = 512;                       // of head_dim_v, at most
//#endif
const TOKENS: u32 = 16;
//#if ROWS_64
const SUBGROUP_COUNT: u32 = 8;
const SHARES: u32 = 2;
const CHAIN: u32 = K_COLUMNS / SHARES / 16u;    // products that wait for one another
const BUFFERS: u32 = 2;                         // steps whose keys are in memory
//#else
//#if ROWS_32
const SUBGROUP_COUNT: u32 = 8;
//#else
const SUBGROUP_COUNT: u32 = 4;
//#endif
const SHARES: u32 = 4;
const CHAIN: u32 = K_COLUMNS / SHARES / 48u;    // a third of what a subgroup multiplies
const BUFFERS: u32 = 1;
//#endif
const THREADS: u32 = SUBGROUP_COUNT * 32u;
// Each token has a line in shared memory: 16 bytes more than a multiple of 128, so that a matrix's rows begin in different
// banks. Once there are scores its rope columns are of no use: line t then has the weights of rows t, TOKENS + t, and so on.
const WEIGHTS_AT: u32 = COLUMNS;
const PITCH: u32 = COLUMNS + 72u;
const VECTORS: u32 = K_COLUMNS / 8u;            // of 16 bytes, a token
const STAGE_ROWS: u32 = BUFFERS * TOKENS;       // query rows that fit where keys will be
const VALUE_LOADS: u32 = TOKENS * COLUMNS / 8u / THREADS;   // of an invocation and a step: so many of V, one of the rest
const LANES: u32 = 4;                           // invocations that share a row's scores, of one subgroup: 4 tokens each
const HEADROOM: f32 = 6.0;
const MOST: f32 = 14.0;

// Which 16 rows and which share of the columns a subgroup multiplies for scores.
const ROW_TILES: u32 = ROWS / 16u;
const SHARE_COLUMNS: u32 = K_COLUMNS / SHARES;
const SHARE_PITCH: u32 = TOKENS + 4u;           // again so that rows begin in different banks

// Matrices go to and from memory that begins at a multiple of 16 bytes: nothing here or in decode.wgsl has a size that
// is not one, so that the order in which a driver lays it out does not matter.
var<workgroup> keys: array<vec4<f16>, BUFFERS * TOKENS * PITCH / 4u>;
// SHARES x ROWS x TOKENS; or 16 x 16 for each subgroup.
var<workgroup> shares: array<vec4<f32>, max(SHARES * ROWS * SHARE_PITCH, SUBGROUP_COUNT * 256u) / 4u>;
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> risen: array<u32, 4>;            // the last step, plus 1, in which a reference had to follow
//#if !FULL
// Where the tokens of this step and of the next are, in units of 16 bytes, or NOWHERE.
const SLOTS: u32 = 2u * TOKENS;
var<workgroup> ckv_tokens: array<u32, SLOTS>;
var<workgroup> kpe_tokens: array<u32, SLOTS>;
//#endif

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

// Tokens [begin, end) of a request, for one row tile; the result goes to row `slot` of the partial results.
fn decode_split(request: u32, begin: u32, end: u32, slot: u32, tile: u32, slice: u32, thread: u32) {
    let row = thread / LANES % ROWS;    // for softmax; several invocations may have the same, and then write the same
    let lane = thread % LANES;
    let subgroup = thread / 32u;
//#if EMULATED
    invocation = thread % 32u;
//#endif
    let kv_head = row_of(tile, 0u).kv_head;
    let table_row = params.block_table.x + request * params.block_table.y;
    let column = subgroup * (COLUMNS / SUBGROUP_COUNT);     // the subgroup's first column of V

    let row_tile = subgroup % ROW_TILES;
    let share = subgroup / ROW_TILES;
    let first_column = share * SHARE_COLUMNS;               // and of K

    // Whatever does not depend on other loads is asked for before anything is waited for: pages, keys, queries.
    let first = place_of(begin, table_row, end, kv_head, thread);
    var step = first.step;
    var next = place_after(first, table_row, end, kv_head, thread);
//#if FULL
//#for n LOADS
    let first_$n = key_vector($nu, first, end, thread);
//#endfor
//#endif
//#for n QUERY_LOADS
    let query_$n = query_vector($nu, thread);
//#endfor
//#if BF16
    start_range(thread);
//#for n QUERY_LOADS
    note_query(query_$n);
//#endfor
    let query_scale = scale_of_queries();
    let scale_log2 = params.scale_log2 / query_scale;
//#else
    let scale_log2 = params.scale_log2;
//#endif

    // Queries, by way of the memory that keys will have.
//#for e CHAINS
//#for q QUERY_TILES
    var q_$e_$q: MatrixA;
//#endfor
//#endfor
    for (var stage = 0u; stage < ROWS / STAGE_ROWS; stage += 1u) {
        workgroupBarrier();
//#for n QUERY_LOADS
        if query_row($nu, thread) / STAGE_ROWS == stage {
//#if BF16
            store_vector(query_row($nu, thread) % STAGE_ROWS, query_column($nu, thread), scaled_halves(query_$n, query_scale));
//#else
            store_vector(query_row($nu, thread) % STAGE_ROWS, query_column($nu, thread), halves(query_$n));
//#endif
        }
//#endfor
        workgroupBarrier();
        if row_tile * 16u / STAGE_ROWS == stage {
            let from_row = row_tile * 16u % STAGE_ROWS * PITCH + first_column;
//#for e CHAINS
//#for q QUERY_TILES
            q_$e_$q = load_queries(from_row + ($eu * CHAIN + $qu) * 16u, $eu * CHAIN + $qu);
//#endfor
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
    let row_end = min(ends[row], end);
    if thread == 0u {
        risen[0] = 0u;
    }

    workgroupBarrier();                 // queries have been read
//#if !FULL
//#for n LOADS
    let first_$n = key_vector($nu, first, end, thread);
//#endfor
//#endif
//#for n LOADS
    store_key($nu, 0u, first, end, thread, first_$n);
//#if ROWS_64
    // Before the first step there is one whose keys and weights are 0.
    store_vector(TOKENS + token_of($nu, thread), vector_of($nu, thread), array<vec4<f16>, 2>());
//#endif
//#endfor
    workgroupBarrier();
//#if ROWS_64
    var here = 0u;                      // the first of this step's tokens in shared memory
//#else
    const here = 0u;
    const there = 0u;
    // Not declared where they are set: a compiler would move the loads behind the branch that follows softmax.
//#for n LOADS
    var next_$n: vec4<u32>;
//#endfor
    var page: u32;                      // of the step after the next
//#endif
    loop {
//#if ROWS_64
        var rose = false;
//#endif
        // A loop of its own: what is rare stays outside, and so a compiler leaves the matrices where they are.
        while step < end {
//#if ROWS_64
            let page = page_of(step_after(next, table_row, end), table_row, end, thread);
            let there = TOKENS - here;  // where the step before is
//#for n LOADS
            let next_$n = key_vector($nu, next, end, thread);
//#endfor
//#else
            page = page_of(step_after(next, table_row, end), table_row, end, thread);
//#for n LOADS
            next_$n = key_vector($nu, next, end, thread);
//#endfor
//#endif

            // Scores, in CHAINS sums that do not wait for each other.
//#for e CHAINS
            var chain_$e: MatrixC;
            chain_$e = MatrixC();
//#endfor
//#for q QUERY_TILES
//#for e CHAINS
            chain_$e = multiply_add(q_$e_$q, load_keys(here * PITCH + first_column + ($eu * CHAIN + $qu) * 16u), chain_$e);
//#endfor
//#endfor
            let share_at = (share * ROWS + row_tile * 16u) * SHARE_PITCH;
//#if ROWS_64
            store_share(chain_0, share_at, SHARE_PITCH);
//#else
            store_share(plus(plus(chain_0, chain_1), chain_2), share_at, SHARE_PITCH);
//#endif
            workgroupBarrier();

            // Softmax: this lane has 4 neighbouring tokens. One that the row does not see, or that is in another window, weighs
            // exactly 0.
            let at = (row * SHARE_PITCH + lane * 4u) / 4u;
            var score = shares[at];
            for (var s = 1u; s < SHARES; s += 1u) {
                score += shares[s * ROWS * SHARE_PITCH / 4u + at];
            }
            var seen = step + lane * 4u + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(row_end);
//#if !FULL
            let entry = (next.slot ^ TOKENS) + lane * 4u;
            seen &= vec4<u32>(ckv_tokens[entry], ckv_tokens[entry + 1u], ckv_tokens[entry + 2u], ckv_tokens[entry + 3u])
                != vec4<u32>(NOWHERE);
//#endif
            score = select(vec4<f32>(LOWEST), score * scale_log2, seen);
            let highest = row_max(max(max(score.x, score.y), max(score.z, score.w)));
            let rises = (highest > top + MOST) | ((top == LOWEST) & (highest > LOWEST));
            let factor = select(1.0, exp2(top - (highest - HEADROOM)), rises);
            // Several may write: the same number. The second word is for those who have nothing to say.
            risen[select(1u, 0u, rises & (top != LOWEST))] = step + 1u;
            factors[row] = factor;
            top = select(top, highest - HEADROOM, rises);
            let weights = select(vec4<f32>(0.0), exp2(score - top), seen);
            let rounded = vec4<f16>(weights);
            let as_multiplied = vec4<f32>(rounded);
            sum = sum * factor + (as_multiplied.x + as_multiplied.y + as_multiplied.z + as_multiplied.w);
            lse_sum = lse_sum * factor + (weights.x + weights.y + weights.z + weights.w);
            keys[((here + row % TOKENS) * PITCH + WEIGHTS_AT + row / TOKENS * TOKENS + lane * 4u) / 4u] = rounded;
//#if ROWS_64
//#include "values.wgsl"
            workgroupBarrier();         // the step before has been read, this step's weights are known
            rose = risen[0] == step + 1u;
//#for n LOADS
            store_key($nu, there, next, end, thread, next_$n);
//#endfor
            step = next.step;
            next = located(step_after(next, table_row, end), page, end, kv_head, thread);
            here = there;
            workgroupBarrier();
            if rose {
                break;
            }
//#else
            workgroupBarrier();
            if risen[0] == step + 1u {
                break;
            }
//#include "values.wgsl"
//#endif
        }
//#if ROWS_64
        if !rose {
            break;
        }
//#else
        if step >= end {
            break;
        }
//#endif
        // A reference has risen. The shares have been read: their memory serves, 16 x 16 for each subgroup.
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
//#if !ROWS_64
//#include "values.wgsl"
//#endif
    }
//#if ROWS_64
    let there = TOKENS - here;          // the last step's values
//#include "values.wgsl"
//#endif

    let partial_row = slot * params.row_tiles * ROWS + (tile - params.first_row_tile) * ROWS;
    let all = row_sum(sum);
    let lse_all = row_sum(lse_sum);
    var shifted = select(top + WEIGHT_SHIFT, LOWEST, top == LOWEST);
//#if BF16
    shifted = select(UNFIT, shifted, range_fits(thread));
//#endif
    if lane == 0u {
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
