// Checks what the call is about to read through, before anything is: lengths, visible lengths, block-table entries.
//
// One workgroup a request. It leaves in the workspace what decode needs: the checked length, or BAD_LENGTH, and for
// every row of s_q the number of keys that it sees, so that decode knows one kind of mask only. A bad request is
// reported in the plan's status word (the smallest one wins, so that the report does not depend on timing).

//#include "params.wgsl"

@group(0) @binding(1) var<storage, read> block_table: array<i32>;
@group(0) @binding(2) var<storage, read> cache_seqlens: array<i32>;
@group(0) @binding(3) var<storage, read> visible_lengths: array<i32>;
@group(0) @binding(4) var<storage, read_write> workspace: array<u32>;
@group(0) @binding(5) var<storage, read_write> status: array<atomic<u32>>;

const THREADS: u32 = 64;

var<workgroup> bad: atomic<u32>;

// Keys that row `s` sees of a request of `len` tokens.
fn visible_end(request: u32, s: u32, len: i32) -> i32 {
    switch params.mask {
        case MASK_CAUSAL: {
            // len - s_q + s + 1, without a sum that could overflow.
            return max(0, len - i32(params.s_q - s - 1u));
        }
        case MASK_VISIBLE_LENGTHS: {
            return visible_lengths[params.visible_lengths.x + request * params.visible_lengths.y + s];
        }
        default: {
            return len;
        }
    }
}

@compute @workgroup_size(THREADS)
fn prepare(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let request = group.x;
    let len = cache_seqlens[params.cache_seqlens + request];
    let pages = (u32(max(len, 0)) + params.page_size - 1u) / params.page_size;
    let fits = len >= 0 && pages <= params.max_pages_per_seq;
    if !fits {
        atomicStore(&bad, 1u);
    } else {
        let row = params.block_table.x + request * params.block_table.y;
        for (var i = thread; i < pages; i += THREADS) {
            let page = block_table[row + i];
            if page < 0 || u32(page) >= params.num_pages {
                atomicStore(&bad, 1u);
            }
        }
        for (var s = thread; s < params.s_q; s += THREADS) {
            let end = visible_end(request, s, len);
            if end < 0 || end > len {
                atomicStore(&bad, 1u);
            }
            workspace[params.ends_at + request * params.s_q + s] = u32(clamp(end, 0, len));
        }
    }
    workgroupBarrier();
    if thread == 0u {
        let good = atomicLoad(&bad) == 0u;
        workspace[request] = select(BAD_LENGTH, u32(len), good);
        if !good {
            atomicMin(&status[0], params.first_request + request);
        }
    }
}
