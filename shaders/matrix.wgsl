// A split by cooperative matrices: 16 x 16, f16 x f16 -> f32, each held by the 32 invocations of a subgroup together.
//
// Tile      ROWS (16, 32 or 64) query rows of one KV head x 16 tokens x all columns: 256 invocations, 8 subgroups.
// Memory    Two tiles of keys lie in shared memory, from where both products read them: global memory is read once, 16
//           bytes an invocation at a time. Queries stay in matrices for the whole split, sums too.
// Pipeline  A tile passes through four stages, and three tiles are under way:
//             1. asked for, into registers
//             2. from there to shared memory
//             3. scores: each subgroup multiplies 16 rows with the tile over its share of head_dim_k's columns and leaves
//                the sums in shared memory; softmax adds the shares up and leaves weights, as f16, beside the keys
//             4. out += weights x V: each subgroup has 64 columns of all rows in matrices
//           Between barriers, matrices are multiplied (4 of tile n - 1, 3 of tile n), and then the rest is done (softmax
//           of tile n, 2 of tile n + 1, 1 of tile n + 2).
// Softmax   Matrices cannot be scaled row by row where they are. Weights are therefore relative to a reference that
//           follows the maximum only when that has risen by more than 2^8; then, rarely, matrices go through shared
//           memory. Weights up to 2^8 are as precise in f16 as those up to 1.
// Needs     what the host checks: f16; no more columns than below, in multiples of 8; rows of tensors that begin at
//           multiples of 8 elements.

const SUBGROUP_COUNT: u32 = 8;
const THREADS: u32 = SUBGROUP_COUNT * 32u;
const TOKENS: u32 = 16;
//#if EMULATED
const K_COLUMNS: u32 = 192;                     // less of everything, to fit smaller memories
const COLUMNS: u32 = 128;
//#else
const K_COLUMNS: u32 = 576;                     // of head_dim_k, at most
const COLUMNS: u32 = 512;                       // of head_dim_v, at most
//#endif
const VECTORS: u32 = K_COLUMNS / 8u;            // of 16 bytes, a token
const SUBGROUP_TOKENS: u32 = TOKENS / SUBGROUP_COUNT;   // that a subgroup copies
// A token's columns in shared memory. 16 bytes more than a multiple of 128, so that a matrix's rows begin in different
// banks. Once there are scores the rope columns are of no use: line t then has weights of rows t, 16 + t, ..
const PITCH: u32 = COLUMNS + 72u;
const WEIGHTS_AT: u32 = COLUMNS;
const BUFFER: u32 = TOKENS * PITCH;             // from one tile to the other
const LANES: u32 = 4;                           // invocations that share a row's scores: 4 neighbouring tokens each
const MAX_RISE: f32 = 8.0;

// Each subgroup multiplies 16 rows over a share of the 16-column tiles of head_dim_k.
const ROW_TILES: u32 = ROWS / 16u;
const SHARES: u32 = SUBGROUP_COUNT / ROW_TILES;
const K_TILES: u32 = K_COLUMNS / 16u;

// Matrices go to and from memory that begins at a multiple of 16 bytes: nothing here or in decode.wgsl has a size that
// is not one, so that the order in which a driver lays it out does not matter.
var<workgroup> keys: array<vec4<f16>, 2u * BUFFER / 4u>;
var<workgroup> shares: array<vec4<f32>, 512>;   // SHARES x ROWS x TOKENS; or 16 x 16 for each subgroup
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> risen: array<u32, 4>;            // the last tile, plus 1, in which a reference had to follow
// Where the tokens of four tiles are, in units of 16 bytes, and whether they are there: all bits or none.
var<workgroup> ckv_tokens: array<u32, 64>;
var<workgroup> kpe_tokens: array<u32, 64>;
var<workgroup> present: array<vec4<u32>, 16>;

//#if EMULATED
// For tests, on adapters without such matrices. A factor is where it lies: in shared memory, or, of queries, in copies
// of the rows that an invocation needs. Invocation i has column i % 16 of a sum, in rows i / 16, i / 16 + 2, ..
struct InMemory {
    at: u32,
    row_pitch: u32,
    column_pitch: u32,
    copied: bool,
}
alias MatrixA = InMemory;
alias MatrixB = InMemory;
alias MatrixC = array<f32, 8>;

var<private> invocation: u32;                   // of the subgroup
var<private> copies: array<f32, 768>;           // 8 rows x 16 columns for each of QUERY_TILES

