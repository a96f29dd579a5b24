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

//#if SUBGROUPS_16
const SUBGROUP_COUNT: u32 = 16;
//#else
const SUBGROUP_COUNT: u32 = 8;
//#endif
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

// For scores, a subgroup multiplies 16 rows over a share of head_dim_k's columns. Some may have none to multiply.
const ROW_TILES: u32 = ROWS / 16u;
//#if ROWS_64
const SHARES: u32 = 2;
//#elif ROWS_32
const SHARES: u32 = 4;
//#elif SUBGROUPS_16
const SHARES: u32 = 9;
//#else
const SHARES: u32 = 6;
//#endif
const SHARE_COLUMNS: u32 = K_COLUMNS / SHARES;

// Matrices go to and from memory that begins at a multiple of 16 bytes: nothing here or in decode.wgsl has a size that
// is not one, so that the order in which a driver lays it out does not matter.
var<workgroup> keys: array<vec4<f16>, 2u * BUFFER / 4u>;
var<workgroup> shares: array<vec4<f32>, max(SHARES * ROWS * 4u, 512u)>;    // x TOKENS; or 16 x 16 for each of 8 subgroups
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> risen: array<u32, 4>;            // the last tile, plus 1, in which a reference had to follow
// Where the tokens of four tiles are, in units of 16 bytes, and whether they are there.
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

// Where a token is: its column of the block table, and its place in the page.
struct Position {
    page_at: u32,
    in_page: u32,
}
fn position_of(token: u32) -> Position {
    return Position(token / params.page_size, token % params.page_size);
}

// The page of a token, in this window or beyond.
fn page_of(table_row: u32, at: Position, token: u32, end: u32) -> u32 {
    if token >= end {
        return NOWHERE;
    }
    return u32(block_table[table_row + at.page_at]) - params.first_page;
}

// The first tile from token `first` on that has anything in this window of pages.
fn seek(table_row: u32, first: u32, end: u32) -> u32 {
    var step = first;
    if params.windows > 1u && params.page_size % TOKENS == 0u {
        while step < end && page_of(table_row, position_of(step), step, end) >= params.window_pages {
            step += TOKENS;
        }
    }
    return step;
}

// The position TOKENS tokens on, or wherever the next tile of this window is.
fn advance(at: Position, token: u32) -> Position {
    if params.windows > 1u {
        return position_of(token);
    }
    var next = Position(at.page_at, at.in_page + TOKENS);       // without a division
    while next.in_page >= params.page_size {
        next.in_page -= params.page_size;
        next.page_at += 1u;
    }
    return next;
}

