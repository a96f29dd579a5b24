#!/usr/bin/env python3
"""Times the Hopper peers that this machine's Python has, on the rows of `polymla bench --suite h200`.

    polymla bench --suite h200 --json > ours.json
    python3 benches/peers/h200_peers.py ours.json [--library NAME=PATH]... [--without NAME]... [--json FILE]

Rows and ragged lengths come from ours.json, so that both sides see the same shapes; the protocol is the same too: bf16,
d 576, d_v 512, page 64 in random order, normal/10 data, metadata planned before, device events around one call, a 1 GB
memset before each call to flush the L2, 2 warm-ups, median of 15. Needs torch with CUDA and at least one peer: flash_mla,
flashinfer, flash_attn_interface (FlashAttention-3) as Python packages, or shared libraries with the interface of
peer_library.h beside this file; says which it found. lse is asked of every peer that can return it.

Every output is compared with torch in f32. A peer that is wrong on a row counts for nothing there, and
the exit status is 1; so it is where nothing was measured.
"""

import argparse
import json
import statistics
import sys

import torch

from peer_library import library

DEVICE = "cuda"
FLUSH_BYTES = 1 << 30
PAGE, D, DV = 64, 576, 512
# bf16 weights and a bf16 output give 2e-3 to 4e-3 of the norm on this data; a page of 64 that is lost gives at least 2e-2.
MOST_ERROR, MOST_LSE_ERROR = 1e-2, 1e-3
# Not a Hopper kernel: shown, and left out of the best.
PORTABLE = ("flashinfer-fa2",)


class Row:
    """Tensors of one row, shared by all peers."""

    def __init__(self, spec, pool):
        self.b, self.s_q, self.h_q = spec["b"], spec["s_q"], spec["h_q"]
        lens = spec.get("cache_seqlens") or [spec["s_k"]] * self.b
        self.causal = False  # the suite measures unmasked decoding, as the recorded figures do
        self.lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        self.pages = (self.lens + PAGE - 1) // PAGE
        total, most = int(self.pages.sum()), int(self.pages.max())
        order = torch.randperm(total, device=DEVICE).to(torch.int32)
        self.table = torch.zeros(self.b, most, dtype=torch.int32, device=DEVICE)
        self.indptr = torch.zeros(self.b + 1, dtype=torch.int32, device=DEVICE)
        self.indptr[1:] = torch.cumsum(self.pages, 0)
        self.indices = order
        at = 0
        for i, n in enumerate(self.pages.tolist()):
            self.table[i, :n] = order[at : at + n]
            at += n
        self.k = pool[: total * PAGE * D].view(total, PAGE, 1, D)
        self.q = (torch.randn(self.b, self.s_q, self.h_q, D, device=DEVICE) / 10).bfloat16()
        self.scale = D**-0.5

    def reference(self):
        """out [b, s_q, h_q, d_v] and natural-log lse [b, h_q, s_q], in f32, a request at a time."""
        out = torch.empty(self.b, self.s_q, self.h_q, DV, device=DEVICE)
        lse = torch.empty(self.b, self.h_q, self.s_q, device=DEVICE)
        for i, (n, pages) in enumerate(zip(self.lens.tolist(), self.pages.tolist())):
            k = self.k[self.table[i, :pages].long()].view(-1, D)[:n].float()
            scores = self.q[i].reshape(-1, D).float() @ k.T * self.scale
            out[i] = (torch.softmax(scores, -1) @ k[:, :DV]).view(self.s_q, self.h_q, DV)
            lse[i] = torch.logsumexp(scores, -1).view(self.s_q, self.h_q).T
        return out, lse


def flashmla(row):
    import flash_mla

    plan = flash_mla.get_mla_metadata()
    meta, splits = (plan if isinstance(plan, tuple) else (plan, None))[:2]
    return lambda: flash_mla.flash_mla_with_kvcache(
        row.q, row.k, row.table, row.lens, DV, meta, splits, softmax_scale=row.scale, causal=row.causal
    )[0]


