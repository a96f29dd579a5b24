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

/** The WGSL of a kernel. */
export function source(kernel, files, defines) {
  const lines = [];
  include(`${kernel}.wgsl`, files, new Set(defines), lines);
  if (lines.some((line) => words(line)[0] === "for")) throw new Error(`${kernel}: matrices are no part of WebGPU`);
  return lines.join("\n");
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
