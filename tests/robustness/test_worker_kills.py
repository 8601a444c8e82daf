"""Runs whose workers are killed end as those that nothing disturbs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("worker_kills.py")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="no processes to fork")
def test_workers_killed_at_random_moments(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--moments", "30", "--seed", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
