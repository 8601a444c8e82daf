"""Starts the processes of one measurement: ``python -m clicktrain.bench.exchange.hub JSON``.

Over virtual Ethernet it runs in a network namespace of its own, with a bridge that all processes hang on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clicktrain.bench.exchange.children import end_with_parent, termination_as_exit
from clicktrain.bench.exchange.links import DEVICE, tool

_TAIL = 1500
"""Characters of what a process said last."""


def main(job: dict[str, Any]) -> int:
    """Run all processes to their end; the exit code is 0 if all of theirs are."""
    end_with_parent(job["parent"])
    folder = Path(job["store"]).parent
    if job["wired"]:
        tool("ip", "link", "set", "lo", "up")
        tool("ip", "link", "add", "hub", "type", "bridge")
        tool("ip", "link", "set", "hub", "up")
    text = json.dumps({**job, "parent": os.getpid()})
    alone = ["unshare", "--net"] if job["wired"] else []
    processes = []
    for rank in range(job["processes"]):
        command = [*alone, sys.executable, "-m", "clicktrain.bench.exchange.worker", text, str(rank)]
        out = None if rank == 0 else subprocess.DEVNULL
        with (folder / f"{rank}.err").open("w") as errors:
            processes.append(subprocess.Popen(command, stdout=out, stderr=errors))
    try:
        if job["wired"]:
            for rank, process in enumerate(processes):
                _connect(rank, process)
        return _end_of(processes, folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _connect(rank: int, process: subprocess.Popen[bytes]) -> None:
    """Put one end of a virtual Ethernet pair into the process's namespace, the other one on the bridge."""
    own = os.readlink("/proc/self/ns/net")
    while process.poll() is None and os.readlink(f"/proc/{process.pid}/ns/net") == own:
        time.sleep(0.01)
    name = f"port{rank}"
    tool("ip", "link", "add", name, "type", "veth", "peer", "name", DEVICE, "netns", str(process.pid))
    tool("ip", "link", "set", name, "master", "hub")
    tool("ip", "link", "set", name, "up")


def _end_of(processes: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """Wait until all have ended, or one has failed: then the others would wait for it."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # Whoever was killed has ended first, and others by an error of their own: name that one.
            rank = next((rank for rank in failed if (codes[rank] or 0) < 0), failed[0])
            said = (folder / f"{rank}.err").read_text(errors="replace").strip()[-_TAIL:]
            print(f"process {rank} of {len(processes)} ended with {codes[rank]}: {said}", file=sys.stderr)
            return 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


if __name__ == "__main__":
    with termination_as_exit():
        sys.exit(main(json.loads(sys.argv[1])))
