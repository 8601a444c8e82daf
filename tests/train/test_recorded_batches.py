"""A run whose steps are replayed makes the network of a run whose steps are not, through all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from operator_tape import OperatorTape
from short_runs import Silent

from clicktrain.compiler import recorded_step
from clicktrain.runs.folder import RunFolder
from clicktrain.train import from_dict
from clicktrain.train.epoch import train_epoch
from clicktrain.train.interrupt import StopRequest
from clicktrain.train.prepare import prepare
from clicktrain.train.training_run import TrainingRun

SMALL: dict[str, Any] = {
    "model": "resnet8",
    "width": 0.125,
    "data": "synthetic:classes=4,size=8,train=72,val=8",
    "batch_size": 8,
    "epochs": 3,
    "threads": 1,
    "mixup": 0.2,
    "accumulate": 2,
    "operators": "reference",
    "device": "cpu",
}


def trained(folder: Path, **settings: Any) -> TrainingRun:
    run = TrainingRun(prepare(*from_dict({**SMALL, **settings})), RunFolder(folder), Silent())
    run.begin()
    for epoch in range(3):
        train_epoch(run, StopRequest())
        run.state.epoch, run.state.batch = epoch + 1, 0
    return run


@pytest.mark.long
@pytest.mark.parametrize("method", ["clicktrain", "rigl"])
def test_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(recorded_step, "CudaGraphs", OperatorTape)
    mine = trained(tmp_path / "mine", method=method, cuda_graphs=True)
    plain = trained(tmp_path / "plain", method=method)
    assert mine.recorded is not None
    assert mine.recorded.replays > 3
    state, other = (run.prepared.model.state_dict() for run in (mine, plain))
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def test_without_a_gpu_it_says_so_and_trains(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="CUDA graphs are for NVIDIA GPUs, and this runs on cpu"):
        trained(tmp_path / "run", method="dense", cuda_graphs=True, epochs=3)
