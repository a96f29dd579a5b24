// A split by cooperative matrices: 16 x 16, f16 x f16 -> f32, each held by the 32 invocations of a subgroup together.
//
// Tile      ROWS (16, 32 or 64) query rows of one KV head x TOKENS tokens x all columns: 256 invocations, 8 subgroups.
// Memory    A tile's keys lie in shared memory, from where both products read them: global memory is read once, 16 bytes
//           an invocation at a time. 16 queries lie there too, which leaves room for several workgroups on a processor;
//           more stay in matrices for the whole split. Sums stay in matrices.
// Step      for TOKENS tokens:
//             1. out += weights x V of the tile before: each subgroup has 64 columns of all rows
//             2. keys -> shared memory; where the next ones are
//             3. scores: each subgroup multiplies 16 rows with 16 tokens or with 32 over its share of head_dim_k's
//                columns, and leaves the sums in shared memory
//             4. softmax: the shares added up; weights, as f16, beside the keys
// Softmax   Matrices cannot be scaled row by row where they are. Weights are therefore relative to a reference that
//           follows the maximum only when that has risen by more than 2^8; then, rarely, the loop is left and matrices
//           go through shared memory. Weights up to 2^8 are as precise in f16 as those up to 1.
// Needs     what the host checks: f16; no more columns than below, in multiples of 8; rows of tensors that begin at
//           multiples of 8 elements.

const SUBGROUP_COUNT: u32 = 8;
const THREADS: u32 = SUBGROUP_COUNT * 32u;
//#if LEAN
const TOKENS: u32 = 16;
const SHARE_PITCH: u32 = 16;
//#else
const TOKENS: u32 = 32;
const SHARE_PITCH: u32 = 36;                    // so that rows begin in different banks
//#endif
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
// banks. Once there are scores the rope columns are of no use: line t then has weights of rows t, TOKENS + t, ..
const PITCH: u32 = COLUMNS + 72u;
const WEIGHTS_AT: u32 = COLUMNS;
const LANES: u32 = 4;                           // invocations that share a row's scores
const LANE_TOKENS: u32 = TOKENS / LANES;        // neighbours
const MAX_RISE: f32 = 8.0;

// For scores a subgroup multiplies 16 rows with 16 tokens, or with all, over a share of head_dim_k's columns.
const ROW_TILES: u32 = ROWS / 16u;
//#if LEAN
const SHARES: u32 = 8;
const STORED_SHARES: u32 = 8;
//#elif ROWS_64
const SHARES: u32 = 2;
const STORED_SHARES: u32 = 1;                   // memory is for one: the other is added to it
//#elif ROWS_32
const SHARES: u32 = 2;
const STORED_SHARES: u32 = 2;
//#else
const SHARES: u32 = 4;
const STORED_SHARES: u32 = 4;
//#endif
const TOKENS_APART: u32 = SUBGROUP_COUNT / (ROW_TILES * SHARES);
const SHARE_COLUMNS: u32 = K_COLUMNS / SHARES;

// Matrices go to and from memory that begins at a multiple of 16 bytes: nothing here or in decode.wgsl has a size that
// is not one, so that the order in which a driver lays it out does not matter.
var<workgroup> keys: array<vec4<f16>, TOKENS * PITCH / 4u>;
//#if LEAN
var<workgroup> queries: array<vec4<f16>, ROWS * PITCH / 4u>;
//#endif
// STORED_SHARES x ROWS x TOKENS; or 16 x 16 for each subgroup.
var<workgroup> shares: array<vec4<f32>, max(STORED_SHARES * ROWS * SHARE_PITCH / 4u, 512u)>;
var<workgroup> factors: array<f32, ROWS>;
var<workgroup> risen: array<u32, 4>;            // the last tile, plus 1, in which a reference had to follow
// Where the tokens of this tile and of the next are, in units of 16 bytes, and whether they are there.
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
    source: u32,                                // 0: keys, 1: copies, 2: queries
}
alias MatrixA = InMemory;
alias MatrixB = InMemory;
alias MatrixC = array<f32, 8>;

var<private> invocation: u32;                   // of the subgroup
var<private> copies: array<f32, 768>;           // 8 rows x 16 columns for each of QUERY_TILES, which are 6 or fewer

