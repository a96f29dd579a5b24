// The page: decodes golden files on this browser's GPU, says whether the results are right, draws what was done.

import * as golden from "./golden.js";
import { decode, paths, requestDevice } from "./polymla.js";
import { load as loadShaders } from "./template.js";

// The last one is drawn.
const FILES = [
  "dense_bf16_b2_sq4_hq9_shorter_than_sq",
  "dense_bf16_b6_sq2_hq16_zero_len",
  "dense_fp16_b2_sq4_hq16_causal",
  "dense_bf16_b2_sq1_hq6_hkv2",
  "dense_bf16_b2_sq1_hq16_peaked",
  "dense_bf16_b2_sq2_hq16_peaked_rising",
];
// ?allowance=0.001 divides every tolerance by a thousand: the page must then say that checks failed.
const ALLOWANCE = Number(new URLSearchParams(location.search).get("allowance") ?? 1);
const BLOCK_TOKENS = 64;
const NUM_PARTS = 8;

const $ = (id) => document.getElementById(id);
const short = (x) => (x === 0 ? "0" : Number.isFinite(x) ? x.toExponential(1) : String(x));

function row(cells, passed) {
  const tr = $("results").insertRow();
  for (const cell of cells) tr.insertCell().textContent = cell;
  tr.cells[2].className = passed ? "pass" : "fail";
}

const SVG = "http://www.w3.org/2000/svg";
function draw(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

/** For every request the parts that cover its blocks: { part, begin, end }, in order. */
function splitsOf(call, parts, lens) {
  return Array.from({ length: call.b }, (_, r) => {
    const blocks = Math.ceil(lens[r] / BLOCK_TOKENS);
    return parts.flatMap((part, index) => {
      if (r < part.beginRequest || r > part.endRequest) return [];
      const begin = r === part.beginRequest ? part.beginBlock : 0;
      const end = r === part.endRequest ? part.endBlock : blocks;
      return begin < end ? [{ part: index, begin, end }] : [];
    });
  });
}

function picture(call, parts) {
  const svg = $("picture");
  const [lens, table] = [call.lens.numbers(), call.table.numbers()];
  const weights = golden.pageWeights(call);
  const splits = splitsOf(call, parts, lens);
  const most = Math.max(...weights.flat(), 1e-9);
  const longest = Math.max(...weights.map((pages) => pages.length), 1);
  const [left, width, bars, height] = [110, 1000, 110, 200];
  const cell = (width - left - 10) / longest;
  const hue = (part) => (part * 137.5) % 360;
  svg.setAttribute("viewBox", `0 0 ${width} ${call.b * height + 10}`);
  weights.forEach((pages, r) => {
    const base = r * height + bars + 30;
    draw("text", { x: 0, y: base + 4 }, svg, `request ${r}`);
    draw("text", { x: 0, y: base + 22, class: "small" }, svg, `${lens[r]} tokens`);
    draw("text", { x: 0, y: base - bars + 8, class: "small" }, svg, "attention");
    pages.forEach((weight, i) => {
      const x = left + i * cell;
      const block = (i * call.pageSize) / BLOCK_TOKENS;
      const split = splits[r].find(({ begin, end }) => begin <= block && block < end);
      const bar = (weight / most) * (bars - 10);
      const fill = `hsl(${hue(split?.part ?? 0)} 65% 55%)`;
      draw("rect", { x: x + 2, y: base - bar, width: cell - 4, height: bar, fill, class: "weight" }, svg);
      draw("text", { x: x + cell / 2, y: base - bar - 4, class: "small middle" }, svg, `${(100 * weight).toFixed(1)}%`);
      draw("rect", { x: x + 2, y: base + 2, width: cell - 4, height: 26, class: "page" }, svg);
      draw("text", { x: x + cell / 2, y: base + 20, class: "small middle" }, svg, `page ${table[r * call.maxPages + i]}`);
    });
    const pageBlocks = call.pageSize / BLOCK_TOKENS;
    for (const { part, begin, end } of splits[r]) {
      const [from, to] = [left + (begin / pageBlocks) * cell, left + Math.min(end / pageBlocks, pages.length) * cell];
      const color = `hsl(${hue(part)} 65% 40%)`;
      draw("path", { d: `M${from + 3} ${base + 33}v8H${to - 3}v-8`, stroke: color, class: "split" }, svg);
      draw("text", { x: (from + to) / 2, y: base + 55, fill: color, class: "small middle" }, svg, `part ${part}`);
    }
  });
}

async function main() {
  if (!navigator.gpu) throw new Error("this browser has no WebGPU (navigator.gpu is absent)");
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) throw new Error("navigator.gpu has no adapter");
  const { vendor, architecture, description } = adapter.info ?? {};
  $("adapter").textContent = [vendor, architecture, description].filter(Boolean).join(" ") || "unnamed adapter";
  const device = await requestDevice(adapter);
  const files = await loadShaders("../../shaders");
  let [passed, checks] = [0, 0];
  let last;
  for (const file of FILES) {
    const call = await golden.load(`../../tests/golden/${file}.safetensors`);
    for (const path of paths(adapter, call.dtype)) {
      const result = await decode(device, files, call, { path, numParts: NUM_PARTS });
      const [out, lse] = [golden.numbers(call.dtype, result.out), golden.numbers("F32", result.lse)];
      const verdict = golden.compare(call, out, lse, ALLOWANCE);
      const { out: o, lse: l } = verdict;
      const errors = [short(o.difference), o.ratio.toFixed(3), short(l.difference), l.ratio.toFixed(3)];
      row([file.replace("dense_", ""), path, verdict.passed ? "pass" : "FAIL", ...errors, result.ms.toFixed(0)], verdict.passed);
      checks += 1;
      passed += verdict.passed ? 1 : 0;
      last = { call, parts: result.parts };
    }
  }
  picture(last.call, last.parts);
  $("drawn").textContent = FILES[FILES.length - 1].replace("dense_", "");
  return { passed, checks };
}

const say = (state, text) => {
  $("verdict").textContent = text;
  $("verdict").className = state;
  document.body.dataset.verdict = state; // what the test reads
};
main().then(
  ({ passed, checks }) => say(passed === checks && checks > 0 ? "pass" : "fail", `${passed} of ${checks} checks passed`),
  (error) => say("fail", String(error?.message ?? error)),
);
