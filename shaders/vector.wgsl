// A split by plain arithmetic, in f32.
//
// Tile      16 query rows of one KV head x 32 tokens x 512 columns of V: 128 invocations.
// Step      for 32 tokens:
//             1. where they are: block table -> offsets in shared memory
//             2. scores: 64 columns of Q and K at a time through shared memory; invocation (row, lane) has 4 tokens
//             3. softmax: the row's maximum over its 8 lanes, weights to shared memory, and the factor for what was
//                added up before the maximum rose
//             4. out += weights x V: invocation t has columns 2t, 2t + 1, 2t + 256, 2t + 257 of all 16 rows in registers

const THREADS: u32 = 128;
const TOKENS: u32 = 32;
const LANES: u32 = 8;                   // invocations that share a row's scores
const TOKENS_PER_LANE: u32 = 4;
const COLUMNS: u32 = 512;               // of V, a workgroup
const CHUNK: u32 = 16;                  // vectors of Q and K in shared memory at a time
const PITCH: u32 = 17;                  // odd, so that rows begin in different banks


var<workgroup> q_tile: array<vec4<f32>, 272>;           // ROWS x PITCH
var<workgroup> k_tile: array<vec4<f32>, 544>;           // TOKENS x PITCH
var<workgroup> weights: array<f32, 512>;                // TOKENS x ROWS
var<workgroup> factors: array<f32, 16>;
var<workgroup> lane_values: array<f32, 128>;            // ROWS x LANES
var<workgroup> ckv_tokens: array<u32, 32>;
var<workgroup> kpe_tokens: array<u32, 32>;

// Four columns of query row `r`, of which those beyond head_dim_k are 0.
fn load_q(r: u32, column: u32) -> vec4<f32> {
    let nope = q_nope_rows[r];
    let pe = q_pe_rows[r] + column - params.head_dim_v;
    if nope == NOWHERE {
        return vec4<f32>(0.0);
    }
    if column + 4u <= params.head_dim_v {
        return vec4<f32>(q_nope_pair(nope + column), q_nope_pair(nope + column + 2u));
    }
    if column >= params.head_dim_v && column + 4u <= params.head_dim_k {
        return vec4<f32>(q_pe_pair(pe), q_pe_pair(pe + 2u));
    }
    var v = vec4<f32>(0.0);             // across the end of a part
    for (var i = 0u; i < 4u; i += 1u) {
        if column + i < params.head_dim_v {
            v[i] = q_nope_at(nope + column + i);
        } else if column + i < params.head_dim_k {
            v[i] = q_pe_at(pe + i);
        }
    }
    return v;
}

// Four columns of key `t` of the step, of which those beyond head_dim_k are 0.
fn load_k(t: u32, column: u32) -> vec4<f32> {
    let nope = ckv_tokens[t];
    let pe = kpe_tokens[t] + column - params.head_dim_v;
    if nope == NOWHERE {
        return vec4<f32>(0.0);
    }
    if column + 4u <= params.head_dim_v {
        return vec4<f32>(ckv_pair(nope + column), ckv_pair(nope + column + 2u));
    }
    if column >= params.head_dim_v && column + 4u <= params.head_dim_k {
        return vec4<f32>(kpe_pair(pe), kpe_pair(pe + 2u));
    }
    var v = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i += 1u) {
        if column + i < params.head_dim_v {
            v[i] = ckv_at(nope + column + i);
        } else if column + i < params.head_dim_k {
            v[i] = kpe_at(pe + i);
        }
    }
    return v;
}

// Two columns of V of the key at offset `key`, of which those beyond head_dim_v are 0.
fn load_v(key: u32, column: u32) -> vec2<f32> {
    if column + 2u <= params.head_dim_v {
        return ckv_pair(key + column);
    }
    if column < params.head_dim_v {
        return vec2<f32>(ckv_at(key + column), 0.0);
    }
    return vec2<f32>(0.0);
}

// The largest value of the 8 lanes that share a row. `thread` is row * LANES + lane.
fn row_max(thread: u32, value: f32) -> f32 {
//#if SUBGROUPS
    // The lanes of a row are neighbours, and a subgroup has at least 8.
    var m = max(value, subgroupShuffleXor(value, 1u));
    m = max(m, subgroupShuffleXor(m, 2u));
    return max(m, subgroupShuffleXor(m, 4u));
//#else
    lane_values[thread] = value;
    workgroupBarrier();
    var m = value;
    for (var i = 0u; i < LANES; i += 1u) {
        m = max(m, lane_values[thread / LANES * LANES + i]);
    }
    return m;
//#endif
}