def flashinfer(backend):
    def make(row):
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        wrapper = BatchMLAPagedAttentionWrapper(
            torch.empty(512 << 20, dtype=torch.int8, device=DEVICE), backend=backend
        )
        q_indptr = torch.arange(row.b + 1, dtype=torch.int32, device=DEVICE) * row.s_q
        wrapper.plan(
            q_indptr, row.indptr, row.indices, row.lens, row.h_q, DV, D - DV, PAGE, row.causal, row.scale,
            torch.bfloat16, torch.bfloat16,
        )
        q = row.q.view(row.b * row.s_q, row.h_q, D)
        q_nope, q_pe = q[..., :DV].contiguous(), q[..., DV:].contiguous()
        k = row.k.view(-1, PAGE, D)
        ckv, kpe = k[..., :DV].contiguous(), k[..., DV:].contiguous()
        return lambda: wrapper.run(q_nope, q_pe, ckv, kpe, return_lse=True)[0]

    return make


def fa3_qv(row):
    from flash_attn_interface import flash_attn_with_kvcache

    ckv, kpe = row.k[..., :DV], row.k[..., DV:]
    q_pe, q_nope = row.q[..., DV:], row.q[..., :DV]
    return lambda: flash_attn_with_kvcache(
        q_pe, kpe, ckv, qv=q_nope, cache_seqlens=row.lens, page_table=row.table, softmax_scale=row.scale,
        causal=row.causal, return_softmax_lse=True,
    )[0]


# Each makes, for a row, a call that returns out, or (out, natural-log lse [b, h_q, s_q]).
PEERS = {
    "flashmla": ("flash_mla", flashmla),
    "flashinfer-fa3": ("flashinfer", flashinfer("fa3")),
    "fa3-qv": ("flash_attn_interface", fa3_qv),
    "flashinfer-fa2": ("flashinfer", flashinfer("fa2")),
}


def find_peers(libraries, without=()):
    """Peers by name: the libraries given, then the packages that import (a library takes the place of its namesake)."""
    found = {}
    for name, path in libraries:
        title, found[name] = library(path)
        print(f"{name}: {title} ({path})", file=sys.stderr)
    for name, (module, make) in PEERS.items():
        if name in found or name in without:
            continue
        try:
            __import__(module)
            found[name] = make
        except Exception as reason:  # an import can fail in as many ways as there are builds
            print(f"SKIP {name}: {reason}", file=sys.stderr)
    return found


def errors(result, row, want):
    """The worst request's relative error of out, and the largest error of lse (None where the peer's is not compared)."""
    out, lse = result if isinstance(result, tuple) else (result, None)
    want_out, want_lse = want
    difference = (out.reshape(want_out.shape).float() - want_out).reshape(row.b, -1)
    relative = (difference.norm(dim=1) / want_out.reshape(row.b, -1).norm(dim=1)).max().item()
    return relative, None if lse is None else (lse - want_lse).abs().max().item()


def median_us(call, flush):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for i in range(17):
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def time_row(row, peers, flush):
    """What each peer did on this row: {"us", "error", "lse_error", "right"}; a peer that refuses the row has no entry."""
    results, want = {}, row.reference()
    for name, make in peers.items():
        try:
            call = make(row)
            error, lse_error = errors(call(), row, want)
            # Written so that NaN is wrong.
            right = error <= MOST_ERROR and (lse_error is None or lse_error <= MOST_LSE_ERROR)
            results[name] = {"us": median_us(call, flush), "error": error, "lse_error": lse_error, "right": right}
        except Exception as reason:
            print(f"SKIP {name} on this row: {reason}", file=sys.stderr)
    return results


def fastest(results):
    """The best Hopper peer's microseconds, of those that were right."""
    return min((r["us"] for n, r in results.items() if n not in PORTABLE and r["right"]), default=None)


