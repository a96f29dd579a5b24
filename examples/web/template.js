// Makes a variant of a shader: the lines that begin with //# say what belongs to it. src/wgpu/shaders.rs does the same.

const words = (line) => {
  const text = line.trimStart();
  return text.startsWith("//#") ? text.slice(3).trim().split(/\s+/) : [];
};

/** Conditions and includes carried out. `files` maps names to texts; `defines` is a Set. */
function include(file, files, defines, lines) {
  const open = []; // for every open `if`: whether its present branch is taken, and whether one was
  for (const line of files[file].split("\n")) {
    const [directive, argument = ""] = words(line);
    const holds = argument.startsWith("!") ? !defines.has(argument.slice(1)) : defines.has(argument);
    const innermost = open[open.length - 1];
    if (directive === "if") open.push({ taken: holds, done: holds });
    else if (directive === "elif") {
      innermost.taken = !innermost.done && holds;
      innermost.done ||= innermost.taken;
    } else if (directive === "else") {
      innermost.taken = !innermost.done;
      innermost.done = true;
    } else if (directive === "endif") open.pop();
    else if (open.some(({ taken }) => !taken)) continue;
    else if (directive === "include") include(argument.replaceAll('"', ""), files, defines, lines);
    else lines.push(line);
  }
}

/** The lines with those between `//#for` and `//#endfor` repeated. */
function unroll(lines) {
  const text = [];
  for (let i = 0; i < lines.length; i++) {
    const [directive, name, count] = words(lines[i]);
    if (directive !== "for") {
      text.push(lines[i]);
      continue;
    }
    // Other counts are the sizes of matrices, which are no part of WebGPU.
    if (!/^\d+$/.test(count)) throw new Error(`//#for ${name} ${count}: not a number`);
    const body = [];
    for (let depth = 1; ; ) {
      const inner = words(lines[++i])[0];
      depth += inner === "for" ? 1 : inner === "endfor" ? -1 : 0;
      if (depth === 0) break;
      body.push(lines[i]);
    }
    const once = unroll(body);
    for (let n = 0; n < Number(count); n++) text.push(...once.map((line) => line.replaceAll(`$${name}`, String(n))));
  }
  return text;
}

/** The WGSL of a kernel. */
export function source(kernel, files, defines) {
  const lines = [];
  include(`${kernel}.wgsl`, files, new Set(defines), lines);
  return unroll(lines).join("\n");
}

/** The shader files that a browser needs. */
export async function load(base) {
  const names = ["params", "load", "store", "schedule", "prepare", "decode", "vector", "combine"];
  const texts = names.map(async (name) => {
    const response = await fetch(`${base}/${name}.wgsl`);
    if (!response.ok) throw new Error(`${response.url}: ${response.status}`);
    return [`${name}.wgsl`, await response.text()];
  });
  return Object.fromEntries(await Promise.all(texts));
}
