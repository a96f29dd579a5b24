// What every kernel is told about a call. Mirrored field by field in src/wgpu/params.rs.
//
// A dispatch works on a chunk: some requests, some row tiles, one window of pages. One chunk is the whole call, except
// where a tensor is larger than a binding may be: the host then binds pieces of it and dispatches once for each. That
// is also how 64-bit offsets come about without a 64-bit type: the host adds the piece's offset, in 64 bits, to the
// binding, and what is left for the kernel fits 32.

struct Params {
    // The chunk.
    first_request: u32,
    requests: u32,
    first_row_tile: u32,
    row_tiles: u32,
    first_page: u32,
    window_pages: u32,
    window: u32,
    windows: u32,
    // The problem.
    b: u32,
    s_q: u32,
    heads_per_kv: u32,
    head_dim_k: u32,
    head_dim_v: u32,
    page_size: u32,
    num_pages: u32,
    max_pages_per_seq: u32,     // columns of block_table, as far as 32-bit token counts reach
    mask: u32,
    scale_log2: f32,            // softmax_scale * log2(e): exp2 is what hardware has
    // The schedule.
    num_parts: u32,
    split_blocks: u32,          // batch-invariant split size in blocks; 0: balanced
    overhead_blocks: u32,
    // Where things are in the workspace, in words. Checked lengths are at 0.
    ends_at: u32,
    sums_at: u32,
    accumulators_at: u32,
    // Tensors: the element of the binding that the chunk starts with, then strides in elements.
    q_nope: vec4<u32>,          // request, s_q row, head
    q_pe: vec4<u32>,
    ckv: vec4<u32>,             // page, token of the page, KV head
    kpe: vec4<u32>,
    out: vec4<u32>,             // request, s_q row, head
    lse: vec4<u32>,             // request, head, s_q row
    block_table: vec2<u32>,     // request
    visible_lengths: vec2<u32>, // request
    cache_seqlens: u32,
    out_column: u32,            // stride of the last dimension of out
    subtiles: u32,              // row tiles of this kernel in one of the kernel that partial results are laid out for
    zero: u32,                  // 0, which a compiler cannot know
}

const MASK_CAUSAL: u32 = 1;
const MASK_VISIBLE_LENGTHS: u32 = 2;

// Tokens in a schedule block.
const BLOCK_TOKENS: u32 = 64;

// A checked length of a request that failed the check.
const BAD_LENGTH: u32 = 0xffffffffu;

// The plan: word 0 is the status, then num_splits [b + 1], then tile_scheduler_metadata [num_parts, 8].
const STATUS_OK: u32 = 0xffffffffu;
const NUM_SPLITS_AT: u32 = 4;

fn parts_at(b: u32) -> u32 {
    return NUM_SPLITS_AT + b + 1u;
}

// Weights are exp2(score - maximum + WEIGHT_SHIFT). WGSL may flush subnormal numbers to zero; a weight whose own value
// is subnormal, shifted, is not. Values of V up to 2^104 still cannot overflow the sum.
const WEIGHT_SHIFT: f32 = 24.0;

// Query rows of one workgroup: (s_q row, head) pairs that share a KV head, so that a key is loaded once for all.
//#if ROWS_64
const ROWS: u32 = 64;
//#elif ROWS_32
const ROWS: u32 = 32;
//#else
const ROWS: u32 = 16;
//#endif

// Words of `sums` a row.
const SUMS: u32 = 3;

@group(0) @binding(0) var<uniform> params: Params;

// A row tile, counted over all KV heads, and a row of it.
struct Row {
    exists: bool,
    kv_head: u32,
    s: u32,                     // row of s_q
    head: u32,                  // query head
}

fn row_of(tile: u32, row: u32) -> Row {
    let rows_per_kv = params.s_q * params.heads_per_kv;
    let rows_together = ROWS * params.subtiles;
    let tiles_per_kv = (rows_per_kv + rows_together - 1u) / rows_together * params.subtiles;
    let kv_head = tile / tiles_per_kv;
    let r = tile % tiles_per_kv * ROWS + row;
    return Row(r < rows_per_kv, kv_head, r / params.heads_per_kv,
               kv_head * params.heads_per_kv + r % params.heads_per_kv);
}
