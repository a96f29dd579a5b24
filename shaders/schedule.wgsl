// The schedule on the device: get_mla_metadata of src/schedule.rs, number for number, for lengths that live there.
//
// One invocation. Where a part ends depends on where the one before did, so the plan is a short serial recurrence.
// Sums saturate; a total beyond 31 bits is reported, and its plan has no work.

//#include "params.wgsl"

@group(0) @binding(1) var<storage, read> cache_seqlens: array<i32>;
@group(0) @binding(2) var<storage, read_write> plan: array<u32>;

// Where the planner stands (everything before is handed out), and where the open part began.
var<private> part: u32;
var<private> request: u32;
var<private> block: u32;
var<private> split: u32;
var<private> begin_request: u32;
var<private> begin_block: u32;
var<private> begin_split: u32;
var<private> previous_blocks: u32;
var<private> total_splits: u32;

// Blocks of a request; an invalid length counts as none.
fn blocks_of(r: u32) -> u32 {
    let len = cache_seqlens[params.cache_seqlens + r];
    let pages = (u32(max(len, 0)) + params.page_size - 1u) / params.page_size;
    if len < 0 || pages > params.max_pages_per_seq {
        plan[0] = min(plan[0], r);
        return 0u;
    }
    return (u32(len) + BLOCK_TOKENS - 1u) / BLOCK_TOKENS;
}

fn splits_of(blocks: u32) -> u32 {
    return max(1u, blocks / params.split_blocks + u32(blocks % params.split_blocks != 0u));
}

fn saturating_add(a: u32, b: u32) -> u32 {
    return a + min(b, 0xffffffffu - a);
}

// What a request weighs: its splits, or its blocks and the overhead.
fn weight(blocks: u32) -> u32 {
    if params.split_blocks > 0u {
        return splits_of(blocks);
    }
    return saturating_add(max(blocks, 1u), params.overhead_blocks);
}

// Ends the open part here. `blocks` counts those of the request where the planner stands.
fn close_part(blocks: u32) {
    let inside = block > 0u;
    // Ending between requests means ending after the last block of the one before; -1 before the first.
    let end_request = select(i32(request) - 1, i32(request), inside);
    let end_blocks = select(previous_blocks, blocks, inside);
    let end_block = select(end_blocks, block, inside);
    var first = begin_block != 0u;
    var last = end_block != end_blocks;
    if i32(begin_request) == end_request {
        first = first || last;
        last = first;
    }
    let at = parts_at(params.b) + part * 8u;
    plan[at] = begin_request;
    plan[at + 1u] = bitcast<u32>(end_request);
    plan[at + 2u] = begin_block;
    plan[at + 3u] = end_block;
    plan[at + 4u] = begin_split;
    plan[at + 5u] = u32(first);
    plan[at + 6u] = u32(last);
    plan[at + 7u] = 0u;
    part += 1u;
    begin_request = request;
    begin_block = block;
    begin_split = split;
}

fn finish_request(blocks: u32) {
    total_splits += split;
    plan[NUM_SPLITS_AT + request + 1u] = total_splits;
    previous_blocks = blocks;
    request += 1u;
    block = 0u;
    split = 0u;
}

@compute @workgroup_size(1)
fn schedule() {
    plan[0] = STATUS_OK;
    plan[NUM_SPLITS_AT] = 0u;
    var total = 0u;
    for (var r = 0u; r < params.b; r += 1u) {
        total = saturating_add(total, weight(blocks_of(r)));
    }
    if total > 0x7fffffffu {
        plan[0] = params.b;
        for (var r = 0u; r < params.b; r += 1u) {
            plan[NUM_SPLITS_AT + r + 1u] = 0u;
        }
        request = params.b;
        begin_request = params.b;
        total = 0u;
    }
    let each = total / params.num_parts;
    let rest = total % params.num_parts;
    if params.split_blocks > 0u {
        // Splits are fixed; parts take them as evenly as can be, the first ones one more.
        var room = each + u32(0u < rest);
        while request < params.b {
            let blocks = blocks_of(request);
            let all = splits_of(blocks);
            while split < all {
                while room == 0u && part + 1u < params.num_parts {
                    close_part(blocks);
                    room = each + u32(part < rest);
                }
                if room == 0u {
                    break;      // cannot be: the parts' room is the total
                }
                let here = min(all - split, room);
                split += here;
                block += here * params.split_blocks;
                room -= here;
            }
            finish_request(blocks);
        }
    } else {
        // Equal payloads. The extra overhead pays for a request that a part takes over half done.
        let payload = each + u32(rest != 0u) + params.overhead_blocks;
        var room = payload;
        while request < params.b {
            let blocks = blocks_of(request);
            let charged = max(blocks, 1u);
            while room < charged - block + params.overhead_blocks && part + 1u < params.num_parts {
                // Cut here, unless not even one block fits beside the overhead.
                if room > params.overhead_blocks {
                    block += room - params.overhead_blocks;
                    split += 1u;
                }
                close_part(blocks);
                room = payload;
            }
            room -= charged - block + params.overhead_blocks;
            split += 1u;
            finish_request(blocks);
        }
    }
    while part < params.num_parts {
        close_part(0u);
    }
}
