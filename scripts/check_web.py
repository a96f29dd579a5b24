#!/usr/bin/env python3
"""Opens examples/web in headless Chromium and reads its verdict.

    scripts/check_web.py [--screenshot FILE] [--chromium PROGRAM]

Serves the repository on a port of this machine, steers the browser over its debugging pipe, prints the page's table,
and exits with 0 only if the page says that all checks passed, and says otherwise once tolerances are a thousandth.
WebGPU comes from SwiftShader, Chromium's software implementation, so that no GPU is needed.
"""

import argparse
import base64
import functools
import http.server
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--remote-debugging-pipe",
    "--window-size=1100,1000",
]
# What the test wants to know of the page.
STATE = """JSON.stringify({
    verdict: document.body.dataset.verdict ?? null,
    text: document.getElementById("verdict").textContent,
    adapter: document.getElementById("adapter").textContent,
    rows: [...document.querySelectorAll("#results tr")].map((tr) => [...tr.cells].map((td) => td.textContent)),
    pages: document.querySelectorAll("#picture .page").length,
    splits: document.querySelectorAll("#picture .split").length,
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".wgsl": "text/plain"}

    def log_message(self, *_):
        pass


class Browser:
    """Chromium, which reads commands from its file descriptor 3 and answers on 4: JSON, each ended by a zero byte."""

    def __init__(self, program, profile):
        to_browser, commands = os.pipe()
        answers, from_browser = os.pipe()

        def connect():
            # Copied out of the way first: either may be 3 or 4 already.
            read, write = os.dup(to_browser), os.dup(from_browser)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={profile}"],
            preexec_fn=connect,
            close_fds=False,
            stdout=self.log,
            stderr=self.log,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.commands, self.answers, self.pending, self.number = commands, answers, b"", 0

    def call(self, method, session=None, timeout=60, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            while b"\0" in self.pending:
                answer, self.pending = self.pending.split(b"\0", 1)
                answer = json.loads(answer)
                if answer.get("id") == self.number:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']}")
                    return answer["result"]
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.answers, 1 << 16) if ready else b""
            if not data:
                self.log.seek(0)
                tail = self.log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"{method}: the browser did not answer; it said:\n{tail}")
            self.pending += data

    def close(self):
        try:
            self.call("Browser.close", timeout=10)
            self.process.wait(10)
        except Exception:
            self.process.kill()


def run(browser, url, screenshot, limit):
    target = browser.call("Target.createTarget", url=url)["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    state, end = None, time.monotonic() + limit
    while time.monotonic() < end:
        result = browser.call("Runtime.evaluate", session, expression=STATE, returnByValue=True)
        if "exceptionDetails" not in result:
            state = json.loads(result["result"]["value"])
            if state["verdict"]:
                break
        time.sleep(0.2)
    if screenshot:
        size = browser.call("Page.getLayoutMetrics", session)["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = browser.call("Page.captureScreenshot", session, clip=clip, captureBeyondViewport=True)
        Path(screenshot).write_bytes(base64.b64decode(shot["data"]))
    return state


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--screenshot")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--limit", type=float, default=120, help="seconds until the page must have its verdict")
    args = parser.parse_args()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=ROOT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}/examples/web/index.html"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(args.chromium, profile)
        try:
            state = run(browser, url, args.screenshot, args.limit)
            # A page that cannot fail would prove nothing.
            strict = run(browser, url + "?allowance=0.001", None, args.limit)
        finally:
            browser.close()
    if not state:
        sys.exit("the page did not load")
    print(state["adapter"])
    for row in state["rows"]:
        print("  ".join(row))
    print(state["text"], f"({state['pages']} pages and {state['splits']} splits drawn)")
    # The page's word, and what it must have done to be able to give it.
    passed = state["verdict"] == "pass" and len(state["rows"]) >= 5 and state["pages"] > 0 and state["splits"] > 1
    passed = passed and all(row[2] == "pass" for row in state["rows"])
    if not strict or strict["verdict"] != "fail" or "checks passed" not in strict["text"]:
        sys.exit("with a thousandth of the tolerances the page should say that checks failed: " + str(strict))
    sys.exit(0 if passed else "the page's verdict: " + str(state["verdict"]))


if __name__ == "__main__":
    main()
