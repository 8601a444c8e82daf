"""One of several processes that train on streamed shards until they are stopped; a script of the tests.

python shards_processes.py RANK PROCESSES FOLDER: trains FOLDER/stopped with FOLDER/settings.json, and stops
in the middle of the second epoch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from short_runs import At, run

from clicktrain.comm.processes import end
from clicktrain.train import TrainingInterrupted

BATCH = 14
"""After which the signal comes, counted from the beginning of the run."""


def main(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=processes)
    stop = At(BATCH, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run(folder / "stopped", json.loads((folder / "settings.json").read_text()), stop)
    except TrainingInterrupted as stopped:
        (folder / f"stopped-{rank}.txt").write_text(str(stopped))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end(0)