fn key(i: u32) -> f32 { return f32(keys[i / 4u][i % 4u]); }
fn load_queries(at: u32, q: u32) -> MatrixA {
    for (var i = params.padding_1; i < 128u; i += 1u) {
        copies[q * 128u + i] = key(at + (invocation / 16u + i / 16u * 2u) * PITCH + i % 16u);
    }
    return InMemory(q * 128u, 16u, 1u, 1u);
}
fn load_query(at: u32) -> MatrixA { return InMemory(at, PITCH, 1u, 2u); }
fn load_weights(at: u32) -> MatrixA { return InMemory(at, PITCH, 1u, 0u); }
fn load_keys(at: u32) -> MatrixB { return InMemory(at, 1u, PITCH, 0u); }
fn load_values(at: u32) -> MatrixB { return InMemory(at, PITCH, 1u, 0u); }
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var sum = c;
    for (var e = params.padding_1; e < 8u; e += 1u) {
        for (var k = params.padding_1; k < 16u; k += 1u) {
            var x: f32;
            let at = a.at + (invocation / 16u + e * 2u) * a.row_pitch + k * a.column_pitch;
            if a.source == 1u {
                x = copies[a.at + e * a.row_pitch + k];
//#if LEAN
            } else if a.source == 2u {
                x = f32(queries[at / 4u][at % 4u]);
//#endif
            } else {
                x = key(at);
            }
            sum[e] += x * key(b.at + k * b.row_pitch + invocation % 16u * b.column_pitch);
        }
    }
    return sum;
}
fn plus(a: MatrixC, b: MatrixC) -> MatrixC {
    var x = a;
    var y = b;
    for (var e = 0u; e < 8u; e += 1u) {
        x[e] += y[e];
    }
    return x;
}
fn store_share(m: MatrixC, at: u32, pitch: u32) {
    var x = m;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        let to = at + i / 16u * pitch + i % 16u;
        shares[to / 4u][to % 4u] = x[e];
    }
}
fn load_share(at: u32, pitch: u32) -> MatrixC {
    var m: MatrixC;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        let source = at + i / 16u * pitch + i % 16u;
        m[e] = shares[source / 4u][source % 4u];
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
//#if LEAN
fn load_query(at: u32) -> MatrixA { return coopLoadT<MatrixA>(&queries[at / 4u], PITCH / 4u); }
//#endif
fn load_weights(at: u32) -> MatrixA { return coopLoadT<MatrixA>(&keys[at / 4u], PITCH / 4u); }
fn load_keys(at: u32) -> MatrixB { return coopLoad<MatrixB>(&keys[at / 4u], PITCH / 4u); }
fn load_values(at: u32) -> MatrixB { return coopLoadT<MatrixB>(&keys[at / 4u], PITCH / 4u); }
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC { return coopMultiplyAdd(a, b, c); }
fn plus(a: MatrixC, b: MatrixC) -> MatrixC { return a + b; }
// naga 30 needs what a matrix is stored with to have been computed before.
fn store_share(m: MatrixC, at: u32, pitch: u32) {
    let to = at / 4u;
    let vectors = pitch / 4u;
    coopStoreT(m, &shares[to], vectors);
}
fn load_share(at: u32, pitch: u32) -> MatrixC { return coopLoadT<MatrixC>(&shares[at / 4u], pitch / 4u); }
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
    // Two loads for the first 512 columns of each token; one for what is left of four.
    if n < SUBGROUP_TOKENS * 2u {
        return Vector(subgroup * SUBGROUP_TOKENS + n / 2u, n % 2u * 32u + invocation, true);
    }
    let token = (n - SUBGROUP_TOKENS * 2u) * 4u + invocation / 8u;
    return Vector(subgroup * SUBGROUP_TOKENS + token, 64u + invocation % 8u, token < SUBGROUP_TOKENS);
//#endif
}

