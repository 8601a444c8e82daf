"""The two lines under other people's launchers: one network in all processes, as good as by one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).parent / "launched.py"
PACKAGES = {
    "accelerate_loop": "accelerate", "fabric_loop": "lightning_fabric",
    "lightning_digits": "pytorch_lightning",
}  # fmt: skip
EPOCHS = 12

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed"),
]


def run(example: str, processes: int, folder: Path) -> str:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), example, str(EPOCHS), str(folder)],
        capture_output=True, text=True, timeout=550, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("example", PACKAGES)
def test_the_two_lines_prune_alike_in_all_processes(example: str, processes: int, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES[example]) is None:
        pytest.skip(f"{PACKAGES[example]} is not installed: see docs/integrations.md")
    last = run(example, processes, tmp_path).splitlines()[-1]
    found = re.fullmatch(r"accuracy ([\d.]+)%  compression ([\d.]+)x  processes (\d)", last)
    assert found is not None, last
    assert float(found[1]) > 94
    assert float(found[2]) == pytest.approx(8, rel=0.01)
    assert int(found[3]) == processes
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(processes))
    for other in others:
        for name, value in first.items():
            if "running" not in name:  # statistics of batch norm are each process's own
                assert torch.equal(other[name], value), name
