// Reads a golden file: a safetensors file that holds one attention call and its expected results.

const bf16 = (bits) => new Float32Array(Uint32Array.from(bits, (x) => x << 16).buffer);

const f16 = (bits) =>
  Float32Array.from(bits, (x) => {
    const sign = x & 0x8000 ? -1 : 1;
    const exponent = (x >> 10) & 31;
    const mantissa = x & 1023;
    if (exponent === 31) return mantissa ? NaN : sign * Infinity;
    return sign * (exponent ? (1 + mantissa / 1024) * 2 ** (exponent - 15) : mantissa * 2 ** -24);
  });

/** Elements as numbers. */
export function numbers(dtype, bytes) {
  const own = bytes.slice().buffer; // aligned for any type
  switch (dtype) {
    case "BF16": return bf16(new Uint16Array(own));
    case "F16": return f16(new Uint16Array(own));
    case "F32": return new Float32Array(own);
    case "I32": return new Int32Array(own);
    default: throw new Error(`dtype ${dtype}`);
  }
}

/** One attention call: shapes, tensors as bytes, expected results, tolerances. */
export async function load(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${response.url}: ${response.status}`);
  const buffer = await response.arrayBuffer();
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensor = (name) => {
    const { dtype, shape, data_offsets: [begin, end] } = header[name];
    const bytes = new Uint8Array(buffer, 8 + length + begin, end - begin);
    return { dtype, shape, bytes, numbers: () => numbers(dtype, bytes) };
  };
  const [q, k, table, lens] = ["q", "k_cache", "block_table", "cache_seqlens"].map(tensor);
  const metadata = header.__metadata__;
  const [b, sQ, hQ, headDimK] = q.shape;
  const [numPages, pageSize, hKv] = k.shape;
  return {
    b, sQ, hQ, headDimK, numPages, pageSize, hKv,
    headDimV: Number(metadata.head_dim_v),
    maxPages: table.shape[1],
    causal: metadata.causal === "true",
    scale: Number(metadata.softmax_scale),
    dtype: q.dtype,
    q, k, table, lens,
    out: tensor("ref_out").numbers(),
    lse: tensor("ref_lse").numbers(),
    // The tolerances of tests/golden/README.md.
    tolerance: { outAbs: Number(metadata.abs_tol ?? 8e-4), outRel: 2.01 / 128, lseAbs: 1e-6, lseRel: 8.01 / 65536, cosine: 5e-6 },
  };
}

/** The largest difference and the largest part of its allowance; a mismatched infinity or a NaN uses all of it. */
function worst(values, expected, abs, rel) {
  let [difference, ratio] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    if (values[i] === expected[i]) continue;
    const d = Math.abs(values[i] - expected[i]);
    if (!Number.isFinite(d)) return { difference: NaN, ratio: Infinity };
    difference = Math.max(difference, d);
    ratio = Math.max(ratio, d / Math.max(abs, rel * Math.abs(expected[i])));
  }
  return { difference, ratio };
}

/** How far results are from the expected ones. `passed` where every difference is within `allowance` of its tolerance. */
export function compare(call, out, lse, allowance) {
  const t = call.tolerance;
  const outError = worst(out, call.out, t.outAbs, t.outRel);
  const lseError = worst(lse, call.lse, t.lseAbs, t.lseRel);
  let [dot, norms] = [0, 0];
  call.out.forEach((y, i) => {
    dot += out[i] * y;
    norms += out[i] ** 2 + y ** 2;
  });
  const cosine = norms > 0 ? Math.max(0, 1 - (2 * dot) / norms) : 0;
  const sizes = out.length === call.out.length && lse.length === call.lse.length;
  const passed = sizes && Math.max(outError.ratio, lseError.ratio, cosine / t.cosine) <= allowance;
  return { passed, out: outError, lse: lseError, cosine };
}

/** The share of each page in the attention of its request, all rows together: [request][position]. */
export function pageWeights(call) {
  const [q, k, table, lens] = [call.q, call.k, call.table, call.lens].map((t) => t.numbers());
  const { b, sQ, hQ, hKv, headDimK: d, pageSize } = call;
  return Array.from({ length: b }, (_, r) => {
    const pages = new Float64Array(Math.ceil(lens[r] / pageSize));
    for (let t = 0; t < lens[r]; t++) {
      const position = Math.floor(t / pageSize);
      const slot = table[r * call.maxPages + position] * pageSize + (t % pageSize);
      for (let s = 0; s < sQ; s++) {
        if (call.causal && t >= lens[r] - sQ + s + 1) continue;
        for (let h = 0; h < hQ; h++) {
          const key = (slot * hKv + Math.floor((h * hKv) / hQ)) * d;
          const row = ((r * sQ + s) * hQ + h) * d;
          let score = 0;
          for (let c = 0; c < d; c++) score += q[row + c] * k[key + c];
          pages[position] += Math.exp(score * call.scale - call.lse[(r * hQ + h) * sQ + s]) / (sQ * hQ);
        }
      }
    }
    return Array.from(pages);
  });
}
