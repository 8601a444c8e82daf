"""One of two processes that differ, as a script for tests: python unlike_processes.py RANK 2 FOLDER.

FOLDER/copy holds a copy of the package, with a comment more, that the second process runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[3])
if RANK:
    sys.path.insert(0, str(FOLDER / "copy"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from clicktrain.comm.alike import (  # noqa: E402
    check_same_code,
    check_same_data,
    check_same_settings,
    check_same_weights,
)
from clicktrain.comm.processes import end  # noqa: E402
from clicktrain.errors import UserError  # noqa: E402

CHECKS = {
    "code": check_same_code,
    "settings": lambda: check_same_settings({"seed": 3, "threads": RANK, "epochs": 4 + RANK}),
    "own settings": lambda: check_same_settings({"seed": 3, "threads": RANK}),
    "data": lambda: check_same_data("parquet:a", {"number": 7, "checksum of labels": 40 + RANK}),
    "weights": lambda: check_same_weights([torch.ones(3), torch.eye(2) + RANK * 1e-7], "after epoch 3"),
    "same weights": lambda: check_same_weights([torch.ones(3)], "after epoch 3"),
    "same data": lambda: check_same_data("parquet:a", {"number": 7}),
}

dist.init_process_group("gloo", f"file://{FOLDER / 'store'}", rank=RANK, world_size=2)
said = {}
for name, check in CHECKS.items():
    try:
        check()
        said[name] = ["", ""]
    except UserError as error:
        said[name] = [type(error).__name__, str(error)]
(FOLDER / f"said-{RANK}.json").write_text(json.dumps(said))
dist.destroy_process_group()
end(0)
