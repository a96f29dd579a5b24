// Reading elements of q and of the cache. An index counts elements from the start of the binding.
//
// WGSL has no bf16, and f16 only as an extension: both travel as pairs in 32-bit words. bf16 is the upper half of an
// f32.

//#if COOPERATIVE_MATRIX
// Eight at a time.
@group(0) @binding(1) var<storage, read> q_nope: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> q_pe: array<vec4<u32>>;
//#if VOLATILE
@group(0) @binding(3) @volatile var<storage, read> ckv: array<vec4<u32>>;
@group(0) @binding(4) @volatile var<storage, read> kpe: array<vec4<u32>>;
//#else
@group(0) @binding(3) var<storage, read> ckv: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> kpe: array<vec4<u32>>;
//#endif

// Both elements of a word.
fn both(word: u32) -> vec2<f32> {
//#if BF16
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
//#else
    return unpack2x16float(word);
//#endif
}

// The same for matrices, which are of f16: eight elements. Of bf16 see range.wgsl.
fn halves(v: vec4<u32>) -> array<vec4<f16>, 2> {
    return array<vec4<f16>, 2>(vec4<f16>(vec4<f32>(both(v.x), both(v.y))), vec4<f16>(vec4<f32>(both(v.z), both(v.w))));
}
//#elif F32
@group(0) @binding(1) var<storage, read> q_nope: array<f32>;
@group(0) @binding(2) var<storage, read> q_pe: array<f32>;
@group(0) @binding(3) var<storage, read> ckv: array<f32>;
@group(0) @binding(4) var<storage, read> kpe: array<f32>;

fn q_nope_at(i: u32) -> f32 { return q_nope[i]; }
fn q_pe_at(i: u32) -> f32 { return q_pe[i]; }
fn ckv_at(i: u32) -> f32 { return ckv[i]; }
fn kpe_at(i: u32) -> f32 { return kpe[i]; }

fn q_nope_pair(i: u32) -> vec2<f32> { return vec2<f32>(q_nope[i], q_nope[i + 1u]); }
fn q_pe_pair(i: u32) -> vec2<f32> { return vec2<f32>(q_pe[i], q_pe[i + 1u]); }
fn ckv_pair(i: u32) -> vec2<f32> { return vec2<f32>(ckv[i], ckv[i + 1u]); }
fn kpe_pair(i: u32) -> vec2<f32> { return vec2<f32>(kpe[i], kpe[i + 1u]); }
//#elif NATIVE_F16
@group(0) @binding(1) var<storage, read> q_nope: array<f16>;
@group(0) @binding(2) var<storage, read> q_pe: array<f16>;
@group(0) @binding(3) var<storage, read> ckv: array<f16>;
@group(0) @binding(4) var<storage, read> kpe: array<f16>;

fn q_nope_at(i: u32) -> f32 { return f32(q_nope[i]); }
fn q_pe_at(i: u32) -> f32 { return f32(q_pe[i]); }
fn ckv_at(i: u32) -> f32 { return f32(ckv[i]); }
fn kpe_at(i: u32) -> f32 { return f32(kpe[i]); }

fn q_nope_pair(i: u32) -> vec2<f32> { return vec2<f32>(vec2<f16>(q_nope[i], q_nope[i + 1u])); }
fn q_pe_pair(i: u32) -> vec2<f32> { return vec2<f32>(vec2<f16>(q_pe[i], q_pe[i + 1u])); }
fn ckv_pair(i: u32) -> vec2<f32> { return vec2<f32>(vec2<f16>(ckv[i], ckv[i + 1u])); }
fn kpe_pair(i: u32) -> vec2<f32> { return vec2<f32>(vec2<f16>(kpe[i], kpe[i + 1u])); }
//#else
@group(0) @binding(1) var<storage, read> q_nope: array<u32>;
@group(0) @binding(2) var<storage, read> q_pe: array<u32>;
@group(0) @binding(3) var<storage, read> ckv: array<u32>;
@group(0) @binding(4) var<storage, read> kpe: array<u32>;

// Element `i` of the pair in `word`.
fn element(word: u32, i: u32) -> f32 {
//#if BF16
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
//#else
    return unpack2x16float(select(word, word >> 16u, (i & 1u) == 1u)).x;
//#endif
}

fn q_nope_at(i: u32) -> f32 { return element(q_nope[i >> 1u], i); }
fn q_pe_at(i: u32) -> f32 { return element(q_pe[i >> 1u], i); }
fn ckv_at(i: u32) -> f32 { return element(ckv[i >> 1u], i); }
fn kpe_at(i: u32) -> f32 { return element(kpe[i >> 1u], i); }

// Both elements of a word.
fn both(word: u32) -> vec2<f32> {
//#if BF16
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
//#else
    return unpack2x16float(word);
//#endif
}

// Elements i and i + 1: one word where i is even, as it is in tensors without odd sizes.
fn q_nope_pair(i: u32) -> vec2<f32> {
    if (i & 1u) == 0u { return both(q_nope[i >> 1u]); }
    return vec2<f32>(q_nope_at(i), q_nope_at(i + 1u));
}
fn q_pe_pair(i: u32) -> vec2<f32> {
    if (i & 1u) == 0u { return both(q_pe[i >> 1u]); }
    return vec2<f32>(q_pe_at(i), q_pe_at(i + 1u));
}
fn ckv_pair(i: u32) -> vec2<f32> {
    if (i & 1u) == 0u { return both(ckv[i >> 1u]); }
    return vec2<f32>(ckv_at(i), ckv_at(i + 1u));
}
fn kpe_pair(i: u32) -> vec2<f32> {
    if (i & 1u) == 0u { return both(kpe[i >> 1u]); }
    return vec2<f32>(kpe_at(i), kpe_at(i + 1u));
}
//#endif
