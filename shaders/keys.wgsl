// Keys and queries on their way to the shared memory of matrix.wgsl, which declares it, 16 bytes at a time.
//
// Nothing here is in a branch where a kernel is built FULL: a compiler moves a load down into the branch where it is used,
// and so would not ask for a key before it needs it.

// Where the tokens of a step are.
struct Place {
    step: u32,                  // the first; `end` or more where there is none
//#if FULL
    // All of them in one page: of this column of the block table, from this token of it on.
    column: u32,
    in_page: u32,
    // This invocation's own loads of its first tokens, in units of 16 bytes.
    ckv: u32,
    kpe: u32,
//#else
    slot: u32,                  // in the tables in shared memory
//#endif
}

//#if FULL
fn place_of(begin: u32, table_row: u32, end: u32, kv_head: u32, thread: u32) -> Place {
    let place = Place(begin, begin / params.page_size, begin % params.page_size, 0u, 0u);
    return located(place, page_of(place, table_row, end, thread), end, kv_head, thread);
}
fn step_after(place: Place, table_row: u32, end: u32) -> Place {
    let in_page = place.in_page + TOKENS;
    let over = in_page >= params.page_size;
    return Place(place.step + TOKENS, place.column + u32(over), select(in_page, 0u, over), 0u, 0u);
}
// The page of a step. Of one past the end that of the last.
fn page_of(place: Place, table_row: u32, end: u32, thread: u32) -> u32 {
    let last = (max(end, 1u) - 1u) / params.page_size;
    // For all a compiler knows a different word for each invocation: for one it would wait here, to make it uniform.
    return u32(block_table[table_row + min(place.column, last) + (thread & params.zero)]);
}
// A step with the page that it is in. The block table has been checked, but where a request has no keys, what was looked
// up may be anything; some page is read then, too, to no end.
fn located(place: Place, page: u32, end: u32, kv_head: u32, thread: u32) -> Place {
    let p = min(page - params.first_page, params.window_pages - 1u);
    // Strides and offsets are multiples of 8.
    let ckv = params.ckv.x / 8u + p * (params.ckv.y / 8u) + kv_head * (params.ckv.w / 8u);
    let kpe = params.kpe.x / 8u + p * (params.kpe.y / 8u) + kv_head * (params.kpe.w / 8u);
    return Place(place.step, place.column, place.in_page,
                 ckv + (place.in_page + token_of(0u, thread)) * (params.ckv.z / 8u) + vector_of(0u, thread),
                 kpe + (place.in_page + token_of(VALUE_LOADS, thread)) * (params.kpe.z / 8u) + vector_of(VALUE_LOADS, thread)
                 - COLUMNS / 8u);
}
//#else
fn page_at(table_row: u32, token: u32) -> u32 {
    return u32(block_table[table_row + token / params.page_size]);
}
// The first step from `first` on that has anything in this window of pages.
fn seek(table_row: u32, first: u32, end: u32) -> u32 {
    var step = first;
    if params.windows > 1u && params.page_size % TOKENS == 0u {
        while step < end && page_at(table_row, step) - params.first_page >= params.window_pages {
            step += TOKENS;
        }
    }
    return step;
}
fn place_of(begin: u32, table_row: u32, end: u32, kv_head: u32, thread: u32) -> Place {
    let place = Place(seek(table_row, begin, end), 0u);
    return located(place, page_of(place, table_row, end, thread), end, kv_head, thread);
}
fn step_after(place: Place, table_row: u32, end: u32) -> Place {
    return Place(seek(table_row, place.step + TOKENS, end), (place.slot + TOKENS) % SLOTS);
}
// The page of token `thread` of a step.
fn page_of(place: Place, table_row: u32, end: u32, thread: u32) -> u32 {
    if thread < TOKENS && place.step + thread < end {
        return page_at(table_row, place.step + thread);
    }
    return 0u;
}
// Tells all invocations where a step's tokens are: known behind the next barrier.
fn located(place: Place, page: u32, end: u32, kv_head: u32, thread: u32) -> Place {
    if thread < TOKENS {
        let token = place.step + thread;
        let in_page = token % params.page_size;
        let p = page - params.first_page;
        let exists = token < end && p < params.window_pages;
        let ckv_at = params.ckv.x + p * params.ckv.y + in_page * params.ckv.z + kv_head * params.ckv.w;
        let kpe_at = params.kpe.x + p * params.kpe.y + in_page * params.kpe.z + kv_head * params.kpe.w;
        ckv_tokens[place.slot + thread] = select(NOWHERE, ckv_at / 8u, exists);
        kpe_tokens[place.slot + thread] = kpe_at / 8u;
    }
    return place;
}
//#endif
fn place_after(place: Place, table_row: u32, end: u32, kv_head: u32, thread: u32) -> Place {
    let after = step_after(place, table_row, end);
    return located(after, page_of(after, table_row, end, thread), end, kv_head, thread);
}

