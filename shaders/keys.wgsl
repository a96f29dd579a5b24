// Keys and queries on their way to the shared memory of matrix.wgsl, which declares it, 16 bytes at a time.

// The page of a token, in this window or beyond.
fn page_of(table_row: u32, token: u32) -> u32 {
    return u32(block_table[table_row + token / params.page_size]) - params.first_page;
}

// The first step from `first` on that has anything in this window of pages.
fn seek(table_row: u32, first: u32, end: u32) -> u32 {
    var step = first;
    if params.windows > 1u && params.page_size % TOKENS == 0u {
        while step < end && page_of(table_row, step) >= params.window_pages {
            step += TOKENS;
        }
    }
    return step;
}

// Where a token is: to slot `slot` of the offsets. Of what is not to be read the first of all is, and discarded.
fn locate(page: u32, token: u32, end: u32, kv_head: u32, slot: u32) {
    let in_page = token % params.page_size;
    let exists = token < end && page < params.window_pages;
    let ckv_at = params.ckv.x + page * params.ckv.y + in_page * params.ckv.z + kv_head * params.ckv.w;
    let kpe_at = params.kpe.x + page * params.kpe.y + in_page * params.kpe.z + kv_head * params.kpe.w;
    ckv_tokens[slot] = select(0u, ckv_at / 8u, exists);
    kpe_tokens[slot] = select(0u, kpe_at / 8u, exists);
    present[slot] = select(0u, 0xffffffffu, exists);
}

// A subgroup copies some tokens, an invocation LOADS vectors of 16 bytes: load `n` is of this token and this vector of it.
struct Vector {
    token: u32,
    vector: u32,
}
fn vector_of(n: u32, subgroup: u32, invocation: u32) -> Vector {
//#if EMULATED
    let i = n * 32u + invocation;
    return Vector(subgroup * SUBGROUP_TOKENS + i / VECTORS, i % VECTORS);
//#else
    // Two loads for the first 512 columns of each token, and one for what is left of four.
    if n < SUBGROUP_TOKENS * 2u {
        return Vector(subgroup * SUBGROUP_TOKENS + n / 2u, n % 2u * 32u + invocation);
    }
    return Vector(subgroup * SUBGROUP_TOKENS + (n - SUBGROUP_TOKENS * 2u) * 4u + invocation / 8u, 64u + invocation % 8u);
//#endif
}

// Whether load `n` is of V.
fn in_v(n: u32, place: Vector) -> bool {
//#if !FULL
    return place.vector * 8u < params.head_dim_v;
//#elif EMULATED
    return place.vector < COLUMNS / 8u;
//#else
    return n < SUBGROUP_TOKENS * 2u;
//#endif
}

// 16 bytes of a key, or of a query row; beyond head_dim_k 0.
fn key_vector(n: u32, half: u32, place: Vector) -> vec4<u32> {
    let slot = half + place.token;
//#if FULL
    if in_v(n, place) {
        return ckv[ckv_tokens[slot] + place.vector];
    }
    return kpe[kpe_tokens[slot] + place.vector - COLUMNS / 8u];
//#else
    let column = place.vector * 8u;
    if in_v(n, place) {
        return ckv[ckv_tokens[slot] + place.vector];
    }
    if column < params.head_dim_k {
        return kpe[kpe_tokens[slot] + (column - params.head_dim_v) / 8u];
    }
    return vec4<u32>(0u);
//#endif
}
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
fn store_vector(row: u32, vector: u32, v: array<vec4<f16>, 2>) {
    let at = row * (PITCH / 4u) + vector * 2u;
    keys[at] = v[0];
    keys[at + 1u] = v[1];
}
fn store_key(half: u32, n: u32, place: Vector, v: vec4<u32>) {
    let read = v & vec4<u32>(present[half + place.token]);
    let converted = halves(read);
//#if BF16
    note_range(read, converted, in_v(n, place));
//#endif
    store_vector(place.token, place.vector, converted);
}

//#if TOUCH
// A word of 32 bytes `i` of the keys: what a cache loads at once.
fn touch(half: u32, i: u32) -> u32 {
    let token = i / (VECTORS / 2u);
    let vector = i % (VECTORS / 2u) * 2u;
    if token >= TOKENS {
        return 0u;
    }
    if vector * 8u < params.head_dim_v {
        return ckv[ckv_tokens[half + token] + vector].x;
    }
    if vector * 8u < params.head_dim_k {
        return kpe[kpe_tokens[half + token] + vector - params.head_dim_v / 8u].x;
    }
    return 0u;
}
//#endif