// 16 bytes of a key; beyond head_dim_k 0.
fn key_vector(n: u32, half: u32, place: Vector) -> Eight {
    if !place.exists {
        return Eight();
    }
    let slot = half + place.token;
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
fn store_key(half: u32, place: Vector, v: Eight) {
    if place.exists {
        let slot = half + place.token;
        let exists = present[slot / 4u][slot % 4u] != 0u;
        let at = place.token * (PITCH / 4u) + place.vector * 2u;
        keys[at] = select(vec4<f16>(), first_half(v), exists);
        keys[at + 1u] = select(vec4<f16>(), second_half(v), exists);
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
    let token_tile = subgroup / ROW_TILES % TOKENS_APART;
    let share = subgroup / (ROW_TILES * TOKENS_APART);

//#if LEAN
    workgroupBarrier();
    for (var n = thread; n < ROWS * VECTORS; n += THREADS) {
        let v = query_vector(n / VECTORS, n % VECTORS);
        let at = n / VECTORS * (PITCH / 4u) + n % VECTORS * 2u;
        queries[at] = first_half(v);
        queries[at + 1u] = second_half(v);
    }
//#else
    // Queries, by way of the memory that keys will have: 32 rows at a time.
//#for q QUERY_TILES
    var q_$q: MatrixA;
//#endfor
    for (var first = 0u; first < ROWS; first += 32u) {
        workgroupBarrier();
        for (var n = thread; n < min(ROWS, 32u) * VECTORS; n += THREADS) {
            let v = query_vector(first + n / VECTORS, n % VECTORS);
            let at = n / VECTORS * (PITCH / 4u) + n % VECTORS * 2u;
            keys[at] = first_half(v);
            keys[at + 1u] = second_half(v);
        }
        workgroupBarrier();
        if row_tile / 2u == first / 32u {
            let at = row_tile % 2u * 16u * PITCH + share * SHARE_COLUMNS;
//#for q QUERY_TILES
            q_$q = load_queries(at + $qu * 16u, $qu);
//#endfor
        }
    }
    workgroupBarrier();
//#endif

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
    // Before the first tile, nothing is multiplied with nothing.
    for (var i = thread; i < TOKENS * PITCH / 4u; i += THREADS) {
        keys[i] = vec4<f16>();
    }

    var step = seek(table_row, begin, end);                 // the first token of this tile
    var step_1 = seek(table_row, step + TOKENS, end);       // and of the next
    // The last subgroup finds out where tokens are: one of the next tile an invocation.
    let locates = thread >= THREADS - TOKENS;
    let located = thread % TOKENS;
    var position = position_of(step_1 + located);
    var page = NOWHERE;
    if locates {
        let first = position_of(step + located);
        locate(page_of(table_row, first, step + located, end), first.in_page, kv_head, located);
        page = page_of(table_row, position, step_1 + located, end);
    }
//#for l LOADS
    let place_$l = vector_of($lu, subgroup, thread % 32u);
//#endfor
//#if TOUCH
    var touched = 0.0;
//#endif
    workgroupBarrier();

    var here = 0u;                      // the half of the offsets that is this tile's
    var n = 0u;
    var more = true;
    while more {
        // As long as no reference has to follow.
        loop {
            // Weights x V of the tile before.
//#if EARLY
//#for l LOADS
            let key_$l = key_vector($lu, here, place_$l);
//#endfor
//#endif
//#for g TOKEN_TILES
//#for m MATRIX_ROWS
            let weights_$g_$m = load_weights($mu * 16u % TOKENS * PITCH + WEIGHTS_AT + $mu * 16u / TOKENS * TOKENS + $gu * 16u);
//#endfor
//#for c MATRIX_COLUMNS
            let v_$g_$c = load_values($gu * 16u * PITCH + column + $cu * 16u);
//#for m MATRIX_ROWS
            sum_$m_$c = multiply_add(weights_$g_$m, v_$g_$c, sum_$m_$c);
//#endfor
//#endfor
//#endfor
            if step >= end {
                more = false;
                break;
            }

            // Keys.
//#if EARLY
//#else
//#for l LOADS
            let key_$l = key_vector($lu, here, place_$l);
//#endfor
//#endif
            workgroupBarrier();
//#for l LOADS
            store_key(here, place_$l, key_$l);
//#endfor
            let there = TOKENS - here;
            let step_2 = seek(table_row, step_1 + TOKENS, end);
            if locates {
                locate(page, position.in_page, kv_head, there + located);
                position = advance(position, step_2 + located);
                page = page_of(table_row, position, step_2 + located, end);
            }
            workgroupBarrier();
//#if TOUCH
            // Has the next tile's lines of 128 bytes brought near.
            let near = ckv[(ckv_tokens[there + thread / 8u] + thread % 8u * (COLUMNS / 64u)) * 2u].x;
            var near_kpe = f16();
            if thread < TOKENS {
                near_kpe = kpe[kpe_tokens[there + thread] * 2u].x;
            }
//#endif

            // Scores.
            let share_at = ((share % STORED_SHARES) * ROWS + row_tile * 16u) * SHARE_PITCH + token_tile * 16u;
//#if LEAN
            var score: MatrixC;
            score = MatrixC();
            for (var k = share * 16u; k < params.head_dim_k; k += SHARES * 16u) {
                score = multiply_add(load_query(k), load_keys(k), score);
            }
            store_share(score, share_at, SHARE_PITCH);
//#else
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
//#if ROWS_64
            if share == 1u {
//#for s SCORE_TILES
                store_share(score_$s, share_at + $su * 16u, SHARE_PITCH);
//#endfor
            }
            workgroupBarrier();
            if share == 0u {
//#for s SCORE_TILES
                store_share(plus(score_$s, load_share(share_at + $su * 16u, SHARE_PITCH)), share_at + $su * 16u, SHARE_PITCH);
//#endfor
            }
//#else
//#for s SCORE_TILES
            store_share(score_$s, share_at + $su * 16u, SHARE_PITCH);
//#endfor
//#endif
//#endif
//#if TOUCH
            touched += f32(near) + f32(near_kpe);
//#endif
            workgroupBarrier();

            // Softmax. A token that the row does not see, or that is in another window, weighs exactly 0.
            if has_row {
                var highest = LOWEST;
//#for i LANE_VECTORS
                var scores_$i = shares[(row * SHARE_PITCH + lane * LANE_TOKENS) / 4u + $iu];
//#for s MORE_SHARES
                scores_$i += shares[((($su + 1u) * ROWS + row) * SHARE_PITCH + lane * LANE_TOKENS) / 4u + $iu];
//#endfor
                let token_$i = step + lane * LANE_TOKENS + $iu * 4u + vec4<u32>(0u, 1u, 2u, 3u);
                let present_$i = present[(here + lane * LANE_TOKENS) / 4u + $iu];
                let seen_$i = (token_$i < vec4<u32>(ends[row])) & (present_$i != vec4<u32>(0u));
                scores_$i = select(vec4<f32>(LOWEST), scores_$i * params.scale_log2, seen_$i);
                highest = max(highest, max(max(scores_$i.x, scores_$i.y), max(scores_$i.z, scores_$i.w)));
//#endfor
                highest = row_max(highest);
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
                let weights_at = (row % TOKENS * PITCH + WEIGHTS_AT + row / TOKENS * TOKENS + lane * LANE_TOKENS) / 4u;
//#for i LANE_VECTORS
                let weight_$i = select(vec4<f32>(0.0), exp2(scores_$i - top), seen_$i);
                let rounded_$i = vec4<f16>(weight_$i);
                let as_multiplied_$i = vec4<f32>(rounded_$i);
                lse_sum += weight_$i.x + weight_$i.y + weight_$i.z + weight_$i.w;
                sum += as_multiplied_$i.x + as_multiplied_$i.y + as_multiplied_$i.z + as_multiplied_$i.w;
                keys[weights_at + $iu] = rounded_$i;
//#endfor
            }
            step = step_1;
            step_1 = step_2;
            here = there;
            n += 1u;
            workgroupBarrier();
            if risen[0] == n {
                break;
            }
        }
        if more {
            // The shares have been read: their memory serves, 16 x 16 for each subgroup.
//#for m MATRIX_ROWS
//#for c MATRIX_COLUMNS
            store_share(sum_$m_$c, subgroup * 256u, 16u);
            settle();
            for (var i = thread % 32u; i < 64u; i += 32u) {
                shares[subgroup * 64u + i] *= factors[$mu * 16u + i / 4u];
            }
            settle();
            sum_$m_$c = load_share(subgroup * 256u, 16u);
            settle();
//#endfor
//#endfor
        }
    }
//#if TOUCH
    // What was brought near must seem to be of use.
    if params.padding_1 != 0u {
        risen[0] = u32(touched);
    }
//#endif

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
