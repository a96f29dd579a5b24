// Writing elements of out: undoing the weights' shift, rounding to nearest even, and halves of 32-bit words.
//
// A 16-bit element shares its word with a neighbour, which may be another invocation's or none of this tensor's. Each
// half is cleared and set by atomics that leave the other half alone; a pair that fills a word is stored at once.

//#if F32
// As bits: a number that is moved as one may be flushed too.
@group(0) @binding(3) var<storage, read_write> out: array<u32>;
//#else
@group(0) @binding(3) var<storage, read_write> out: array<atomic<u32>>;
//#endif

// Constants that WGSL does not let a program write down: they pass through memory that a compiler cannot see through.
fn nan_bits() -> u32 {
    return 0x7fc00000u | (params.zero & 1u);
}
fn infinity_bits() -> u32 {
    return 0x7f800000u | (params.zero & 0u);
}

// The bits of x * 2^-WEIGHT_SHIFT as an f32, subnormal ones too, which arithmetic might flush to zero.
fn unshifted_bits(x: f32) -> u32 {
    if abs(x) < exp2(WEIGHT_SHIFT - 126.0) {
        // A subnormal number counts units of 2^-149.
        return (bitcast<u32>(x) & 0x80000000u) | u32(round(abs(x) * exp2(64.0) * exp2(85.0 - WEIGHT_SHIFT)));
    }
    return bitcast<u32>(x * exp2(-WEIGHT_SHIFT));
}

//#if BF16
fn to_bits(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0x7fc0u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
//#endif
//#if F16
// By integers: what pack2x16float does with the last bit is left to the implementation.
fn to_bits(bits: u32) -> u32 {
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return sign | 0x7e00u;
    }
    if magnitude >= 0x477ff000u {       // 65520: rounds to infinity
        return sign | 0x7c00u;
    }
    if magnitude >= 0x38800000u {       // 2^-14: a normal number
        return sign | ((magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13u) & 1u)) >> 13u);
    }
    if magnitude < 0x33000000u {        // below 2^-25: rounds to zero
        return sign;
    }
    let shift = 126u - (magnitude >> 23u);
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let kept = mantissa >> shift;
    let rest = mantissa & ((1u << shift) - 1u);
    let half = 1u << (shift - 1u);
    return sign | (kept + u32(rest > half || (rest == half && (kept & 1u) == 1u)));
}
//#endif

//#if F32
// Two neighbouring elements, of which the second may not exist.
fn store_pair(at: u32, bad: bool, pair: vec2<f32>, second: bool) {
    out[at] = select(unshifted_bits(pair.x), nan_bits(), bad);
    if second {
        out[at + params.out_column] = select(unshifted_bits(pair.y), nan_bits(), bad);
    }
}
//#else
fn store_half(at: u32, bits: u32) {
    let shift = (at & 1u) * 16u;
    atomicAnd(&out[at >> 1u], ~(0xffffu << shift));
    atomicOr(&out[at >> 1u], bits << shift);
}

fn store_pair(at: u32, bad: bool, pair: vec2<f32>, second: bool) {
    let x = select(to_bits(unshifted_bits(pair.x)), 0x7fffu, bad);
    let y = select(to_bits(unshifted_bits(pair.y)), 0x7fffu, bad);
    if second && params.out_column == 1u && (at & 1u) == 0u {
        atomicStore(&out[at >> 1u], x | (y << 16u));
        return;
    }
    store_half(at, x);
    if second {
        store_half(at + params.out_column, y);
    }
}
//#endif
