// bf16 by matrices of f16: what of it fits, and how it is known.
//
// Keys     are converted as they are: a bf16 number of 2^-17 to 65280 is one of f16, exactly; a smaller one is rounded to a
//          multiple of 2^-24.
// Queries  are first multiplied by a power of two that brings the largest of the tile to 2^14 .. 2^15, and scores by its
//          inverse: what is rounded is below 2^-31 of that largest, and by 2^-39 of it.
// A split  is given up, for the kernel that computes in f32 (REMAINS in decode.wgsl), where that would not do:
//            - something exceeds f16;
//            - a score could be off by more than 2^-13: 2^-25 |q|_1 scale of keys, 2^-39 max |q| |k|_1 scale of queries;
//            - V as a whole is so small, below 2^-10, that rounding to 2^-25 would show.
// Weights  are f16: below 2^-38 of the row's largest they are 0, which is not looked for.

// Bits of numbers that are not negative, which are ordered as the numbers are. The largest of K, and of V; V's words,
// all together; the largest query element.
var<workgroup> largest: array<atomic<u32>, 4>;
var<workgroup> largest_norm: array<atomic<u32>, 4>;     // in the first, the largest sum of 8 LANES elements of a query row
var<private> largest_value: f32;        // that this invocation has seen, of V
var<private> largest_rope: f32;         // and of other columns
var<private> words: u32;                // all words of V
var<private> largest_query: f32;
var<private> largest_query_norm: f32;   // the sum of elements that LANES neighbours have of a row

// Counts eight elements in, where they are of a step that there is. Without a branch: keys.wgsl says why.
fn note_range(v: vec4<u32>, exists: bool, in_v: bool) {
    let pair = max(max(abs(both(v.x)), abs(both(v.y))), max(abs(both(v.z)), abs(both(v.w))));
    let most = select(0.0, max(pair.x, pair.y), exists);
    if in_v {
        largest_value = max(largest_value, most);
        words |= select(0u, v.x | v.y | v.z | v.w, exists);
    } else {
        largest_rope = max(largest_rope, most);
    }
}

fn scaled_halves(v: vec4<u32>, factor: f32) -> array<vec4<f16>, 2> {
    return array<vec4<f16>, 2>(vec4<f16>(vec4<f32>(both(v.x), both(v.y)) * factor),
                               vec4<f16>(vec4<f32>(both(v.z), both(v.w)) * factor));
}

fn largest_of(v: vec4<f32>) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

// Before the queries of a split are counted in.
fn start_range(thread: u32) {
    largest_value = 0.0;
    largest_rope = 0.0;
    words = 0u;
    if thread < 4u {
        atomicStore(&largest[thread], 0u);
        atomicStore(&largest_norm[thread], 0u);
    }
    workgroupBarrier();
    largest_query = 0.0;
    largest_query_norm = 0.0;
}

// Counts eight elements of a query row in. LANES neighbours have neighbouring ones of the same row.
fn note_query(v: vec4<u32>) {
    let a = abs(vec4<f32>(both(v.x), both(v.y)));
    let b = abs(vec4<f32>(both(v.z), both(v.w)));
    largest_query = max(largest_query, largest_of(max(a, b)));
    largest_query_norm = max(largest_query_norm, row_sum(a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w));
}

// What the tile's queries are multiplied by.
fn scale_of_queries() -> f32 {
    atomicMax(&largest[3], bitcast<u32>(largest_query));
    atomicMax(&largest_norm[0], bitcast<u32>(largest_query_norm));
    workgroupBarrier();
    let exponent = i32(atomicLoad(&largest[3]) >> 23u) - 127;
    return bitcast<f32>(u32(clamp(14 - exponent, -100, 100) + 127) << 23u);
}

// Whether the results of the split can be used.
fn range_fits(thread: u32) -> bool {
    atomicMax(&largest[1], bitcast<u32>(largest_value));
    atomicMax(&largest[0], bitcast<u32>(max(largest_value, largest_rope)));
    atomicOr(&largest[2], words);
    workgroupBarrier();
    let key = bitcast<f32>(atomicLoad(&largest[0]));
    let value = bitcast<f32>(atomicLoad(&largest[1]));
    let query = bitcast<f32>(atomicLoad(&largest[3]));
    // As many times the largest sum as a row has such sums is not below the row's.
    let norm = bitcast<f32>(atomicLoad(&largest_norm[0])) * f32(VECTORS / LANES);
    let scale = abs(params.scale_log2);
    let has_v = (atomicLoad(&largest[2]) & 0x7fff7fffu) != 0u;
    // Not a number compares as false.
    return key <= 65280.0 && query < exp2(114.0) && norm * scale <= 2048.0 && query * key * scale <= 65536.0
        && (value >= 0.0009765625 || !has_v);
}
