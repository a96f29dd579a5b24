// MLA decoding on a GPUDevice: what src/wgpu/ does in Rust, for tensors without gaps that fit one binding each.

import { source } from "./template.js";

// For each kernel, whether its storage bindings, from 1 on, are only read. Parameters are at 0.
const KERNELS = {
  schedule: [true, false],
  prepare: [true, true, true, false, false],
  decode: [true, true, true, true, true, true, false],
  combine: [true, true, false, false],
};
const DEFINES = { plain: [], subgroups: ["SUBGROUPS", "BROWSER"], f16: ["SUBGROUPS", "BROWSER", "NATIVE_F16"] };
const ELEMENTS = { BF16: "BF16", F16: "F16", F32: "F32" };
const ROWS = 16;
const COLUMNS = 512;
const PARAMS_STRIDE = 256;
const STATUS_OK = 0xffffffff;

const up = (n, multiple) => Math.ceil(n / multiple) * multiple;

/** The paths that an adapter offers for an element type, plainest first. */
export function paths(adapter, dtype) {
  const subgroups = adapter.features.has("subgroups") && (adapter.info?.subgroupMinSize ?? 0) >= 8;
  const f16 = subgroups && adapter.features.has("shader-f16") && dtype === "F16";
  return ["plain", ...(subgroups ? ["subgroups"] : []), ...(f16 ? ["f16"] : [])];
}

/** A device with the features that the paths make use of, and the limits that every implementation grants. */
export function requestDevice(adapter) {
  const wanted = ["subgroups", "shader-f16"].filter((feature) => adapter.features.has(feature));
  return adapter.requestDevice({ requiredFeatures: wanted });
}

async function compile(device, files, kernel, defines) {
  const code = source(kernel, files, defines);
  const module = device.createShaderModule({ label: kernel, code });
  const { messages } = await module.getCompilationInfo();
  const errors = messages.filter(({ type }) => type === "error");
  if (errors.length > 0) {
    const { lineNum, message } = errors[0];
    throw new Error(`${kernel}.wgsl, line ${lineNum} (${code.split("\n")[lineNum - 1]?.trim()}): ${message}`);
  }
  const buffer = (binding, type, hasDynamicOffset) =>
    ({ binding, visibility: GPUShaderStage.COMPUTE, buffer: { type, hasDynamicOffset } });
  const storage = KERNELS[kernel].map((readOnly, i) => buffer(i + 1, readOnly ? "read-only-storage" : "storage", false));
  const layout = device.createBindGroupLayout({ entries: [buffer(0, "uniform", true), ...storage] });
  const pipeline = await device.createComputePipelineAsync({
    layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
    compute: { module, entryPoint: kernel },
  });
  return { pipeline, layout };
}

/** `Params` of shaders/params.wgsl, field by field. */
function paramsOf(call, numParts, overheadBlocks, at) {
  const bytes = new ArrayBuffer(224);
  const [u32, f32] = [new Uint32Array(bytes), new Float32Array(bytes)];
  const { b, sQ, hQ, hKv, headDimK: dK, headDimV: dV, pageSize, numPages, maxPages } = call;
  const tiles = hKv * Math.ceil((sQ * (hQ / hKv)) / ROWS);
  u32.set([
    0, b, 0, tiles, // first_request, requests, first_row_tile, row_tiles
    0, numPages, 0, 1, // first_page, window_pages, window, windows
    b, sQ, hQ / hKv, dK, dV, pageSize, numPages, maxPages,
    call.causal ? 1 : 0, 0, // mask; scale_log2 follows
    numParts, 0, overheadBlocks, // num_parts, split_blocks, overhead_blocks
    at.ends, at.sums, at.accumulators,
    0, sQ * hQ * dK, hQ * dK, dK, // q_nope
    dV, sQ * hQ * dK, hQ * dK, dK, // q_pe: the columns from head_dim_v on
    0, pageSize * hKv * dK, hKv * dK, dK, // ckv
    dV, pageSize * hKv * dK, hKv * dK, dK, // kpe
    0, sQ * hQ * dV, hQ * dV, dV, // out
    0, hQ * sQ, sQ, 1, // lse
    0, maxPages, // block_table
    0, 0, // visible_lengths
    0, 1, // cache_seqlens, out_column
    1, 0, // subtiles, zero
  ]);
  f32[17] = call.scale * Math.LOG2E;
  return { bytes, tiles };
}

