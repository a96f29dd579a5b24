"""polymla's CPU backend beside PyTorch's, on the same shapes, in turns, in one session.

PyTorch's way is the fastest one it has for a paged latent cache on a CPU: gather the pages, `q @ k.T` in bf16, softmax
in f32, `p @ v` in bf16, one batched product each. Both sides use every CPU this process may use.

Usage: cpu_torch.py PROGRAM [--threads N] [--rounds N] [--json FILE], PROGRAM being what `cargo bench --bench
cpu_polymla --no-run` builds. `benches/peers/cpu.sh` does all of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import time

import torch

SHAPES = [(4, 16, 4096), (4, 128, 4096), (1, 16, 16384), (1, 128, 8192)]
D_K, D_V, PAGE = 576, 512, 64
WARM_MS = 50    # of each turn that do not count, the same for both sides


def torch_data(b, h, s_k):
    pages = b * s_k // PAGE
    generator = torch.Generator().manual_seed(1)
    cache = (torch.rand(pages, PAGE, D_K, generator=generator) - 0.5).bfloat16()
    q = (torch.rand(b, h, D_K, generator=generator) - 0.5).bfloat16()
    table = torch.randperm(pages, generator=generator).view(b, -1)
    return q, cache, table


def torch_decode(q, cache, table):
    """Returns out [b, h, d_v] and lse [b, h]."""
    b = q.shape[0]
    k = cache[table].view(b, -1, D_K)
    scores = torch.bmm(q, k.transpose(1, 2)).float() * D_K**-0.5
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).bfloat16()
    return torch.bmm(weights, k[:, :, :D_V]), lse


def torch_time(data, calls):
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        torch_decode(*data)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("program")
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--rounds", type=int, default=12, help="turns each side gets a shape")
    arguments.add_argument("--calls", type=int, default=3, help="calls counted in a turn")
    arguments.add_argument("--json", help="also write the figures to this file")
    arguments = arguments.parse_args()

    torch.set_num_threads(arguments.threads)
    environment = dict(os.environ, RAYON_NUM_THREADS=str(arguments.threads))
    polymla = subprocess.Popen(
        [arguments.program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    path = polymla.stdout.readline().strip()

    def polymla_time(shape, calls):
        polymla.stdin.write(" ".join(map(str, (*shape, calls))) + "\n")
        polymla.stdin.flush()
        answer = polymla.stdout.readline().split()
        if not answer:
            raise SystemExit(f"the polymla program stopped with status {polymla.wait()}")
        return [float(x) for x in answer]

    print(f"polymla {path}; torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} threads")
    print("bf16, d 576/512, page 64, shuffled pages, s_q 1; median of all calls (fastest in brackets), ms and GFLOP/s")
    print(f"{'b':>3}{'h_q':>5}{'s_k':>7}{'polymla ms':>20}{'GFLOP/s':>9}{'torch ms':>20}{'GFLOP/s':>9}{'ratio':>7}")
    results = []
    with torch.inference_mode():
        for shape in SHAPES:
            b, h, s_k = shape
            flop = 2 * b * h * s_k * (D_K + D_V)
            data = torch_data(*shape)
            sides = [lambda calls: polymla_time(shape, calls), lambda calls: torch_time(data, calls)]
            # A virtual CPU that was idle runs slower for some ten milliseconds, and each side's first call finds the
            # other's data in the caches: as many calls as take that long come before those that count.
            idle = [1 + int(WARM_MS / min(side(3))) for side in sides]
            ours, theirs = times = [], []
            for _ in range(arguments.rounds):
                # In turns, so that what else the machine does falls on both. Threads of the side that has just
                # finished spin for a while before they sleep.
                for side, before, all_times in zip(sides, idle, times):
                    time.sleep(0.05)
                    all_times += side(before + arguments.calls)[before:]
            x, y = statistics.median(ours), statistics.median(theirs)
            print(f"{b:>3}{h:>5}{s_k:>7}{x:>11.2f} ({min(ours):>6.2f}){flop / x / 1e6:>9.0f}"
                  f"{y:>11.2f} ({min(theirs):>6.2f}){flop / y / 1e6:>9.0f}{y / x:>7.2f}", flush=True)
            results.append({"b": b, "h_q": h, "s_k": s_k, "polymla_ms": x, "polymla_min_ms": min(ours),
                            "torch_ms": y, "torch_min_ms": min(theirs), "ratio": y / x})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"polymla": path, "torch": torch.__version__, "results": results}, file, indent=1)
    polymla.stdin.close()
    polymla.wait()


if __name__ == "__main__":
    main()