def row_line(spec, peers, results):
    best = fastest(results)
    cells = "  ".join(
        (f"{results[n]['us']:.1f}" + ("" if results[n]["right"] else " WRONG") if n in results else "-").rjust(14)
        for n in peers
    )
    length = f"{spec['s_k']}{'v' if spec['varlen'] else ''}"
    ratio = f"{best / spec['us']:6.2f}x" if best else f"{'-':>7}"
    return f"{spec['b']:4} {spec['s_q']:3} {spec['h_q']:4} {length:>7}  {spec['us']:10.1f}  {cells}  {ratio}"


def summary(rows, peers):
    """A line a peer, and one for the best of them; rows are (spec, results)."""
    lines = []
    for name in peers:
        mine = [(s["us"], r[name]) for s, r in rows if name in r]
        ratios = [p["us"] / us for us, p in mine if p["right"]]
        if not ratios:
            lines.append(f"{name}: no row right")
            continue
        lse = [p["lse_error"] for _, p in mine if p["lse_error"] is not None]
        lines.append(
            f"{name}: polymla {statistics.geometric_mean(ratios):.3f}x as fast (geometric mean of {len(ratios)} rows, "
            f"{min(ratios):.2f}x to {max(ratios):.2f}x), faster on {sum(x > 1 for x in ratios)}; "
            f"its largest relative error {max(p['error'] for _, p in mine):.1e}"
            + (f", of lse {max(lse):.1e}" if lse else "")
        )
    ratios = [fastest(r) / s["us"] for s, r in rows if fastest(r)]
    if ratios:
        lines.append(
            f"geometric mean over the best Hopper peer of each row, same machine: {statistics.geometric_mean(ratios):.3f}x, "
            f"faster on {sum(x > 1 for x in ratios)} of {len(ratios)} rows"
        )
    return lines


def named_path(text):
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="peer_library.h tells what a library exports."
    )
    parser.add_argument("ours", help="what `polymla bench --suite h200 --json` wrote")
    parser.add_argument(
        "--library", metavar="NAME=PATH", type=named_path, action="append", default=[],
        help="a shared library to time as peer NAME (in place of the Python package of that peer); may be repeated",
    )
    parser.add_argument(
        "--without", metavar="NAME", choices=list(PEERS), action="append", default=[],
        help="leave out the Python package of this peer; may be repeated",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every row's microseconds and errors to FILE")
    args = parser.parse_args(arguments)
    with open(args.ours) as file:
        specs = json.load(file)["rows"]
    peers = find_peers(args.library, args.without)
    if not peers:
        sys.exit("no peer is installed here, and no --library was given")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    pages = max(sum((n + PAGE - 1) // PAGE for n in (s.get("cache_seqlens") or [s["s_k"]] * s["b"])) for s in specs)
    pool = torch.empty(pages * PAGE * D, dtype=torch.bfloat16, device=DEVICE)
    for chunk in pool.split(1 << 28):
        chunk.copy_(torch.randn(chunk.numel(), device=DEVICE) / 10)
    print(f"{'b':>4} {'s_q':>3} {'h_q':>4} {'s_k':>7}  {'polymla us':>10}  " + "  ".join(f"{n:>14}" for n in peers) + "    ratio")
    rows = []
    for spec in specs:
        rows.append((spec, time_row(Row(spec, pool), peers, flush)))
        print(row_line(spec, peers, rows[-1][1]), flush=True)
        if args.json:  # each row, so that a run cut short leaves what it had
            with open(args.json, "w") as file:
                json.dump([{**s, "peers": r} for s, r in rows], file, indent=1)
    print("\n".join(summary(rows, peers)))
    measured = [r["right"] for _, results in rows for r in results.values()]
    sys.exit(0 if measured and all(measured) else 1)


if __name__ == "__main__":
    main()
