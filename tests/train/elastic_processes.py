"""One of several processes that train a run of a number of parts, as a script for tests.

python elastic_processes.py RANK PROCESSES FOLDER NAME...: trains each of RUNS, in FOLDER/NAME-PROCESSES, and
goes on with each of RESUMED, a copy of a stopped run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from several_processes import BASE

from clicktrain.comm.processes import end
from clicktrain.train import RunFolder, from_dict, load_run_config
from clicktrain.train.fit import fit

LOCAL: dict[str, Any] = {**BASE, "sync_batch_norm": False, "epochs": 2}
STEP: dict[str, Any] = {
    **BASE, "method": "dense", "epochs": 1, "learning_rate": 1.0, "momentum": 0.0, "nesterov": False,
    "data": "synthetic:classes=4,size=8,train=16,val=8", "schedule": "constant", "weight_decay": 0.0,
}  # fmt: skip
"""One step, whose change of the weights is the gradient."""
RUNS: dict[str, dict[str, Any]] = {
    "step": STEP,
    "halves": {**STEP, "sync_batch_norm": False, "parts": 2},
    "quarters": {**STEP, "sync_batch_norm": False, "parts": 4},
    "uneven": {**BASE, "method": "clicktrain", "compression": 3, "epochs": 2},
    "local-1": {**LOCAL, "method": "clicktrain", "compression": 3, "parts": 1},
    "local-2": {**LOCAL, "method": "prunetrain", "target_flops": 0.7, "interval": 1, "parts": 2,
                "dynamic_batch": True, "batch_granularity": 3, "learning_rate": 0.05, "epochs": 4},
    "local-3": {**LOCAL, "method": "rigl", "interval": 2, "parts": 3, "accumulate": 2,
                "recalibrate_norms": 2, "ema_decay": 0.5},
    "moving-4": {**LOCAL, "method": "rigl", "interval": 2, "granularity": "pattern", "compression": 3,
                 "parts": 4, "operators": "density"},
}  # fmt: skip


def main(rank: int, processes: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
        }  # fmt: skip
        store = f"file://{folder / f'store-{processes}'}"
        dist.init_process_group("gloo", store, rank=rank, world_size=processes)
    for name in names:
        fit(*from_dict(RUNS[name]), folder / f"{name}-{processes}")
    for path in sorted(folder.glob(f"resumed-*-{processes}")):
        run = RunFolder(path)
        fit(*load_run_config(run), run, resume=True)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    end(0)
