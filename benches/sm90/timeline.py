"""Prints the pipeline's time stamps (cycles) for one CTA: python3 timeline.py ROW [ROW ...]."""
import ctypes as C, sys, numpy as np, torch, run

lib = run.build(["POLYMLA_PROFILE"], "prof")
for row in map(int, sys.argv[1:]):
    b, s_q, h_q, s_k, var, floor, best = run.ROWS[row]
    q, kv, table, lens = run.make(b, s_q, h_q, s_k, varlen=bool(var), seed=row, poison=False)
    c = run.Call(lib, q, kv, table, lens, causal=s_q > 1)
    c()
    print(row, run.ROWS[row], "us", run.time_call(c.run, 5), "form", c.form)
    t = np.zeros((3, 64, 16), dtype=np.uint32)
    lib.pm_marks(t.ctypes.data_as(C.c_void_p))
    t0 = int(t[0, 0, 0])
    for item in list(range(0, 6)) + list(range(30, 36)):
        d = lambda g, n: " ".join(f"{(int(t[g, item, e]) - t0) & 0xffffffff:6d}" if t[g, item, e] else "     -" for e in range(n))
        print(f"{item:2d} QK {d(0, 10)} | L {d(1, 9)} | R {d(2, 9)}")
    a, z = t[0, 20:60, :10].astype(np.int64), t[0, 21:61, 0].astype(np.int64)
    print("QK mean step:", np.diff(a, axis=1).mean(0).round(0), "period", (z - a[:, 0]).mean())
    a = t[1, 20:60, :8].astype(np.int64)
    print("L  mean step:", np.diff(a, axis=1).mean(0).round(0))
    del q, kv, table, lens, c
