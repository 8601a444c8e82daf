"""Run as a script: stream an epoch and say what memory it took, and what each batch was.

python shard_memory.py SPEC CACHE PROCESSES START: batches from START on, as PROCESSES processes share them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import sys
from pathlib import Path

import pyarrow.parquet  # noqa: F401 - what opening imports counts for nothing
import torch
from PIL import Image

from clicktrain.data import Augment, Part, make_loader, open_data


def main(spec: str, cache_dir: str, processes: int, start: int) -> None:
    Image.init()
    imported = _resident()
    data = open_data(spec, cache_dir=Path(cache_dir), workers=0, shuffle_buffer=4096, holdout=1000)
    opened = _peak() - imported
    loaders = [
        make_loader(
            data, "train", batch_size=200, device=torch.device("cpu"), seed=3, augment=Augment(flip=True),
            drop_last=True, part=Part(index, processes),
        )
        for index in range(processes)
    ]  # fmt: skip
    digests, resident = [], []
    for parts in zip(*(loader.epoch(1, start) for loader in loaders), strict=True):
        x, y = (torch.cat([batch[part] for batch in parts]) for part in (0, 1))
        digests.append(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()[:16])
        resident.append(_resident())
    quarter = max(len(resident) // 4, 1)
    growth = statistics.median(resident[-quarter:]) - statistics.median(resident[:quarter])
    spread = max(resident) - min(resident)
    print(
        json.dumps(
            {
                "opened": opened,
                "growth": growth,
                "spread": spread,
                "digests": digests,
                "images": len(data.train),
            }
        )
    )


def _resident() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    # Not ru_maxrss: over fork and exec that is at least what the process which started this one had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
