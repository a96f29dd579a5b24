"""Prints the pipeline's time stamps (cycles) for one CTA, cold and then with warm caches: timeline.py LIBRARY ROW [ROW ...].

LIBRARY is host.cu built with -DPOLYMLA_PROFILE (and -DPOLYMLA_ONE_KERNEL), or POLYMLA_PROFILE to build it here.
"""
import ctypes as C, sys, numpy as np, torch, run

lib = run.build([sys.argv.pop(1)], "prof")
for row in map(int, sys.argv[1:]):
    b, s_q, h_q, s_k, var, floor, best = run.ROWS[row]
    q, kv, table, lens = run.make(b, s_q, h_q, s_k, varlen=bool(var), seed=row, poison=False)
    c = run.Call(lib, q, kv, table, lens, causal=s_q > 1)
    c()
    print(row, run.ROWS[row], "us", run.time_call(c.run, 5), "form", c.form)
    for cold in (True, False):
        if not cold:
            c.run()
            c.run()
            torch.cuda.synchronize()
        t = np.zeros((7, 256, 16), dtype=np.uint32)
        lib.pm_marks(t.ctypes.data_as(C.c_void_p))
        t0 = int(t[0, 0, 10])

        def d(g, item, evs):
            return " ".join(f"{(int(t[g, item, e]) - t0) & 0xffffffff:6d}" if t[g, item, e] else "     -" for e in evs)

        # Of the last segment, where a part has several: barriers up, record there, Q landed, in registers, limits known.
        print("cold" if cold else "warm", "start", d(0, 0, (10, 12, 13)), d(6, 0, (0, 1, 2)), d(0, 0, (14, 15)))
        blocks = min(256, max(1, s_k // 64 * b // (132 // c.p.m_tiles)))
        for item in [i for i in list(range(0, 4)) + list(range(40, 43)) if i < blocks]:
            print(f"  block {item:2d}: begin, S, P {d(0, item, (0, 5, 7))}  P V: P there, gate, done, stored {d(1, item, (1, 3, 5, 8))}")
        if blocks >= 62:
            a = t[0, 20:blocks - 1, (0, 5, 7)].astype(np.int64).T
            period = np.diff(a[:, 0])
            usual = np.median(period)
            print("  median: Q K^T", np.median(a[:, 1] - a[:, 0]), "softmax", np.median(a[:, 2] - a[:, 1]), "period", usual)
            # What comes between: other segments.
            for item in 20 + np.nonzero((period > 1.2 * usual) | (period < 0))[0]:
                print(f"  block {item:3d} takes {period[item - 20]}: S, P, next", d(0, item, (5, 7)), d(0, item + 1, (0, 5, 7)),
                      "P V: P there, gate, done, stored", d(1, item, (1, 3, 5, 8)), "next", d(1, item + 1, (1, 3, 5)))
        w = np.zeros((1024, 2), dtype=np.uint64)
        lib.pm_times(w.ctypes.data_as(C.c_void_p))
        w = w[:c.p.num_parts].astype(np.int64)
        t0 = w[:, 0].min()
        w = w[w[:, 0] > 0] - t0
        print("CTA start us", np.percentile(w[:, 0], (0, 50, 100)) / 1e3, "end us", np.percentile(w[:, 1], (0, 5, 25, 50, 75, 95, 100)) / 1e3)
        g = np.zeros((1024, 6), dtype=np.uint64)
        lib.pm_merge_times(g.ctypes.data_as(C.c_void_p))
        g = g[:c.combine_ctas].astype(np.int64) - t0
        g = g[g[:, 2] > 0]
        for name, k in (("start", 0), ("listed", 1), ("main done", 2), ("loaded", 3), ("added", 4), ("end", 5)):
            print("  combine", name, "us", np.percentile(g[:, k], (0, 25, 50, 75, 100)) / 1e3 if len(g) else None)
    del q, kv, table, lens, c