// Leaves where a token is in slot `slot` of the offsets. Of what is not to be read the first of all is, and discarded.
fn locate(page: u32, in_page: u32, kv_head: u32, slot: u32) {
    let exists = page < params.window_pages;
    let ckv_at = params.ckv.x + page * params.ckv.y + in_page * params.ckv.z + kv_head * params.ckv.w;
    let kpe_at = params.kpe.x + page * params.kpe.y + in_page * params.kpe.z + kv_head * params.kpe.w;
    ckv_tokens[slot] = select(0u, ckv_at / 8u, exists);
    kpe_tokens[slot] = select(0u, kpe_at / 8u, exists);
    present[slot / 4u][slot % 4u] = u32(exists);
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
fn key_vector(n: u32, tile: u32, place: Vector) -> Eight {
    if !place.exists {
        return Eight();
    }
    let slot = tile % 4u * TOKENS + place.token;
//#if FULL
//#if EMULATED
    let in_v = place.vector < COLUMNS / 8u;
//#else
    let in_v = n < SUBGROUP_TOKENS * 2u;
//#endif
    if in_v {
        return ckv_eight(ckv_tokens[slot] + place.vector);
    }
    return kpe_eight(kpe_tokens[slot] + place.vector - COLUMNS / 8u);
//#else
    let column = place.vector * 8u;
    if column < params.head_dim_v {
        return ckv_eight(ckv_tokens[slot] + place.vector);
    }
    if column < params.head_dim_k {
        return kpe_eight(kpe_tokens[slot] + (column - params.head_dim_v) / 8u);
    }
    return Eight();
//#endif
}
// 16 bytes of a query row; beyond head_dim_k, and of rows that do not exist, 0.
fn query_vector(row: u32, vector: u32) -> Eight {
    let at = q_nope_rows[row];
    let column = vector * 8u;
    if at == NOWHERE || column >= params.head_dim_k {
        return Eight();
    }
    if column < params.head_dim_v {
        return q_nope_eight((at + column) / 8u);
    }
    return q_pe_eight((q_pe_rows[row] + column - params.head_dim_v) / 8u);
}
fn store_vector(line: u32, vector: u32, v: Eight, exists: bool) {
    let at = line * (PITCH / 4u) + vector * 2u;
    keys[at] = select(vec4<f16>(), first_half(v), exists);
    keys[at + 1u] = select(vec4<f16>(), second_half(v), exists);
}
fn store_key(tile: u32, place: Vector, v: Eight) {
    if place.exists {
        let slot = tile % 4u * TOKENS + place.token;
        store_vector(tile % 2u * TOKENS + place.token, place.vector, v, present[slot / 4u][slot % 4u] != 0u);
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

// A barrier that naga lets stand where only a reader sees that all invocations pass.
fn settle() {
    workgroupBarrier();
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
    let multiplies = share < SHARES;                        // queries; all have columns of V
    let first_k = min(share, SHARES - 1u) * SHARE_COLUMNS;

    // Queries, by way of the memory that keys will have: 32 rows at a time.
//#for q QUERY_TILES
    var q_$q: MatrixA;
//#endfor
    for (var first = 0u; first < ROWS; first += 32u) {
        workgroupBarrier();
        for (var n = thread; n < min(ROWS, 32u) * VECTORS; n += THREADS) {
            store_vector(n / VECTORS, n % VECTORS, query_vector(first + n / VECTORS, n % VECTORS), true);
        }
        workgroupBarrier();
        if row_tile / 2u == first / 32u {
//#for q QUERY_TILES
            q_$q = load_queries(row_tile % 2u * BUFFER + first_k + $qu * 16u, $qu);
//#endfor
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
        keys[BUFFER / 4u + i] = vec4<f16>();
    }
    var step = seek(table_row, begin, end);                 // the first token of tile n
    var step_1 = seek(table_row, step + TOKENS, end);       // of n + 1, ..
    var step_2 = seek(table_row, step_1 + TOKENS, end);
    var step_3 = seek(table_row, step_2 + TOKENS, end);
    // The last subgroup finds out where tokens are: one of tile n + 3 an invocation.
    let locates = thread >= THREADS - TOKENS;
    let located = thread % TOKENS;
    var position = position_of(step_3 + located);
    var page = NOWHERE;
    if locates {
        let at_0 = position_of(step + located);
        let at_1 = position_of(step_1 + located);
        let at_2 = position_of(step_2 + located);
        locate(page_of(table_row, at_0, step + located, end), at_0.in_page, kv_head, located);
        locate(page_of(table_row, at_1, step_1 + located, end), at_1.in_page, kv_head, TOKENS + located);
        locate(page_of(table_row, at_2, step_2 + located, end), at_2.in_page, kv_head, 2u * TOKENS + located);
        page = page_of(table_row, position, step_3 + located, end);
    }
    workgroupBarrier();
//#for l LOADS
    let place_$l = vector_of($lu, subgroup, thread % 32u);
    var next_0_$l = key_vector($lu, 0u, place_$l);
//#if DEPTH_2
    var next_1_$l = key_vector($lu, 2u, place_$l);
//#endif
//#endfor
//#for l LOADS
    store_key(0u, place_$l, next_0_$l);
    next_0_$l = key_vector($lu, 1u, place_$l);
//#endfor
    workgroupBarrier();

    var n = 0u;
    var more = true;
    while more {
        // As long as no reference has to follow. Two tiles at a time, each with registers and memory of its own.
        loop {
//#for h 2
            if n % 2u == $hu {
                // The matrices: tile n is at `here`, tile n - 1 at `there`.
                let here_$h = $hu * BUFFER;
                let there_$h = BUFFER - $hu * BUFFER;
//#for m MATRIX_ROWS
                let weights_$h_$m = load_weights(there_$h + WEIGHTS_AT + $mu * 16u);
//#endfor
//#for c MATRIX_COLUMNS
                let v_$h_$c = load_values(there_$h + column + $cu * 16u);
//#for m MATRIX_ROWS
                sum_$m_$c = multiply_add(weights_$h_$m, v_$h_$c, sum_$m_$c);
//#endfor
//#endfor
                if step >= end {
                    more = false;
                    break;
                }
                if multiplies {
                    var score_$h: MatrixC;
                    score_$h = MatrixC();
//#for q QUERY_TILES
                    score_$h = multiply_add(q_$q, load_keys(here_$h + first_k + $qu * 16u), score_$h);
//#endfor
                    store_share(score_$h, subgroup);
                }
                let step_4_$h = seek(table_row, step_3 + TOKENS, end);
                if locates {
                    locate(page, position.in_page, kv_head, (n + 3u) % 4u * TOKENS + located);
                    position = advance(position, step_4_$h + located);
                    page = page_of(table_row, position, step_4_$h + located, end);
                }
                workgroupBarrier();

                // The tile after this one, and one after that.
//#if DEPTH_2
//#for l LOADS
                store_key(n + 1u, place_$l, next_$h_$l);
                next_$h_$l = key_vector($lu, n + 3u, place_$l);
//#endfor
//#else
//#for l LOADS
                store_key(n + 1u, place_$l, next_0_$l);
                next_0_$l = key_vector($lu, n + 2u, place_$l);
//#endfor
//#endif

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
                            risen[0] = n + 1u;      // several may write: the same number
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
                    keys[(here_$h + row % 16u * PITCH + WEIGHTS_AT + row / 16u * 16u) / 4u + lane] = rounded;
                }
                step = step_1;
                step_1 = step_2;
                step_2 = step_3;
                step_3 = step_4_$h;
                n += 1u;
                workgroupBarrier();
                if risen[0] == n {
                    break;
                }
            }
//#endfor
        }
        if more {
            // Sums of 8 subgroups at a time, 16 x 16 of each. The shares have been read: their memory serves.
            for (var first = 0u; first < SUBGROUP_COUNT; first += 8u) {
                let mine = subgroup / 8u == first / 8u;
                let at = subgroup % 8u;
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
                if mine {
                    store_share(sum_$m_$c, at);
                }
                settle();
                if mine {
                    for (var i = thread % 32u; i < 64u; i += 32u) {
                        shares[at * 64u + i] *= factors[$mu * 16u + i / 4u];
                    }
                }
                settle();
                if mine {
                    sum_$m_$c = load_share(at);
                }
                settle();
//#endfor
//#endfor
            }
        }
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
