#!/usr/bin/env python3
"""Times the Hopper peers that this machine's Python has, on the rows of `polymla bench --suite h200`.

    polymla bench --suite h200 --json > ours.json
    python3 benches/peers/h200_peers.py ours.json

Rows and ragged lengths come from ours.json, so that both sides see the same shapes; the protocol is the same too: bf16,
d 576, d_v 512, page 64 in random order, normal/10 data, metadata planned before, device events around one call, a 1 GB
memset before each call to flush the L2, 2 warm-ups, median of 15. Needs torch with CUDA and at least one of flash_mla,
flashinfer, flash_attn_interface (FlashAttention-3); says which it found. lse is asked of every peer that can return it.
"""

import json
import statistics
import sys

import torch

PAGE, D, DV = 64, 576, 512


class Row:
    """Tensors of one row, shared by all peers."""

    def __init__(self, spec, pool):
        self.b, self.s_q, self.h_q = spec["b"], spec["s_q"], spec["h_q"]
        lens = spec.get("cache_seqlens") or [spec["s_k"]] * self.b
        self.causal = False  # the suite measures unmasked decoding, as the recorded figures do
        self.lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        self.pages = (self.lens + PAGE - 1) // PAGE
        total, most = int(self.pages.sum()), int(self.pages.max())
        order = torch.randperm(total, device="cuda").to(torch.int32)
        self.table = torch.zeros(self.b, most, dtype=torch.int32, device="cuda")
        self.indptr = torch.zeros(self.b + 1, dtype=torch.int32, device="cuda")
        self.indptr[1:] = torch.cumsum(self.pages, 0)
        self.indices = order
        at = 0
        for i, n in enumerate(self.pages.tolist()):
            self.table[i, :n] = order[at : at + n]
            at += n
        self.k = pool[: total * PAGE * D].view(total, PAGE, 1, D)
        self.q = (torch.randn(self.b, self.s_q, self.h_q, D, device="cuda") / 10).bfloat16()
        self.scale = D**-0.5


def flashmla(row):
    import flash_mla

    plan = flash_mla.get_mla_metadata()
    meta, splits = (plan if isinstance(plan, tuple) else (plan, None))[:2]
    return lambda: flash_mla.flash_mla_with_kvcache(
        row.q, row.k, row.table, row.lens, DV, meta, splits, softmax_scale=row.scale, causal=row.causal
    )


def flashinfer(backend):
    def make(row):
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        wrapper = BatchMLAPagedAttentionWrapper(
            torch.empty(512 << 20, dtype=torch.int8, device="cuda"), backend=backend
        )
        q_indptr = torch.arange(row.b + 1, dtype=torch.int32, device="cuda") * row.s_q
        wrapper.plan(
            q_indptr, row.indptr, row.indices, row.lens, row.h_q, DV, D - DV, PAGE, row.causal, row.scale,
            torch.bfloat16, torch.bfloat16,
        )
        q = row.q.view(row.b * row.s_q, row.h_q, D)
        q_nope, q_pe = q[..., :DV].contiguous(), q[..., DV:].contiguous()
        k = row.k.view(-1, PAGE, D)
        ckv, kpe = k[..., :DV].contiguous(), k[..., DV:].contiguous()
        return lambda: wrapper.run(q_nope, q_pe, ckv, kpe, return_lse=True)

    return make


def fa3_qv(row):
    from flash_attn_interface import flash_attn_with_kvcache

    ckv, kpe = row.k[..., :DV], row.k[..., DV:]
    q_pe, q_nope = row.q[..., DV:], row.q[..., :DV]
    return lambda: flash_attn_with_kvcache(
        q_pe, kpe, ckv, qv=q_nope, cache_seqlens=row.lens, page_table=row.table, softmax_scale=row.scale,
        causal=row.causal, return_softmax_lse=True,
    )


PEERS = {
    "flashmla": ("flash_mla", flashmla),
    "flashinfer-fa3": ("flashinfer", flashinfer("fa3")),
    "fa3-qv": ("flash_attn_interface", fa3_qv),
    "flashinfer-fa2": ("flashinfer", flashinfer("fa2")),
}


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


def main():
    ours = json.load(open(sys.argv[1]))
    found = {}
    for name, (module, make) in PEERS.items():
        try:
            __import__(module)
            found[name] = make
        except Exception as reason:  # an import can fail in as many ways as there are builds
            print(f"SKIP {name}: {reason}", file=sys.stderr)
    if not found:
        sys.exit("no peer is installed here")
    flush = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    tokens = max(sum((n + PAGE - 1) // PAGE for n in (r.get("cache_seqlens") or [r["s_k"]] * r["b"])) for r in ours["rows"])
    pool = torch.empty(tokens * PAGE * D, dtype=torch.bfloat16, device="cuda")
    for chunk in pool.split(1 << 28):
        chunk.copy_(torch.randn(chunk.numel(), device="cuda") / 10)
    print(f"{'b':>4} {'s_q':>3} {'h_q':>4} {'s_k':>7}  {'polymla us':>10}  " + "  ".join(f"{n:>14}" for n in found) + "   ratio")
    logs = []
    for spec in ours["rows"]:
        row = Row(spec, pool)
        us = {}
        for name, make in found.items():
            try:
                us[name] = median_us(make(row), flush)
            except Exception as reason:
                print(f"SKIP {name} on this row: {reason}", file=sys.stderr)
        best = min((t for n, t in us.items() if n != "flashinfer-fa2"), default=None)
        ratio = best / spec["us"] if best else float("nan")
        if best:
            logs.append(ratio)
        cells = "  ".join(f"{us[n]:14.1f}" if n in us else f"{'-':>14}" for n in found)
        length = f"{spec['s_k']}{'v' if spec['varlen'] else ''}"
        print(f"{row.b:4} {row.s_q:3} {row.h_q:4} {length:>7}  {spec['us']:10.1f}  {cells}  {ratio:6.2f}x", flush=True)
    if logs:
        print(f"geometric mean over the best Hopper peer of each row, same machine: {statistics.geometric_mean(logs):.3f}x")


if __name__ == "__main__":
    main()
