// Split-KV decode: streams the keys of a part past a tile of query rows, with a running softmax.
//
// Grid      (row tiles, parts of the schedule, slices of 512 columns of V): workgroups that read the same keys are
//           neighbours, so that all but the first find them in a cache.
// Result    accumulators, maximum and sums of weights of each row, to the workspace; combine.wgsl does the rest.
//
// This file walks over the requests and splits of a part. What is done with a split's keys is in vector.wgsl, or in
// matrix.wgsl where the device multiplies matrices.

//#if SUBGROUPS
//#if BROWSER
enable subgroups;
//#endif
//#endif
//#if NATIVE_F16
enable f16;
//#endif
//#if COOPERATIVE_MATRIX
//#if !EMULATED
enable wgpu_cooperative_matrix;
//#endif
//#endif
//#include "params.wgsl"
//#include "load.wgsl"

@group(0) @binding(5) var<storage, read> block_table: array<i32>;
@group(0) @binding(6) var<storage, read> plan: array<u32>;
@group(0) @binding(7) var<storage, read_write> workspace: array<f32>;

const LOWEST: f32 = -3.0e38;            // the maximum of no scores; finite, so that differences are defined
const UNFIT: f32 = 3.0e38;               // the maximum of a split whose numbers do not fit matrices: range.wgsl
const MAX_BLOCKS: u32 = 0x1ffffffu;     // of a request: its tokens are counted in 31 bits
const NOWHERE: u32 = 0xffffffffu;       // the offset of what is not to be read

var<workgroup> q_nope_rows: array<u32, ROWS>;           // where the tile's query rows are
var<workgroup> q_pe_rows: array<u32, ROWS>;
var<workgroup> ends: array<u32, ROWS>;                  // keys that each row sees
var<workgroup> last_ends: array<u32, 4>;                // the largest of every fourth of `ends`

// What a row of the partial results needs beside its accumulators: weights are exp2(score - top + WEIGHT_SHIFT); the
// sum that the accumulators are divided by; the sum for lse.
fn store_sums(partial_row: u32, top: f32, sum: f32, lse_sum: f32) {
    let at = params.sums_at + partial_row * SUMS;
    workspace[at] = top;
    workspace[at + 1u] = sum;
    workspace[at + 2u] = lse_sum;
}

//#if COOPERATIVE_MATRIX
//#include "matrix.wgsl"
//#else
//#include "vector.wgsl"
//#endif

//#if REMAINS
// After matrix.wgsl, with the same plan and partial results: whether it gave up a split.
var<workgroup> given_up: array<u32, 4>;
fn remains(partial_row: u32, thread: u32) -> bool {
    workgroupBarrier();
    if thread == 0u {
        given_up[0] = u32(workspace[params.sums_at + partial_row * SUMS] == UNFIT);
    }
    return workgroupUniformLoad(&given_up[0]) != 0u;
}
//#else
fn remains(partial_row: u32, thread: u32) -> bool { return true; }
//#endif

// Where the tile's query rows of a request are, and how many keys each sees; the largest of these.
fn load_rows(request: u32, tile: u32, thread: u32) -> u32 {
    workgroupBarrier();                 // the request before is done with
    if thread < ROWS {
        // Both numbers are asked for at once; what is there of a row that does not exist, or of a bad request, is not used.
        let row = row_of(tile, thread);
        let len = bitcast<u32>(workspace[request]);
        let end = bitcast<u32>(workspace[params.ends_at + request * params.s_q + min(row.s, params.s_q - 1u)]);
        let exists = row.exists && len != BAD_LENGTH;
        let q_nope_row = params.q_nope.x + request * params.q_nope.y + row.s * params.q_nope.z + row.head * params.q_nope.w;
        let q_pe_row = params.q_pe.x + request * params.q_pe.y + row.s * params.q_pe.z + row.head * params.q_pe.w;
        q_nope_rows[thread] = select(NOWHERE, q_nope_row, exists);
        q_pe_rows[thread] = q_pe_row;
        ends[thread] = select(0u, end, exists);
    }
    workgroupBarrier();
    if thread < 4u {
        var last = 0u;
        for (var r = thread; r < ROWS; r += 4u) {
            last = max(last, ends[r]);
        }
        last_ends[thread] = last;
    }
    let last = workgroupUniformLoad(&last_ends);
    return max(max(last[0], last[1]), max(last[2], last[3]));
}

@compute @workgroup_size(THREADS)
fn decode(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let part = parts_at(params.b) + group.y * 8u;
    let tile = params.first_row_tile + group.x;
    let begin_request = bitcast<i32>(plan[part]);
    let end_request = bitcast<i32>(plan[part + 1u]);
    let chunk_begin = i32(params.first_request);
    let chunk_end = chunk_begin + i32(params.requests) - 1;
    let first_slot = plan[NUM_SPLITS_AT + params.first_request];

    for (var r = max(begin_request, chunk_begin); r <= min(end_request, chunk_end); r += 1) {
        let request = u32(r) - params.first_request;
        let last = load_rows(request, tile, thread);
        // A part's first and last request may be others' too; those between are all its own.
        let starts = r == begin_request;
        let ends_here = r == end_request;
        var block = select(0u, plan[part + 2u], starts);
        let end_block = select(MAX_BLOCKS, min(plan[part + 3u], MAX_BLOCKS), ends_here);
        var slot = plan[NUM_SPLITS_AT + u32(r)] + select(0u, plan[part + 4u], starts);
        let end_slot = plan[NUM_SPLITS_AT + u32(r) + 1u];
        // Balanced parts have one split a request; batch-invariant ones are cut at every multiple of the size.
        // A split without tokens still writes that it has none.
        let size = select(params.split_blocks, MAX_BLOCKS, params.split_blocks == 0u);
        while slot < end_slot {
            let end = block + min(size, max(end_block, block) - block);
            let result = (slot - first_slot) * params.windows + params.window;
            if remains((result * params.row_tiles + tile - params.first_row_tile) * ROWS, thread) {
                decode_split(request, min(block * BLOCK_TOKENS, last), min(end * BLOCK_TOKENS, last), result, tile, group.z,
                             thread);
            }
            block = end;
            slot += 1u;
            if params.split_blocks == 0u || (ends_here && block >= end_block) {
                break;
            }
        }
    }
}