// Load `n` of an invocation: VALUE_LOADS for the first COLUMNS columns, then the others, which two invocations may load. Loads
// are so many tokens apart, a constant, that what they need has one address and, in the instructions, distances from it.
const TOKENS_APART: u32 = THREADS / (COLUMNS / 8u);
fn token_of(n: u32, thread: u32) -> u32 {
    if n < VALUE_LOADS {
        return thread / (COLUMNS / 8u) + n * TOKENS_APART;
    }
    return thread / 8u % TOKENS;
}
fn vector_of(n: u32, thread: u32) -> u32 {
    if n < VALUE_LOADS {
        return thread % (COLUMNS / 8u);
    }
    return COLUMNS / 8u + thread % 8u;
}

// Whether load `n` is of V.
fn in_v(n: u32, thread: u32) -> bool {
//#if FULL
    return n < VALUE_LOADS;
//#else
    return vector_of(n, thread) * 8u < params.head_dim_v;
//#endif
}

// 16 bytes of a key. Past the end, where all weighs nothing: the last token's, or 0.
fn key_vector(n: u32, place: Place, end: u32, thread: u32) -> vec4<u32> {
//#if FULL
    // How far the last token is beyond this invocation's first; negative where there is none, and sums wrap. Where they do not, what
    // is read is some other token of the cache, to no end.
    let beyond = end - 1u - place.step;
    if n < VALUE_LOADS {
        let stride = params.ckv.z / 8u;
        let last = place.ckv + (beyond - token_of(0u, thread)) * stride;
        return ckv[min(place.ckv + n * TOKENS_APART * stride, last)];
    }
    let last = place.kpe + (beyond - token_of(n, thread)) * (params.kpe.z / 8u);
    return kpe[min(place.kpe, last)];
//#else
    let token = token_of(n, thread);
    let vector = vector_of(n, thread);
    let slot = place.slot + token;
    if ckv_tokens[slot] == NOWHERE {
        return vec4<u32>(0u);
    }
    if in_v(n, thread) {
        return ckv[ckv_tokens[slot] + vector];
    }
    if vector * 8u < params.head_dim_k {
        return kpe[kpe_tokens[slot] + vector - params.head_dim_v / 8u];
    }
    return vec4<u32>(0u);
//#endif
}
fn store_vector(row: u32, vector: u32, v: array<vec4<f16>, 2>) {
    let at = row * (PITCH / 4u) + vector * 2u;
    keys[at] = v[0];
    keys[at + 1u] = v[1];
}
// To the keys that begin with token `to` of shared memory.
fn store_key(n: u32, to: u32, place: Place, end: u32, thread: u32, v: vec4<u32>) {
    let converted = halves(v);
//#if BF16
    note_range(v, place.step < end, in_v(n, thread));
//#endif
    store_vector(to + token_of(n, thread), vector_of(n, thread), converted);
}

// Load `n` of queries of an invocation, 16 bytes: first of the COLUMNS columns that V has, too, then of the others.
const QUERY_V_LOADS: u32 = ROWS * COLUMNS / 8u / THREADS;
fn query_row(n: u32, thread: u32) -> u32 {
    if n < QUERY_V_LOADS {
        return thread / (COLUMNS / 8u) + n * TOKENS_APART;
    }
    return thread / 8u + (n - QUERY_V_LOADS) * (THREADS / 8u);
}
fn query_column(n: u32, thread: u32) -> u32 {
    if n < QUERY_V_LOADS {
        return thread % (COLUMNS / 8u);
    }
    return COLUMNS / 8u + thread % 8u;
}
fn query_vector(n: u32, thread: u32) -> vec4<u32> {
    let row = query_row(n, thread);
    let at = q_nope_rows[row];
    let column = query_column(n, thread) * 8u;
//#if FULL
    let none = at == NOWHERE;
    if n < QUERY_V_LOADS {
        return select(q_nope[select((at + column) / 8u, 0u, none)], vec4<u32>(0u), none);
    }
    return select(q_pe[select((q_pe_rows[row] + column - COLUMNS) / 8u, 0u, none)], vec4<u32>(0u), none);
//#else
    if at == NOWHERE || column >= params.head_dim_k {
        return vec4<u32>(0u);
    }
    if column < params.head_dim_v {
        return q_nope[(at + column) / 8u];
    }
    return q_pe[(q_pe_rows[row] + column - params.head_dim_v) / 8u];
//#endif
}
