"""A machine comes and is lost: the run goes on with as many processes as there are, and ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from clicktrain.train import RunFolder

SCRIPT = Path(__file__).parent / "machines.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="no processes to fork"),
]


def test_a_machine_comes_and_is_lost(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], env=environment, check=True, timeout=900)
    result = json.loads((tmp_path / "machines.json").read_text())
    assert (result["codes"]["whole"], result["codes"]["stays"]) == (0, 0), result["said"]
    assert "in 2 processes" in result["said"]
    runs = [RunFolder(tmp_path / name) for name in ("run", "whole")]
    assert [line["epoch"] for line in runs[0].read_metrics()] == list(range(1, 61))
    decisions = []
    for run in runs:
        lines = run.read_events()
        decisions.append(
            [{k: v for k, v in a.items() if not isinstance(v, float | list | dict)} for a in lines]
        )
    assert decisions[0] == decisions[1]
    mine, whole = (load_file(run.model) for run in runs)
    for name, value in whole.items():
        assert bool(((mine[name] != 0) == (value != 0)).all()) or value.dim() < 2, name
        assert float((mine[name] - value).abs().max()) <= 2e-2 * max(float(value.abs().max()), 1), name


def test_workers_killed_at_random_moments(tmp_path: Path) -> None:
    script = SCRIPT.with_name("worker_kills.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(script), "--out", str(tmp_path), "--moments", "30", "--seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