/** Decodes a call (see golden.js). Returns out and lse as bytes, the plan, and the time of the work in ms. */
export async function decode(device, files, call, { path = "plain", numParts = 8, overheadBlocks = 1 } = {}) {
  const lost = device.lost.then(({ message }) => { throw new Error(`the device was lost: ${message}`); });
  device.pushErrorScope("validation");
  device.pushErrorScope("out-of-memory");

  const { b, sQ, hQ, hKv, headDimV } = call;
  const defines = [...DEFINES[path], ELEMENTS[call.dtype]];
  const names = Object.keys(KERNELS);
  const compiled = await Promise.all(names.map((name) => compile(device, files, name, defines)));
  const kernels = Object.fromEntries(names.map((name, i) => [name, compiled[i]]));

  // Where things are in the workspace, in words: lengths, visible ends, sums, accumulators.
  const rows = (b + numParts) * hKv * Math.ceil((sQ * (hQ / hKv)) / ROWS) * ROWS;
  const sums = up(b + b * sQ, 4);
  const at = { ends: b, sums, accumulators: up(sums + rows * 3, 4) };
  const { bytes: params, tiles } = paramsOf(call, numParts, overheadBlocks, at);

  const { STORAGE, COPY_SRC, COPY_DST, UNIFORM, MAP_READ } = GPUBufferUsage;
  const buffer = (size, usage = STORAGE | COPY_SRC | COPY_DST) => device.createBuffer({ size: up(Math.max(size, 16), 16), usage });
  const upload = (bytes) => {
    const to = buffer(bytes.byteLength);
    const padded = new Uint8Array(up(bytes.byteLength, 4));
    padded.set(bytes);
    device.queue.writeBuffer(to, 0, padded);
    return to;
  };
  const [q, k, table, lens] = [call.q, call.k, call.table, call.lens].map(({ bytes }) => upload(bytes));
  const planWords = 4 + b + 1 + numParts * 8;
  const elementBytes = call.dtype === "F32" ? 4 : 2;
  const [plan, workspace, none] = [buffer(planWords * 4), buffer((at.accumulators + rows * headDimV) * 4), buffer(16)];
  const [out, lse] = [buffer(b * sQ * hQ * headDimV * elementBytes), buffer(b * hQ * sQ * 4)];
  const uniform = buffer(PARAMS_STRIDE, UNIFORM | COPY_DST);
  device.queue.writeBuffer(uniform, 0, params);

  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  const dispatch = (name, buffers, groups) => {
    const { pipeline, layout } = kernels[name];
    const entries = [{ buffer: uniform, size: 224 }, ...buffers.map((buffer) => ({ buffer }))];
    pass.setPipeline(pipeline);
    const resources = entries.map((resource, binding) => ({ binding, resource }));
    pass.setBindGroup(0, device.createBindGroup({ layout, entries: resources }), [0]);
    pass.dispatchWorkgroups(...groups);
  };
  dispatch("schedule", [lens, plan], [1]);
  dispatch("prepare", [table, lens, none, workspace, plan], [b]);
  dispatch("decode", [q, q, k, k, table, plan, workspace], [tiles, numParts, Math.ceil(headDimV / COLUMNS)]);
  dispatch("combine", [plan, workspace, out, lse], [tiles * ROWS, b]);
  pass.end();
  const read = [plan, out, lse].map((from) => {
    const to = buffer(from.size, MAP_READ | COPY_DST);
    encoder.copyBufferToBuffer(from, 0, to, 0, from.size);
    return to;
  });
  const start = performance.now();
  device.queue.submit([encoder.finish()]);
  for (const scope of ["out-of-memory", "validation"]) {
    const error = await device.popErrorScope();
    if (error) throw new Error(`${scope}: ${error.message}`);
  }
  await Promise.race([lost, Promise.all(read.map((from) => from.mapAsync(GPUMapMode.READ)))]);
  const ms = performance.now() - start;
  const [planBytes, outBytes, lseBytes] = read.map((from) => from.getMappedRange().slice(0));
  const words = new Uint32Array(planBytes);
  if (words[0] !== STATUS_OK) throw new Error(`request ${words[0]} failed the device-side check`);
  const parts = Array.from({ length: numParts }, (_, i) => {
    const [beginRequest, endRequest, beginBlock, endBlock] = new Int32Array(planBytes, (4 + b + 1 + i * 8) * 4, 4);
    return { beginRequest, endRequest, beginBlock, endBlock };
  });
  return {
    out: new Uint8Array(outBytes, 0, b * sQ * hQ * headDimV * elementBytes),
    lse: new Uint8Array(lseBytes, 0, b * hQ * sQ * 4),
    parts, ms,
  };
}
