"""Measures the dashboard from its visitors' side: app.py in a separate process, accessed over HTTP.

    python scripts/dev/bench_dashboard.py                 # the model that app.py shows by default
    python scripts/dev/bench_dashboard.py --version DIR --requests 50

Prints one line per measurement; docs/dashboard.md lists them, with their targets.
"""

from __future__ import annotations

import io
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.command_line.parser import Parser
from utils.demo import scenes
from utils.diagnostics.process_memory import resident

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("the red square", "which shape is the largest?", "what is the topmost object?", "the white star")
AT_ONCE = 20
MB = 2**20


class Visitor:
    """A client with a session: its later questions are follow-ups on the same image."""

    def __init__(self, address: str, name: str) -> None:
        self.address, self.name = address, name
        self.http = httpx.Client(base_url=f"{address}/gradio_api", timeout=300)
        functions = self.http.get("/info").json()
        assert "/ask" in functions["named_endpoints"], functions.keys()
        config = httpx.get(f"{address}/config").json()
        self.function = next(f["id"] for f in config["dependencies"] if f["api_name"] == "ask")

    def upload(self, seed: int) -> dict:
        stream = io.BytesIO()
        Image.fromarray(scenes.sample_scene(np.random.default_rng(seed), long_side=480).image).save(stream, "PNG")
        path = self.http.post("/upload", files={"files": (f"{seed}.png", stream.getvalue())}).json()[0]
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def ask(self, image: dict | None, prompt: str) -> float:
        """Seconds from the question to its complete answer."""
        start = time.perf_counter()
        data = [image, prompt, "", "rle", 64]
        self.http.post(
            "/queue/join", json={"data": data, "fn_index": self.function, "session_hash": self.name}
        ).raise_for_status()
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.name}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return time.perf_counter() - start
        raise RuntimeError(f"{self.name} got no answer to {prompt!r}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--version", metavar="DIR", help="as for app.py")
    parser.add_argument(
        "--requests", type=int, default=200, metavar="N", help="new images over which the growth of memory is measured"
    )
    args = parser.parse_args(argv)
    command = [sys.executable, "-u", str(ROOT / "app.py"), *(["--version", args.version] if args.version else [])]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            matches = (re.search(r"http://[\d.:]+", line) for line in server.stdout)
            address = next(match[0] for match in matches if match)
            print(f"model: {httpx.get(f'{address}/health').json()['model']}")
            measure_dashboard(address, server.pid, args.requests)
        finally:
            server.terminate()
    return 0


def measure_dashboard(address: str, process: int, requests: int) -> None:
    first, later = [], []
    for seed in range(10):
        visitor = Visitor(address, f"single{seed}")
        image = visitor.upload(seed)
        first.append(visitor.ask(image, PROMPTS[0]))
        later += [visitor.ask(None, prompt) for prompt in PROMPTS[1:]]
    for name, times in (("first answer on a new image", first), ("follow-up", later)):
        print(f"{name}: median {statistics.median(times):.2f} s, slowest {max(times):.2f} s ({len(times)} questions)")

    visitors = [Visitor(address, f"crowd{n}") for n in range(AT_ONCE)]
    images = [visitor.upload(100 + n) for n, visitor in enumerate(visitors)]
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waits = list(pool.map(lambda pair: pair[0].ask(pair[1], PROMPTS[0]), zip(visitors, images)))
    total = time.perf_counter() - start
    print(f"{AT_ONCE} at once: {len(waits)} answered in {total:.1f} s; waited {min(waits):.2f} to {max(waits):.2f} s")

    before = resident(process) / MB
    for number in range(requests):
        visitor = visitors[number % AT_ONCE]  # more visitors than stay encoded: images are encoded and dropped
        visitor.ask(visitor.upload(1000 + number), PROMPTS[number % len(PROMPTS)])
    after = resident(process) / MB
    growth = (after - before) / before
    print(f"memory over {requests} new images: {before:.0f} MB, then {after:.0f} MB ({growth:+.1%})")


if __name__ == "__main__":
    sys.exit(main())
