"""Measure examples/serve.py on this machine: throughput and latency, engine by engine, at the same endpoint.

    python examples/load_test.py runs/NAME --clients 1 16 64

For every engine whose files and packages are there a server is started on a free port of 127.0.0.1.
Clients, each with a connection of its own, send random images one after another; every answer is compared
with the plain network's. Then comes a row: requests a second, the median and the 99th percentile of the time
to an answer, and how many images were computed together. Clients share the processor with the server:
compare engines, not machines.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ENGINES = ("c", "accelerate", "torch", "onnxruntime", "openvino")
DIFFERENT_IMAGES = 64
TOLERANCE = 0.1
"""Share of the largest logit: OpenVINO computes in bfloat16 where the processor has it."""
START_SECONDS = 180
REQUEST_SECONDS = 60


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """serve.py in a process of its own; a context, which ends it."""

    def __init__(self, run: Path, engine: str, more: list[str]) -> None:
        self.port = free_port()
        command = [sys.executable, str(HERE / "serve.py"), str(run)]
        command += ["--engine", engine, "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *more],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Server:
        return self

    def wait(self) -> str | None:
        """Until it answers; why it does not, if it ends or takes too long."""
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self.process.poll() is not None:
                return (self.process.stderr.read().strip().split("\n") or [""])[-1]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return None
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        return f"it did not answer within {START_SECONDS} s"

    def __exit__(self, *error: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            try:
                self.process.wait(30)
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.stderr.close()


async def client(
    port: int, bodies: list[bytes], places: list[int], taken: list[float], answers: list[Any]
) -> None:
    """Send images one after another on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for place in places:
            body = bodies[place]
            head = (
                f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            began = time.perf_counter()
            writer.write(head.encode() + body)
            lines = (
                (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_SECONDS))
                .decode()
                .split("\r\n")
            )
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            answer = await reader.readexactly(int(fields["content-length"]))
            taken.append(time.perf_counter() - began)
            if not lines[0].startswith("HTTP/1.1 200"):
                raise RuntimeError(f"{lines[0]}: {answer.decode()[:200]}")
            answers.append((place, answer))
    finally:
        writer.close()


async def load(
    port: int, bodies: list[bytes], clients: int, requests: int
) -> tuple[float, list[float], list[Any]]:
    """Seconds in all, seconds of each request, and the answers."""
    each = -(-requests // clients)
    taken: list[float] = []
    answers: list[Any] = []
    began = time.perf_counter()
    ways = [[(number * each + i) % len(bodies) for i in range(each)] for number in range(clients)]
    await asyncio.gather(*(client(port, bodies, places, taken, answers) for places in ways))
    return time.perf_counter() - began, taken, answers


def images_and_logits(run: Path) -> tuple[list[bytes], np.ndarray]:
    """Bodies of requests, and what the plain network makes of them."""
    import torch
    from safetensors import safe_open

    import clicktrain

    with safe_open(run / "model.safetensors", framework="numpy") as file:
        facts = json.loads(file.metadata()["clicktrain"])
    c, h, w = facts["image_shape"]
    pixels = np.random.default_rng(0).integers(0, 256, (DIFFERENT_IMAGES, h, w, c), np.uint8)
    images = (pixels.astype(np.float32) / 255 - np.float32(facts["mean"])) / np.float32(facts["std"])
    with torch.inference_mode():
        logits = clicktrain.load(run)(torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))))
    return [one.tobytes() for one in pixels], logits.numpy()


def wrong_answers(answers: list[Any], logits: np.ndarray) -> tuple[int, float]:
    """How many answers are off, and the mean number of images that were computed together."""
    wrong, together = 0, 0
    scale = float(np.abs(logits).max())
    for place, text in answers:
        answer = json.loads(text)
        worst = float(np.abs(np.float32(answer["logits"]) - logits[place]).max())
        wrong += not worst <= TOLERANCE * scale
        together += answer["batch"]
    return wrong, together / max(len(answers), 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=2000, help="for each row")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    given, more = parser.parse_known_args()  # --workers, --max-batch and the like are serve.py's
    if min(given.clients) < 1 or max(given.clients) > 1000 or not 1 <= given.requests <= 1_000_000:
        parser.error("clients are 1 to 1000, requests 1 to 1,000,000")
    bodies, logits = images_and_logits(given.run)
    rows: list[dict[str, Any]] = []
    print(f"{'engine':<12} {'clients':>7} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8} {'batch':>6}")
    for engine in given.engines:
        with Server(given.run, engine, more) as server:
            if (reason := server.wait()) is not None:
                print(f"{engine:<12} not measured: {reason}")
                continue
            asyncio.run(load(server.port, bodies, max(given.clients), max(given.clients) * 5))  # warm
            for clients in given.clients:
                seconds, taken, answers = asyncio.run(load(server.port, bodies, clients, given.requests))
                wrong, together = wrong_answers(answers, logits)
                if wrong:
                    print(f"{engine}: {wrong} of {len(answers)} answers are wrong", file=sys.stderr)
                    return 1
                p50, p99 = (1000 * float(np.percentile(taken, q)) for q in (50, 99))
                rate = len(taken) / seconds
                print(
                    f"{engine:<12} {clients:>7} {rate:>11.1f} {p50:>8.2f} {p99:>8.2f} {together:>6.1f}",
                    flush=True,
                )
                rows.append(
                    {"engine": engine, "clients": clients, "requests_per_second": rate, "p50_ms": p50,
                     "p99_ms": p99, "images_together": together}
                )  # fmt: skip
    if given.json:
        given.json.write_text(
            json.dumps({"run": str(given.run), "served": more, "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