// Tokens [begin, end) of a request, for one row tile; the result goes to row `slot` of the partial results.
fn decode_split(request: u32, begin: u32, end: u32, slot: u32, tile: u32, slice: u32, thread: u32) {
    let row = thread / LANES;
    let lane = thread % LANES;
    let kv_head = row_of(tile, 0u).kv_head;
    let table_row = params.block_table.x + request * params.block_table.y;
    let column = slice * COLUMNS + thread * 2u;

    var accumulators: array<vec4<f32>, 16>;
    for (var r = 0u; r < ROWS; r += 1u) {
        accumulators[r] = vec4<f32>(0.0);
    }
    var top = LOWEST;                   // the row's running maximum, in powers of two
    var sum = 0.0;                      // this lane's share of the row's sum of weights

    for (var step = begin; step < end; step += TOKENS) {
        // A window of pages that has nothing of this step: pages of whole steps are looked at once.
        if params.windows > 1u && params.page_size % TOKENS == 0u {
            let page = u32(block_table[table_row + step / params.page_size]);
            if page - params.first_page >= params.window_pages {
                continue;
            }
        }
        workgroupBarrier();             // the step before has been read
        if thread < TOKENS {
            let token = step + thread;
            var ckv_offset = NOWHERE;
            var kpe_offset = NOWHERE;
            if token < end {
                let page = u32(block_table[table_row + token / params.page_size]) - params.first_page;
                let slot_in_page = token % params.page_size;
                if page < params.window_pages {
                    ckv_offset = params.ckv.x + page * params.ckv.y + slot_in_page * params.ckv.z + kv_head * params.ckv.w;
                    kpe_offset = params.kpe.x + page * params.kpe.y + slot_in_page * params.kpe.z + kv_head * params.kpe.w;
                }
            }
            ckv_tokens[thread] = ckv_offset;
            kpe_tokens[thread] = kpe_offset;
        }

        // Scores of tokens lane, lane + 8, lane + 16, lane + 24.
        var scores = vec4<f32>(0.0);
        let vectors = (params.head_dim_k + 3u) / 4u;
        for (var chunk = 0u; chunk < vectors; chunk += CHUNK) {
            workgroupBarrier();
            for (var i = thread; i < ROWS * CHUNK; i += THREADS) {
                q_tile[i / CHUNK * PITCH + i % CHUNK] = load_q(i / CHUNK, (chunk + i % CHUNK) * 4u);
            }
            for (var i = thread; i < TOKENS * CHUNK; i += THREADS) {
                k_tile[i / CHUNK * PITCH + i % CHUNK] = load_k(i / CHUNK, (chunk + i % CHUNK) * 4u);
            }
            workgroupBarrier();
            for (var i = 0u; i < min(CHUNK, vectors - chunk); i += 1u) {
                let q = q_tile[row * PITCH + i];
                scores += vec4<f32>(
                    dot(q, k_tile[lane * PITCH + i]),
                    dot(q, k_tile[(lane + LANES) * PITCH + i]),
                    dot(q, k_tile[(lane + 2u * LANES) * PITCH + i]),
                    dot(q, k_tile[(lane + 3u * LANES) * PITCH + i]),
                );
            }
        }

        // Softmax. A token that the row does not see, or that is in another window, weighs exactly 0.
        var seen: vec4<bool>;
        for (var i = 0u; i < TOKENS_PER_LANE; i += 1u) {
            let t = lane + i * LANES;
            seen[i] = step + t < ends[row] && ckv_tokens[t] != NOWHERE;
        }
        scores = select(vec4<f32>(LOWEST), scores * params.scale_log2, seen);
        let highest = max(top, row_max(thread, max(max(scores.x, scores.y), max(scores.z, scores.w))));
        let factor = exp2(top - highest);
        let weight = select(vec4<f32>(0.0), exp2(scores - highest + WEIGHT_SHIFT), seen);
        top = highest;
        sum = sum * factor + (weight.x + weight.y + weight.z + weight.w);
        for (var i = 0u; i < TOKENS_PER_LANE; i += 1u) {
            weights[(lane + i * LANES) * ROWS + row] = weight[i];
        }
        if lane == 0u {
            factors[row] = factor;
        }
        workgroupBarrier();

        // Weights x V.
        for (var r = 0u; r < ROWS; r += 1u) {
            accumulators[r] *= factors[r];
        }
        for (var t = 0u; t < TOKENS; t += 1u) {
            let key = ckv_tokens[t];
            if key == NOWHERE {
                continue;               // what lies there may be anything, and 0 x NaN is NaN
            }
            let v = vec4<f32>(load_v(key, column), load_v(key, column + COLUMNS / 2u));
            for (var r = 0u; r < ROWS; r += 1u) {
                accumulators[r] += weights[t * ROWS + r] * v;
            }
        }
    }

    // The result. The lanes' sums are added in their order.
    workgroupBarrier();
    lane_values[thread] = sum;
    workgroupBarrier();
    let partial_row = slot * params.row_tiles * ROWS + (tile - params.first_row_tile) * ROWS;
    if lane == 0u && slice == 0u {
        var all = 0.0;
        for (var i = 0u; i < LANES; i += 1u) {
            all += lane_values[row * LANES + i];
        }
        store_sums(partial_row + row, top, all, all);
    }
    for (var r = 0u; r < ROWS; r += 1u) {
        let at = params.accumulators_at + (partial_row + r) * params.head_dim_v;
        for (var i = 0u; i < 4u; i += 1u) {
            let c = column + i % 2u + i / 2u * (COLUMNS / 2u);
            if c < params.head_dim_v {
                workspace[at + c] = accumulators[r][i];
            }
        }
    }
}
