"""One of several processes fails: one sentence names it, and the launcher starts all of them again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parent / "failing_workers.py"
KEPT = "the last checkpoint is kept"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available() or not hasattr(os, "fork"), reason="no processes to fork"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failing")


def outcome(name: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What became of a case, and the sentences that were printed."""
    path = folder / f"{name}.json"
    if not path.exists():  # all at once: PyTorch is imported once
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
        subprocess.run([sys.executable, str(SCRIPT), str(folder)], env=environment, check=True, timeout=600)
    result = json.loads(path.read_text())
    said = [line for line in result["said"] if "Terminating process" not in line]
    return result, [line for line in said if "asked" not in line or "error" in line]


@pytest.mark.parametrize(("name", "code", "sentence"), [
    ("hang", 2, "process 1 of 3 has not arrived within 4 seconds (--process-timeout): process 1 is at "
     "robustness/workers.py, line "),
    ("stop", 2, "process 1 of 2 has died without a word (killed, or out of memory?), or been stopped or cut "
     "off; " + KEPT),
    ("kill", 137, "process 2 of 3 has died without a word (killed, or out of memory?), or been stopped or "
     "cut off; " + KEPT),
    ("kill-first", 137, "process 1: error: process 0 of 2 has died without a word"),
    ("memory", 2, "process 1: error: there is no memory left for batches of 16 images: lower batch_size or "
     "width, or share the batch among more processes"),
    ("nan", 2, "training diverged: the loss is nan in process 1 in epoch 1 after batch 3; the last good "),
    ("settings", 2, "process 1 has learning_rate 0.2, the first one 0.1: give the same settings to all"),
])  # fmt: skip
def test_one_sentence_names_the_process(name: str, code: int, sentence: str, folder: Path) -> None:
    result, said = outcome(name, folder)
    assert result["code"] == code
    assert len(said) == 1
    assert sentence in said[0]
    assert (folder / name / "checkpoints").is_dir() == (name != "settings")


def test_an_unexpected_error_is_that_of_its_process_alone(folder: Path) -> None:
    result, said = outcome("exception", folder)
    assert result["code"] == 1
    assert said[-1] == "ZeroDivisionError: in a network of somebody's own"
    assert sum(line.startswith("Traceback") for line in said) == 1
    assert not any("error:" in line for line in said)


@pytest.mark.parametrize("name", ["hang", "kill", "memory"])
def test_all_begin_again_after_what_may_pass(name: str, folder: Path) -> None:
    result, said = outcome(f"{name}-restart", folder)
    assert result["code"] == 0
    assert len(said) == 1
    assert (folder / f"{name}-restart" / "summary.json").is_file()


def test_what_will_not_pass_is_not_tried_again(folder: Path) -> None:
    result, said = outcome("nan-restart", folder)
    assert result["code"] == 2
    assert len(said) == 1
    assert "training diverged: the loss is nan in process 1" in said[0]
