"""Trains with several processes of which one fails, once for each case, as a script for tests.

python failing_workers.py FOLDER: FOLDER/NAME.json has the exit code, the seconds and what was printed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from workers import Trouble, run_launcher

COMMON = [
    "train", "--model", "workers:troubled", "--method", "rigl", "--sparsity", "0.5", "--batch-size", "16",
    "--data", "synthetic:classes=3,size=8,train=64,val=16", "--epochs", "2", "--operators", "reference",
    "--threads", "1", "--no-report", "--quiet",
]  # fmt: skip
TIMEOUT = ["--process-timeout", "4"]
PATIENT = ["--process-timeout", "60"]
CASES: dict[str, tuple[int, int, list[str], dict[str, str]]] = {
    "hang": (3, 0, TIMEOUT, Trouble("hang").environment),
    "hang-restart": (2, 1, TIMEOUT, Trouble("hang", step=6).environment),
    "stop": (2, 0, TIMEOUT, Trouble("stop").environment),
    "kill": (3, 0, PATIENT, Trouble("kill", rank=2).environment),
    "kill-first": (2, 0, PATIENT, Trouble("kill", rank=0).environment),
    "kill-restart": (2, 1, PATIENT, Trouble("kill", step=6).environment),
    "memory": (2, 0, PATIENT, Trouble("memory").environment),
    "memory-restart": (2, 1, PATIENT, Trouble("memory", step=6).environment),
    "nan": (2, 0, PATIENT, Trouble("nan").environment),
    "nan-restart": (2, 2, PATIENT, Trouble("nan").environment),
    "exception": (2, 0, PATIENT, Trouble("exception").environment),
    "settings": (2, 0, PATIENT, {"WORKER_WORDS_1": "--learning-rate 0.2"}),
}
"""Processes, restarts, flags and what goes wrong."""


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or CASES:
        processes, restarts, flags, environment = CASES[name]
        log, since = folder / f"{name}.log", time.monotonic()
        words = [*COMMON, *flags, "--out", str(folder / name)]
        code = run_launcher(words, processes, restarts, log, environment)
        result = {"code": code, "seconds": time.monotonic() - since, "said": log.read_text().splitlines()}
        (folder / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
