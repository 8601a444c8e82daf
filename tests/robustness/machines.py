"""Launchers of two machines, of which one comes later and is lost, as a script for tests.

python machines.py FOLDER: a run that one process begins, two continue and one ends, in FOLDER/run, and one
that nothing disturbs, in FOLDER/whole; FOLDER/machines.json has the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from workers import lead

WORDS = [
    "train", "--model", "workers:troubled", "--method", "rigl", "--sparsity", "0.5", "--batch-size", "16",
    "--data", "synthetic:classes=3,size=8,train=256,val=16", "--epochs", "60", "--operators", "reference",
    "--threads", "1", "--no-report", "--resume",
]  # fmt: skip


def launcher(port: int, folder: Path, name: str) -> int:
    """Fork one machine's launcher, which waits a second for others; its process, the first of a group."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    meeting = {
        "max_nodes": 2, "run_id": "machines", "rdzv_endpoint": f"localhost:{port}",
        "rdzv_configs": {"last_call_timeout": 1, "keep_alive_interval": 1, "keep_alive_max_attempt": 2},
    }  # fmt: skip
    words = [*WORDS, "--out", str(folder / "run")]
    os._exit(lead(words, 1, 3, folder / f"{name}.log", meeting=meeting))


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not what():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    whole = os.fork()
    if not whole:
        os._exit(lead([*WORDS, "--out", str(folder / "whole")], 1, 0, folder / "whole.log"))
    codes = {"whole": os.waitstatus_to_exitcode(os.waitpid(whole, 0)[1])}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def lines() -> int:
        path = folder / "run" / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def said() -> str:
        return "".join(log.read_text() for log in folder.glob("machine-*.log"))

    stays = launcher(port, folder, "machine-1")
    until(lambda: lines() >= 2)
    comes = launcher(port, folder, "machine-2")
    until(lambda: "in 2 processes" in said())
    before = lines()
    until(lambda: lines() > before)
    os.killpg(comes, signal.SIGKILL)
    os.waitpid(comes, 0)
    codes["stays"] = os.waitstatus_to_exitcode(os.waitpid(stays, 0)[1])
    codes["epochs before and after"] = [before, lines()]
    (folder / "machines.json").write_text(json.dumps({"codes": codes, "said": said()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
