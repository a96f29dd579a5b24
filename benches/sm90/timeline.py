"""Prints the pipeline's time stamps (cycles) for one CTA: python3 timeline.py ROW [ROW ...]."""
import ctypes as C, sys, numpy as np, torch, run

lib = run.build([sys.argv.pop(1)], "prof")      # POLYMLA_PROFILE, or a library built with it
for row in map(int, sys.argv[1:]):
    b, s_q, h_q, s_k, var, floor, best = run.ROWS[row]
    q, kv, table, lens = run.make(b, s_q, h_q, s_k, varlen=bool(var), seed=row, poison=False)
    c = run.Call(lib, q, kv, table, lens, causal=s_q > 1)
    c()
    print(row, run.ROWS[row], "us", run.time_call(c.run, 5), "form", c.form)
    for cold in (True, False):
        if not cold:
            c.run(); c.run(); torch.cuda.synchronize()
        print('cold' if cold else 'warm')
        t = np.zeros((7, 64, 16), dtype=np.uint32)
        lib.pm_marks(t.ctypes.data_as(C.c_void_p))
        t0 = int(t[0, 0, 10])
        def d(g, item, evs):
            return " ".join(f"{(int(t[g, item, e]) - t0) & 0xffffffff:6d}" if t[g, item, e] else "     -" for e in evs)
        print("start", d(0, 0, (10, 12, 13, 14, 15)), "| Q landed", d(6, 0, (0, 1, 4, 5, 6, 2, 3)), "| loaders' Q", d(3, 0, (8, 9, 10)), "|", d(4, 0, (8, 9, 10)))
        for blk in range(3):
            print("load", blk, "left", d(3, blk, range(4)), "| right", d(4, blk, range(4)), "| late", d(5, blk, range(5)))
        blocks = min(64, max(1, s_k // 64 * b // (132 // c.p.m_tiles)))
        for item in [i for i in list(range(0, 4)) + list(range(40, 43)) if i < blocks]:
            print(f"{item:2d} QK {d(0, item, range(10))} | L {d(1, item, range(1, 9))} | R {d(2, item, range(1, 9))}")
        if blocks >= 62:
            a, z = t[0, 20:60, :8].astype(np.int64), t[0, 21:61, 0].astype(np.int64)
            print("QK mean step:", np.diff(a, axis=1).mean(0).round(0), "period", (z - a[:, 0]).mean())
            a = t[1, 20:60, :8].astype(np.int64)
            print("L  mean step:", np.diff(a, axis=1).mean(0).round(0))
    w = np.zeros((1024, 2), dtype=np.uint64)
    lib.pm_times(w.ctypes.data_as(C.c_void_p))
    w = w[:c.p.num_parts].astype(np.int64)
    w = w[w[:, 0] > 0] - w[:, 0].min()
    print("CTA start us", np.percentile(w[:, 0], (0, 50, 100)) / 1e3, "end us", np.percentile(w[:, 1], (0, 5, 25, 50, 75, 95, 100)) / 1e3)
    del q, kv, table, lens, c