fn key(i: u32) -> f32 { return f32(keys[i / 4u][i % 4u]); }
fn load_queries(at: u32, q: u32) -> MatrixA {
    for (var i = params.padding_1; i < 128u; i += 1u) {
        copies[q * 128u + i] = key(at + (invocation / 16u + i / 16u * 2u) * PITCH + i % 16u);
    }
    return InMemory(q * 128u, 16u, 1u, true);
}
fn load_weights(at: u32) -> MatrixA { return InMemory(at, PITCH, 1u, false); }
fn load_keys(at: u32) -> MatrixB { return InMemory(at, 1u, PITCH, false); }
fn load_values(at: u32) -> MatrixB { return InMemory(at, PITCH, 1u, false); }
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var sum = c;
    for (var e = params.padding_1; e < 8u; e += 1u) {
        for (var k = params.padding_1; k < 16u; k += 1u) {
            var x: f32;
            if a.copied {
                x = copies[a.at + e * a.row_pitch + k];
            } else {
                x = key(a.at + (invocation / 16u + e * 2u) * a.row_pitch + k * a.column_pitch);
            }
            sum[e] += x * key(b.at + k * b.row_pitch + invocation % 16u * b.column_pitch);
        }
    }
    return sum;
}
fn store_share(m: MatrixC, share: u32) {
    var x = m;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        shares[share * 64u + i / 4u][i % 4u] = x[e];
    }
}
fn load_share(share: u32) -> MatrixC {
    var m: MatrixC;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        m[e] = shares[share * 64u + i / 4u][i % 4u];
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

// Rows of a matrix are a pitch apart (coopLoadT), or its columns (coopLoad). Pitches count what memory has been declared
// as an array of.
fn load_queries(at: u32, q: u32) -> MatrixA { return coopLoadT<MatrixA>(&keys[at / 4u], PITCH / 4u); }
fn load_weights(at: u32) -> MatrixA { return coopLoadT<MatrixA>(&keys[at / 4u], PITCH / 4u); }
fn load_keys(at: u32) -> MatrixB { return coopLoad<MatrixB>(&keys[at / 4u], PITCH / 4u); }
fn load_values(at: u32) -> MatrixB { return coopLoadT<MatrixB>(&keys[at / 4u], PITCH / 4u); }
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC { return coopMultiplyAdd(a, b, c); }
// Of shares[16 * 4 * share], 16 x 16. naga 30 needs what a matrix is stored with to have been computed before.
fn store_share(m: MatrixC, share: u32) {
    let at = share * 64u;
    coopStoreT(m, &shares[at], 4u);
}
fn load_share(share: u32) -> MatrixC { return coopLoadT<MatrixC>(&shares[share * 64u], 4u); }
fn store_accumulators(m: MatrixC, at: u32) {
    let pitch = params.head_dim_v;
    coopStoreT(m, &workspace[at], pitch);
}
//#endif

// The page of a token, in this window or beyond.
fn page_of(table_row: u32, token: u32, end: u32) -> u32 {
    if token >= end {
        return NOWHERE;
    }
    return u32(block_table[table_row + token / params.page_size]) - params.first_page;
}

// The first tile from token `first` on that has anything in this window of pages.
fn seek(table_row: u32, first: u32, end: u32) -> u32 {
    var step = first;
    if params.windows > 1u && params.page_size % TOKENS == 0u {
        while step < end && page_of(table_row, step, end) >= params.window_pages {
            step += TOKENS;
        }
    }
    return step;
}

// Where a token is: to slot `slot` of the offsets. Of what is not to be read the first of all is, and discarded.
fn locate(page: u32, token: u32, kv_head: u32, slot: u32) {
    let in_page = token % params.page_size;
    let exists = page < params.window_pages;
    let ckv_at = params.ckv.x + page * params.ckv.y + in_page * params.ckv.z + kv_head * params.ckv.w;
    let kpe_at = params.kpe.x + page * params.kpe.y + in_page * params.kpe.z + kv_head * params.kpe.w;
    ckv_tokens[slot] = select(0u, ckv_at / 8u, exists);
    kpe_tokens[slot] = select(0u, kpe_at / 8u, exists);
    present[slot / 4u][slot % 4u] = select(0u, 0xffffffffu, exists);
}

// A subgroup copies SUBGROUP_TOKENS tokens, an invocation LOADS vectors of 16 bytes: load `n` is of this token and this
// vector of it, if that exists.
struct Vector {
    token: u32,
    vector: u32,
    exists: bool,
}
fn vector_of(n: u32, subgroup: u32, invocation: u32) -> Vector {
//#if EMULATED
    let i = n * 32u + invocation;
    return Vector(subgroup * SUBGROUP_TOKENS + i / VECTORS, i % VECTORS, i < SUBGROUP_TOKENS * VECTORS);
//#else
    // Two loads for the first 512 columns of each token, and one for what is left of all.
    if n < SUBGROUP_TOKENS * 2u {
        return Vector(subgroup * SUBGROUP_TOKENS + n / 2u, n % 2u * 32u + invocation, true);
    }
    return Vector(subgroup * SUBGROUP_TOKENS + invocation / 8u, 64u + invocation % 8u, invocation < SUBGROUP_TOKENS * 8u);
//#endif
}

// 16 bytes of a key; beyond head_dim_k 0.
fn key_vector(n: u32, tile: u32, place: Vector) -> vec4<u32> {
    if !place.exists {
        return vec4<u32>(0u);
    }
    let slot = tile % 4u * TOKENS + place.token;
//#if FULL
//#if EMULATED
    let in_v = place.vector < COLUMNS / 8u;
//#else
    let in_v = n < SUBGROUP_TOKENS * 2u;
//#endif
    if in_v {
        return ckv[ckv_tokens[slot] + place.vector];
    }
    return kpe[kpe_tokens[slot] + place.vector - COLUMNS / 8u];
//#else
    let column = place.vector * 8u;
    if column < params.head_dim_v {
        return ckv[ckv_tokens[slot] + place.vector];
    }
    if column < params.head_dim_k {
        return kpe[kpe_tokens[slot] + (column - params.head_dim_v) / 8u];
    }
    return vec4<u32>(0u);
//#endif
}
// 16 bytes of a query row; beyond head_dim_k, and of rows that do not exist, 0.
fn query_vector(row: u32, vector: u32) -> vec4<u32> {
    let at = q_nope_rows[row];
    let column = vector * 8u;
    if at == NOWHERE || column >= params.head_dim_k {
        return vec4<u32>(0u);
    }
    if column < params.head_dim_v {
        return q_nope[(at + column) / 8u];
    }
    return q_pe[(q_pe_rows[row] + column - params.head_dim_v) / 8u];
}
fn store_vector(line: u32, vector: u32, v: vec4<u32>) {
    let at = line * (PITCH / 4u) + vector * 2u;
    keys[at] = vec4<f16>(halves(v.x), halves(v.y));
    keys[at + 1u] = vec4<f16>(halves(v.z), halves(v.w));
}
fn store_key(tile: u32, place: Vector, v: vec4<u32>) {
    if place.exists {
        let slot = tile % 4u * TOKENS + place.token;
        let there = vec4<u32>(present[slot / 4u][slot % 4u]);
        store_vector(tile % 2u * TOKENS + place.token, place.vector, v & there);
    }
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
    let share = subgroup / ROW_TILES;
    let first_k = share * K_TILES / SHARES * 16u;           // and of K
    let stored_share = share * ROW_TILES + row_tile;

    // Queries, by way of the memory that keys will have: 32 rows at a time.
//#for q QUERY_TILES
    var q_$q: MatrixA;
//#endfor
//#if ODD_TILES
    var q_more: MatrixA;                // every other subgroup has one tile of columns more
    let has_more = share % 2u == 1u;
//#endif
    for (var first = 0u; first < ROWS; first += 32u) {
        workgroupBarrier();
        for (var n = thread; n < min(ROWS, 32u) * VECTORS; n += THREADS) {
            store_vector(n / VECTORS, n % VECTORS, query_vector(first + n / VECTORS, n % VECTORS));
        }
        workgroupBarrier();
        if row_tile / 2u == first / 32u {
//#for q QUERY_TILES
            q_$q = load_queries(row_tile % 2u * BUFFER + first_k + $qu * 16u, $qu);
//#endfor
//#if ODD_TILES
            q_more = load_queries(row_tile % 2u * BUFFER + first_k + (K_TILES / SHARES) * 16u, K_TILES / SHARES);
//#endif
        }
    }
    workgroupBarrier();

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

    // Tile n is multiplied with queries. Tile n - 1 is multiplied with weights: before the first, nothing with nothing.
    for (var i = thread; i < BUFFER / 4u; i += THREADS) {
        keys[BUFFER / 4u + i] = vec4<f16>(0.0);
    }
    var step = seek(table_row, begin, end);                 // the first token of tile n
    var step_1 = seek(table_row, step + TOKENS, end);       // of n + 1
    var step_2 = seek(table_row, step_1 + TOKENS, end);     // of n + 2
    var page_2 = NOWHERE;               // of invocation t: the page of token t of tile n + 2
    if thread < TOKENS {
        locate(page_of(table_row, step + thread, end), step + thread, kv_head, thread);
        locate(page_of(table_row, step_1 + thread, end), step_1 + thread, kv_head, TOKENS + thread);
        page_2 = page_of(table_row, step_2 + thread, end);
    }
    workgroupBarrier();
//#for l LOADS
    let place_$l = vector_of($lu, subgroup, thread % 32u);
    var next_$l = key_vector($lu, 0u, place_$l);
//#endfor
//#for l LOADS
    store_key(0u, place_$l, next_$l);
    next_$l = key_vector($lu, 1u, place_$l);
//#endfor
    workgroupBarrier();

    for (var n = 0u; ; n += 1u) {
        // The matrices.
        let there = (n + 1u) % 2u * BUFFER;                 // tile n - 1
        let here = n % 2u * BUFFER;
//#for m MATRIX_ROWS
        let weights_$m = load_weights(there + WEIGHTS_AT + $mu * 16u);
//#endfor
        var score: MatrixC;
        score = MatrixC();
//#for q QUERY_TILES
        score = multiply_add(q_$q, load_keys(here + first_k + $qu * 16u), score);
//#endfor
//#if ODD_TILES
        if has_more {
            score = multiply_add(q_more, load_keys(here + first_k + (K_TILES / SHARES) * 16u), score);
        }
//#endif
//#for c MATRIX_COLUMNS
        let v_$c = load_values(there + column + $cu * 16u);
//#for m MATRIX_ROWS
        sum_$m_$c = multiply_add(weights_$m, v_$c, sum_$m_$c);
//#endfor
//#endfor
        if step >= end {
            break;
        }
        store_share(score, stored_share);
        let step_3 = seek(table_row, step_2 + TOKENS, end);
        if thread < TOKENS {
            locate(page_2, step_2 + thread, kv_head, (n + 2u) % 4u * TOKENS + thread);
            page_2 = page_of(table_row, step_3 + thread, end);
        }
        workgroupBarrier();

        // The tile after this one, and the one after that.
//#for l LOADS
        store_key(n + 1u, place_$l, next_$l);
        next_$l = key_vector($lu, n + 2u, place_$l);
//#endfor

        // Softmax. A token that the row does not see, or that is in another window, weighs exactly 0.
        if has_row {
            let at = row * LANES + lane;
            var scores = shares[at];
//#for s MORE_SHARES
            scores += shares[($su + 1u) * ROWS * LANES + at];
//#endfor
            let token = step + lane * 4u + vec4<u32>(0u, 1u, 2u, 3u);
            let seen = (token < vec4<u32>(ends[row])) & (present[n % 4u * LANES + lane] != vec4<u32>(0u));
            scores = select(vec4<f32>(LOWEST), scores * params.scale_log2, seen);
            let highest = row_max(max(max(scores.x, scores.y), max(scores.z, scores.w)));
            var factor = 1.0;
            if highest > top + MAX_RISE || (top == LOWEST && highest > LOWEST) {
                factor = exp2(top - highest);
                if top != LOWEST {
                    risen[0] = n + 1u;  // several may write: the same number
                }
                top = highest;
                sum *= factor;
                lse_sum *= factor;
            }
            if lane == 0u {
                factors[row] = factor;
            }
            let weights = select(vec4<f32>(0.0), exp2(scores - top), seen);
            let rounded = vec4<f16>(weights);
            let as_multiplied = vec4<f32>(rounded);
            lse_sum += weights.x + weights.y + weights.z + weights.w;
            sum += as_multiplied.x + as_multiplied.y + as_multiplied.z + as_multiplied.w;
            keys[(here + row % 16u * PITCH + WEIGHTS_AT + row / 16u * 16u) / 4u + lane] = rounded;
        }
        if workgroupUniformLoad(&risen[0]) == n + 1u {
            // The shares have been read: their memory serves.
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
            store_share(sum_$m_$c, subgroup);
            workgroupBarrier();
            for (var i = thread % 32u; i < 64u; i += 32u) {
                shares[subgroup * 64u + i] *= factors[$mu * 16u + i / 4u];
            }
            workgroupBarrier();
            sum_$m_$c = load_share(subgroup);
            workgroupBarrier();
//#endfor
//#endfor
        }
        step = step_1;
        step_1 = step_2;
        step_2 = step_3;
    }

    let partial_row = slot * params.row_tiles * ROWS + (tile - params.first_row_tile) * ROWS;
    let all = row_sum(sum);
    let lse_all = row_sum(lse_sum);
    if has_row && lane == 0u {
        store_sums(partial_row + row, select(top + WEIGHT_SHIFT, LOWEST, top == LOWEST), all, lse_all);
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
