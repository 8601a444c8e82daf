"""Processes that are killed at random moments and resumed end as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "kills.py"


def disturb(out: Path, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KILLS.parents[2])}
    command = [sys.executable, str(KILLS), "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "result.json").read_text())["wrong"] == []


@pytest.mark.long
def test_a_few_moments(tmp_path: Path) -> None:
    disturb(tmp_path, "--moments", "4", "--seed", "3", "--runs", "pat", "rigl")


@pytest.mark.slow
def test_moments_in_every_method(tmp_path: Path) -> None:
    disturb(tmp_path, "--moments", "150", "--seed", "1")
