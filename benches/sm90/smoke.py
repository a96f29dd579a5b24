"""First contact with a changed kernel: two small problems per form, with a hard stop on a hang."""
import sys, torch, run
lib = run.build([] if len(sys.argv) < 2 else sys.argv[1].split(","), "smoke")
for kw in (dict(b=1, s_q=1, h_q=64, s_k=64), dict(b=2, s_q=1, h_q=64, s_k=1000), dict(b=1, s_q=1, h_q=128, s_k=20000)):
    q, kv, table, lens = run.make(seed=1, **kw)
    ref = run.reference(q, kv, table, lens, 512, False, q.shape[-1] ** -0.5)
    for form in (0, 1):
        for parts in (1, None):
            c = run.Call(lib, q, kv, table, lens, form=form, parts=parts)
            c.plan(); torch.cuda.synchronize()
            if parts is None: print(c.parts[:3].tolist(), c.num_splits.tolist())
            out, lse = c()
            print(kw, form, parts, run.verdict("smoke", out, lse, *ref), flush=True)
