"""Machines that join and leave a running `torchrun --nnodes=1:2`: the run goes on in as many processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TRAIN = ["--data", "digits", "--model", "resnet8", "--width", "0.5", "--epochs", "30", "--batch-size", "64",
         "--method", "clicktrain", "--compression", "4", "--resume"]  # fmt: skip
LONGEST_S = 240


@contextmanager
def machine(folder: Path, name: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An agent of torchrun's; what it and its process say is in a file of its name."""
    meet = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run",
            "--rdzv-conf=last_call_timeout=2"]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", *meet, "--nproc-per-node=1", "--max-restarts=9"]
    command = [*start, "-m", "clicktrain", "train", *TRAIN, "--out", str(folder / "run")]
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / name).open("wb") as said:
        agent = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | settings, start_new_session=True
        )
        try:
            yield agent
        finally:
            agent.terminate()  # it ends its process
            try:
                agent.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(agent.pid, signal.SIGKILL)
                agent.wait()


def wait(until: Callable[[], bool], *agents: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LONGEST_S
    while not until():
        assert time.monotonic() < end, "it does not come"
        assert all(agent.poll() is None for agent in agents), "it has ended"
        time.sleep(0.1)


def lines(run: Path) -> list[dict[str, object]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_one_machine_two_one(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    run, first_said = tmp_path / "run", tmp_path / "first"
    with machine(tmp_path, "first", port) as first:
        wait(lambda: len(lines(run)) >= 2, first)
        with machine(tmp_path, "second", port) as second:
            wait(lambda: "in 2 processes" in first_said.read_text(), first, second)
            had = len(lines(run))
            wait(lambda: len(lines(run)) > had + 1, first, second)
        assert first.wait(LONGEST_S) == 0, first_said.read_text()[-2000:]
    assert "Traceback" not in first_said.read_text()
    assert [line["epoch"] for line in lines(run)] == list(range(1, 31)), "an epoch twice, or none"
    summary = json.loads((run / "summary.json").read_text())
    assert 3.9 < summary["compression_ratio"] < 4.1
