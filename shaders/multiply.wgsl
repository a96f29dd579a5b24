// Matrices of 16 x 16 for matrix.wgsl, which declares the memory they come from: cooperative ones, or emulated ones.
//
// What is cooperative is held by the 32 invocations of a subgroup together. WGSL only loads, stores, adds and multiplies
// it: elements are not to be had but through memory, which must begin at a multiple of 16 bytes.

//#if EMULATED
// For tests, on adapters without such matrices. A factor is where it lies: in shared memory, or, of queries, in copies
// of the rows that an invocation needs. Invocation i has column i % 16 of a sum, in rows i / 16, i / 16 + 2, ..
struct InMemory {
    at: u32,
    row_pitch: u32,
    column_pitch: u32,
    copied: bool,
}
alias MatrixA = InMemory;
alias MatrixB = InMemory;
alias MatrixC = array<f32, 8>;

var<private> invocation: u32;                   // of the subgroup
var<private> copies: array<f32, SHARE_COLUMNS * 8u>;    // 8 rows of the subgroup's share

fn key(i: u32) -> f32 { return f32(keys[i / 4u][i % 4u]); }
fn load_queries(at: u32, q: u32) -> MatrixA {
    for (var i = params.zero; i < 128u; i += 1u) {
        copies[q * 128u + i] = key(at + (invocation / 16u + i / 16u * 2u) * PITCH + i % 16u);
    }
    return InMemory(q * 128u, 16u, 1u, true);
}
fn load_weights(at: u32) -> MatrixA { return InMemory(at, PITCH, 1u, false); }
fn load_keys(at: u32) -> MatrixB { return InMemory(at, 1u, PITCH, false); }
fn load_values(at: u32) -> MatrixB { return InMemory(at, PITCH, 1u, false); }
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var sum = c;
    for (var e = params.zero; e < 8u; e += 1u) {
        for (var k = params.zero; k < 16u; k += 1u) {
            var x: f32;
            if a.copied {
                x = copies[a.at + e * a.row_pitch + k];
            } else {
                x = key(a.at + (invocation / 16u + e * 2u) * a.row_pitch + k * a.column_pitch);
            }
            sum[e] += x * key(b.at + k * b.row_pitch + invocation % 16u * b.column_pitch);
        }
    }
    return sum;
}
fn plus(a: MatrixC, b: MatrixC) -> MatrixC {
    var x = a;
    var y = b;
    for (var e = 0u; e < 8u; e += 1u) {
        x[e] += y[e];
    }
    return x;
}
fn store_share(m: MatrixC, at: u32, pitch: u32) {
    var x = m;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        let to = at + i / 16u * pitch + i % 16u;
        shares[to / 4u][to % 4u] = x[e];
    }
}
fn load_share(at: u32, pitch: u32) -> MatrixC {
    var m: MatrixC;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        let source = at + i / 16u * pitch + i % 16u;
        m[e] = shares[source / 4u][source % 4u];
    }
    return m;
}
fn store_accumulators(m: MatrixC, at: u32) {
    var x = m;
    for (var e = 0u; e < 8u; e += 1u) {
        let i = invocation + e * 32u;
        workspace[at + i / 16u * params.head_dim_v + i % 16u] = x[e];
    }
}
//#else
alias MatrixA = coop_mat16x16<f16, A>;
alias MatrixB = coop_mat16x16<f16, B>;
alias MatrixC = coop_mat16x16<f32, C>;

// Rows of a matrix are a pitch apart (coopLoadT), or its columns (coopLoad). Pitches count what memory has been declared
// as an array of.
fn load_queries(at: u32, q: u32) -> MatrixA { return coopLoadT<MatrixA>(&keys[at / 4u], PITCH / 4u); }
fn load_weights(at: u32) -> MatrixA { return coopLoadT<MatrixA>(&keys[at / 4u], PITCH / 4u); }
fn load_keys(at: u32) -> MatrixB { return coopLoad<MatrixB>(&keys[at / 4u], PITCH / 4u); }
fn load_values(at: u32) -> MatrixB { return coopLoadT<MatrixB>(&keys[at / 4u], PITCH / 4u); }
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC { return coopMultiplyAdd(a, b, c); }
fn plus(a: MatrixC, b: MatrixC) -> MatrixC { return a + b; }
// naga 30 needs what a matrix is stored with to have been computed before.
fn store_share(m: MatrixC, at: u32, pitch: u32) {
    let to = at / 4u;
    let vectors = pitch / 4u;
    coopStoreT(m, &shares[to], vectors);
}
fn load_share(at: u32, pitch: u32) -> MatrixC { return coopLoadT<MatrixC>(&shares[at / 4u], pitch / 4u); }
fn store_accumulators(m: MatrixC, at: u32) {
    let pitch = params.head_dim_v;
    coopStoreT(m, &workspace[at], pitch);
}
//#endif
