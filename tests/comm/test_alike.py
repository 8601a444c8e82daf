"""Processes with other code, settings or data are named before anything is trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from start_processes import run_together

from clicktrain.data import fingerprint, open_data

SCRIPT = Path(__file__).parent / "unlike_processes.py"


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_the_process_that_differs_is_named_by_the_first_one(tmp_path: Path, repository: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "papers", "report")
    shutil.copytree(repository / "clicktrain", tmp_path / "copy" / "clicktrain", ignore=ignored)
    with (tmp_path / "copy" / "clicktrain" / "wording.py").open("a") as file:
        file.write("# another commit\n")
    run_together(SCRIPT, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    patterns = {
        "code": r"process 1 runs clicktrain .+ \(sources [0-9a-f]{8}\), the first one .+ "
        r"\(sources [0-9a-f]{8}\): install the same for all of them",
        "settings": "process 1 has epochs 5, the first one 4: give the same settings to all of them",
        "data": "process 1 has other data of parquet:a than the first one: checksum of labels 41 instead of "
        "40; give the same files to all of them",
        "weights": "after epoch 3 process 1 has other weights than the first one: do all of them run the "
        r"same version on the same data\?",
        "same weights": "",
        "own settings": "",
        "same data": "",
    }
    for name, pattern in patterns.items():
        assert re.fullmatch(pattern, first[name][1]), first[name]
        assert second[name][0] == ("FailedElsewhere" if pattern else "")


def test_a_fingerprint_changes_with_images_and_labels() -> None:
    spec = "synthetic:classes=3,size=8,train=30,val=9"
    first, again, other = open_data(spec), open_data(spec), open_data(spec)
    assert fingerprint(first) == fingerprint(again)
    other.train.images[17, 0, 3, 3] ^= 1  # type: ignore[union-attr]
    other.val.labels[2] = torch.tensor((int(other.val.labels[2]) + 1) % 3)
    differing = {name for name, value in fingerprint(other).items() if fingerprint(first)[name] != value}
    assert differing == {"checksum of pixels of training images", "checksum of labels of validation images"}
