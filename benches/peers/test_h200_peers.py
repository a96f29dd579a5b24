#!/usr/bin/env python3
"""Tests h200_peers.py without a GPU: its rows, its reference and its verdicts, against a peer library on the CPU.

    python3 benches/peers/test_h200_peers.py        # needs torch (a CPU build will do) and a C compiler
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

import torch

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
import h200_peers  # noqa: E402

ROWS = [
    dict(b=3, s_q=2, h_q=5, s_k=150, varlen=True, cache_seqlens=[3, 321, 130], us=2.0),
    dict(b=2, s_q=1, h_q=3, s_k=200, varlen=False, cache_seqlens=None, us=4.0),
]


class WallEvent:
    """torch.cuda.Event's two methods, by the wall clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return (later.at - self.at) * 1e3


class Peers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.path = f"{cls.folder.name}/libfake.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", cls.path, HERE / "fake_peer.c", "-lm"], check=True
        )
        cls.ours = f"{cls.folder.name}/ours.json"
        pathlib.Path(cls.ours).write_text(json.dumps({"rows": ROWS}))
        h200_peers.DEVICE = "cpu"
        h200_peers.FLUSH_BYTES = 1 << 10
        torch.cuda.Event, torch.cuda.synchronize = WallEvent, lambda: None

    def run_script(self, fault=None, more=()):
        """Exit status, standard output, standard error and the rows that it wrote."""
        self.addCleanup(os.environ.pop, "FAULT", None)
        os.environ["FAULT"] = fault or ""
        written = f"{self.folder.name}/{fault}.json"
        out, log = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log), self.assertRaises(SystemExit) as end:
            h200_peers.main([self.ours, "--library", f"fake={self.path}", "--json", written, *more])
        code = end.exception.code
        rows = json.loads(pathlib.Path(written).read_text()) if os.path.exists(written) else None
        return code, out.getvalue(), log.getvalue(), rows

    def test_a_right_library_is_timed_and_compared(self):
        code, out, log, rows = self.run_script()
        self.assertFalse(code, out + log)
        self.assertIn("fake: a CPU stand-in", log)
        for spec, row in zip(ROWS, rows, strict=True):
            fake = row["peers"]["fake"]
            self.assertTrue(fake["right"])
            self.assertTrue(1e-4 < fake["error"] < 4e-3, fake)  # a bf16 output is neither exact nor far off
            self.assertLess(fake["lse_error"], 1e-5)
            self.assertIn(f"{fake['us']:.1f}", out)
            self.assertIn(f"{fake['us'] / spec['us']:.2f}x", out)
        self.assertIn("faster on 2 of 2 rows", out)

    def test_wrong_results_count_for_nothing(self):
        for fault in ("page", "head", "base", "plan", "rows"):
            with self.subTest(fault):
                code, out, log, rows = self.run_script(fault)
                self.assertEqual(code, 1, out + log)
                self.assertIn("WRONG", out)
                self.assertFalse(rows[0]["peers"]["fake"]["right"])
                self.assertNotIn("faster on 2 of 2 rows", out)

    def test_refusals_are_said(self):
        for fault, text in (("code", "peer_decode returned error 7"), ("shape", "does not serve this shape")):
            with self.subTest(fault):
                code, out, log, rows = self.run_script(fault)
                self.assertEqual(log.count(text), 2, log)
                self.assertEqual([row["peers"] for row in rows], [{}, {}])
                self.assertEqual(code, 1, "nothing was measured")

    def test_peers_left_out_are_not_looked_for(self):
        self.assertIn("fa3-qv: ", self.run_script()[2])
        self.assertNotIn("fa3-qv: ", self.run_script(more=("--without", "fa3-qv"))[2])

    def test_other_files_are_refused(self):
        other = f"{self.folder.name}/other.so"
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-o", other, "-x", "c", "/dev/null"], check=True)
        for path in (other, self.ours, f"{self.folder.name}/absent.so"):
            with self.subTest(path), self.assertRaisesRegex(SystemExit, f"{path} is not a peer library: "):
                h200_peers.main([self.ours, "--library", f"fake={path}"])

    def test_another_interface_is_refused(self):
        code, _, _, rows = self.run_script("abi")
        self.assertIn("has interface 2, not 1", code)
        self.assertIsNone(rows)


if __name__ == "__main__":
    unittest.main()
