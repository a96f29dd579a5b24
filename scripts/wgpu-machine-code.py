#!/usr/bin/env python3
"""Prints the main loop of a WGSL kernel as an NVIDIA driver compiled it, and where a warp would wait in it.

    POLYMLA_WGPU_CACHE_DIR=DIR polymla bench --backend wgpu ..      writes DIR/PATH-DTYPE-BUILD, on a machine with the GPU
    scripts/wgpu-machine-code.py FILE [--latency CYCLES]            anywhere

Needs zstd and CUDA's nvdisasm (on the path, or named by NVDISASM). The file is Vulkan's pipeline cache: behind a header a zstd
frame, in that the driver's container: sections as (type, bytes, offset), of which type 1 is SM90 code.

Every line has the cycles that the scheduler holds the next instruction back (st), the scoreboards that it waits for (w), and those it
sets (W when written, R when read). Last is a model of 8 warps on one processor, which knows these, the products' and shared
memory's throughput, and a latency of global memory: it names the instructions before which a warp waits longest. Its totals were
10 to 20% below what was measured; it is for finding waits, not for predicting times.
"""

import argparse
import heapq
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

HMMA_CYCLES, SHARED_LATENCY, S2R_LATENCY, MUFU_LATENCY, BARRIER_LATENCY = 8, 23, 25, 22, 25


def code_of(data):
    """SM90 code in a pipeline cache."""
    frame = data.find(b"\x28\xb5\x2f\xfd")
    if frame < 0:
        raise SystemExit("no zstd frame: not a pipeline cache of this driver")
    raw = subprocess.run(["zstd", "-d", "-c"], input=data[frame:], capture_output=True).stdout
    words = struct.unpack("<200I", raw[:800])
    for kind, size, offset in zip(words[10:], words[11:], words[12:]):
        if kind == 1 and size % 16 == 0 and 0x1000 < size <= len(raw) and 0x100 <= offset < 0x800:
            begin = offset + 8 if raw[offset : offset + 8] == bytes(8) else offset
            return raw[begin : begin + size]
    raise SystemExit("no section of code found")


class Instruction:
    def __init__(self, at, text, word):
        self.at, self.text = at, text
        self.stall, self.written, self.read = word >> 105 & 15, word >> 110 & 7, word >> 113 & 7
        self.waits = [b for b in range(6) if word >> 116 & 1 << b]
        self.name = re.sub(r"^@!?U?P\w+ ", "", text).split(".")[0].split(" ")[0]
        wide = 4 if self.name == "LDSM" or ".128" in text else 2 if ".64" in text else 1
        self.shared = wide if self.name in ("LDSM", "LDS", "STS", "LDG", "SHFL") else 0
        target = re.search(r"BRA (0x[0-9a-f]+)", text)
        self.target = int(target[1], 16) if target else None

    def __str__(self):
        scoreboards = (f"W{self.written}" if self.written < 6 else "  ") + (f" R{self.read}" if self.read < 6 else "   ")
        waits = "".join(map(str, self.waits))
        return f"{self.at:05x} w{waits:<3} st{self.stall:<2} {scoreboards} {self.text}"


def disassembled(code):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        file.write_bytes(code)
        program = os.environ.get("NVDISASM", "nvdisasm")
        text = subprocess.run([program, "--binary", "SM90", "-c", file], capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        match = re.match(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?);", line)
        if match:
            at = int(match[1], 16)
            yield Instruction(at, match[2].strip(), int.from_bytes(code[at : at + 16], "little"))


def main_loop(instructions):
    """Of the loops with 30 products or more the shortest."""
    loops = []
    for last in instructions:
        if last.target is not None and last.target < last.at:
            body = [i for i in instructions if last.target <= i.at <= last.at]
            if sum(i.name == "HMMA" for i in body) >= 30:
                loops.append(body)
    return min(loops, key=len) if loops else None


def model(body, latency, warps=8, rounds=12):
    """Cycles of a round, and for each instruction those that the first warp was late by."""
    place = {i.at: n for n, i in enumerate(body)}
    at, done, ready, waiting = [0] * warps, [0] * warps, [0] * warps, []
    boards, products, shared, late, issued = [[0] * 6 for _ in range(warps)], [0.0] * 4, 0, [0] * len(body), [0] * warps
    events, marks, cycle = [], [], 0
    while min(done) < rounds:
        while events and events[0][0] <= cycle:
            _, warp, board = heapq.heappop(events)
            boards[warp][board] -= 1
        for part in range(4):
            for warp in range(part, warps, 4):
                i = body[at[warp]]
                blocked = any(boards[warp][b] for b in i.waits) or (i.name == "HMMA" and products[part] > cycle)
                if done[warp] >= rounds or warp in waiting or ready[warp] > cycle or blocked:
                    continue
                if warp == 0 and done[0] >= 2:
                    late[at[0]] += cycle - issued[0] - max(1, body[at[0] - 1].stall)
                issued[warp], ready[warp] = cycle, cycle + max(1, i.stall)
                if i.name == "HMMA":
                    products[part] = cycle + HMMA_CYCLES
                if i.shared:
                    shared = max(shared, cycle + 4) + i.shared
                ends = {"LDG": latency, "S2R": S2R_LATENCY, "MUFU": MUFU_LATENCY}.get(i.name, shared - cycle + SHARED_LATENCY)
                for board, end in ((i.written, ends), (i.read, shared - cycle + 6 if i.shared else 12)):
                    if board < 6:
                        boards[warp][board] += 1
                        heapq.heappush(events, (cycle + max(end, 1), warp, board))
                if i.name == "BAR":
                    waiting.append(warp)
                    if len(waiting) == warps:
                        for other in waiting:
                            ready[other] = max(ready[other], cycle + BARRIER_LATENCY)
                        waiting = []
                at[warp] += 1
                if at[warp] == len(body):
                    at[warp], done[warp] = 0, done[warp] + 1
                    if warp == 0:
                        marks.append(cycle)
                break
        cycle += 1
    return (marks[-1] - marks[1]) / (rounds - 2), [n / (rounds - 2) for n in late]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--latency", type=int, default=800, help="of global memory, in cycles")
    args = parser.parse_args()
    body = main_loop(list(disassembled(code_of(args.file.read_bytes()))))
    if body is None:
        raise SystemExit("no loop with products")
    print(*body, sep="\n")
    counts = {name: sum(i.name == name for i in body) for name in ("HMMA", "LDSM", "LDS", "STS", "LDG", "LDL", "STL", "S2R", "BAR")}
    print(f"\n{len(body)} instructions:", ", ".join(f"{n} {name}" for name, n in counts.items() if n))
    cycles, late = model(body, args.latency)
    print(f"model: {cycles:.0f} cycles a round, with {args.latency} of latency; longest waits before")
    for cycles, i in sorted(zip(late, body), key=lambda pair: -pair[0])[:12]:
        print(f"{cycles:6.0f}  {i}")


if __name__ == "__main__":
    main()
