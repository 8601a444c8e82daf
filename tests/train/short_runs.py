"""Start, kill and compare short runs on the embedded digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clicktrain.train import RunFolder, Silent, StepProgress, from_dict, load_run_config
from clicktrain.train.fit import fit

HERE = Path(__file__).parent
BATCHES = 11
"""Per epoch: 1,437 images in batches of 128, the last one dropped."""

DENSE: dict[str, Any] = {"model": "tiny_networks:tiny", "method": "dense", "epochs": 2, "threads": 1}
FIVE_STAGES: dict[str, Any] = {
    "model": "tiny_networks:tiny",
    "method": "clicktrain",
    "compression": 4,
    "epochs": 6,
    "threads": 1,
    "operators": "reference",
    "learning_rate": 0.05,
    "earliest_start": 0.3,
    "latest_start": 0.3,
    "pool_length": 0.15,
    "finalize_length": 0.15,
    "regularize_length": 0.15,
}
BATCH_IN_STAGE = {"dense": 14, "pool": 26, "finalize": 38, "regularize": 48, "accelerated": 60}
"""A batch of the run, counted from 1, inside each stage; all but the first have a checkpoint in it."""


class Killed(BaseException):
    """Stands for the end of the process, which nothing may catch."""


class At(Silent):
    """Does something when a batch of the run, counted from 1, is done; remembers what it is told."""

    def __init__(self, batch: int, action: Callable[[], None]) -> None:
        self.batch, self.action = batch, action
        self.messages: list[str] = []
        self.stage = ""

    def step(self, info: StepProgress) -> None:
        if (info.epoch - 1) * info.batches + info.batch == self.batch:
            self.stage = info.stage
            self.action()

    def message(self, text: str) -> None:
        self.messages.append(text)


class Messages(At):
    """Only remembers what it is told."""

    def __init__(self) -> None:
        super().__init__(-1, lambda: None)


def run(path: Path, settings: Mapping[str, Any], progress: Silent | None = None) -> dict[str, Any]:
    return dict(fit(*from_dict(settings), path, progress=progress))


def resume(path: Path, progress: Silent | None = None) -> dict[str, Any]:
    folder = RunFolder(path)
    return dict(fit(*load_run_config(folder, _model(folder)), folder, progress=progress, resume=True))


def _model(folder: RunFolder) -> str:
    """What a user types as --model: the network that these tests have chosen themselves."""
    return load_run_config(folder, own_model_allowed=True)[0].model


def kill() -> None:
    raise Killed


def send_sigkill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


TIMES = {
    "seconds",
    "planning_seconds",
    "data_seconds",
    "step_ms_median",
    "train_seconds",
    "total_train_seconds",
    "data_share",
    "step_ms",
}


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, and every line and number that is not a time, are the same to the last bit."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
    one, two = RunFolder(first), RunFolder(second)
    assert [without_times(r) for r in one.read_metrics()] == [without_times(r) for r in two.read_metrics()]
    assert [without_times(e) for e in one.read_events()] == [without_times(e) for e in two.read_events()]
    assert one.read_channels() == two.read_channels()
    summary, other = one.summary(), two.summary()
    assert summary is not None
    assert other is not None
    assert without_times(summary) == without_times(other)


CHILD = """
import json, os, signal, sys
from pathlib import Path
from short_runs import At, resume, run
from clicktrain.train import TrainingInterrupted
what, path, settings, batch, signum = json.loads(sys.argv[1])
progress = At(batch, lambda: os.kill(os.getpid(), signum))
try:
    run(Path(path), settings, progress) if what == "run" else resume(Path(path), progress)
except TrainingInterrupted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


def run_in_process(
    path: Path, settings: Mapping[str, Any], batch: int, signum: int
) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own that gets a signal when a batch is done."""
    arguments = json.dumps(["run", str(path), dict(settings), batch, signum])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)])}
    return subprocess.run(
        [sys.executable, "-c", CHILD, arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,  # a loaded machine is slow to start Python
        check=False,
    )
