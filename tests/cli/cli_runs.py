"""The command line as a person uses it, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from clicktrain.cli import main

DATA = "synthetic:classes=3,size=8,channels=1,train=96,val=33"
TINY = ("--model", "resnet20", "--width", "0.25", "--data", DATA, "--batch-size", "32", "--threads", "1")
"""A run of three batches per epoch."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Outcome:
    """The command line in this process; standard output and error as text."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with size and time of change: all that a writer would change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.stat()
        found[str(path.relative_to(folder))] = (facts.st_size if path.is_file() else -1, facts.st_mtime_ns)
    return found


def spawn(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "clicktrain", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cwd)
