"""DSR and RigL through the trainer: the files they leave, and runs that are killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import At, Killed, assert_same_run, kill, resume, run
from tiny_networks import tiny

from clicktrain.report import write_report
from clicktrain.train import RunFolder, load_run

SETTINGS: dict[str, Any] = {
    "model": "tiny_networks:tiny",
    "sparsity": 0.7,
    "interval": 3,
    "stop": 0.5,
    "epochs": 4,
    "threads": 1,
    "operators": "reference",
    "learning_rate": 0.05,
}
PRUNED = {"3", "7", "13"}


@pytest.mark.parametrize("method", ["rigl", "dsr"])
def test_the_files_of_a_run(tmp_path: Path, method: str) -> None:
    summary = run(tmp_path / "run", {**SETTINGS, "method": method, "seed": 3})
    folder = RunFolder(tmp_path / "run")
    assert summary["hard_prune_epoch"] == 2.0
    assert summary["sparsity_asked"] == 0.7
    metrics = folder.read_metrics()
    assert [line["stage"] for line in metrics] == ["dynamic", "fixed", "fixed", "fixed"]
    assert metrics[1]["stages"] == {"dynamic": 1.0}
    density = {line["density"] for line in metrics}
    assert max(density) - min(density) < 0.05  # of convolutions; DSR moves weights to the head and back
    dense = metrics[0]["train_flops"]
    assert (
        metrics[1]["train_flops"] == 2 * dense == metrics[1]["train_flops_dense"]
    )  # until positions are fixed
    assert metrics[2]["train_flops"] - metrics[1]["train_flops"] < 0.7 * dense
    loaded = load_run(folder.path, model=tiny)
    assert set(loaded.masks) == PRUNED
    for name in PRUNED:
        weight = loaded.model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert not weight[~loaded.masks[name]].any()
    events = [event["event"] for event in folder.read_events()]
    assert events.count("regrown") >= 4
    assert events[:1] == ["stage"]
    page = write_report([folder.path], tmp_path / "report.html").read_text("utf-8")
    assert {"rigl": "RigL", "dsr": "DSR"}[method] in page
    again = run(tmp_path / "again", {**SETTINGS, "method": method, "seed": 4})
    assert again["seed"] == 4
    masks = load_run(tmp_path / "again", model="tiny_networks:tiny").masks
    assert any(not torch.equal(masks[name], loaded.masks[name]) for name in PRUNED)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rigl"},
        {"method": "rigl", "granularity": "kernel", "growth": "random", "ema_decay": 0.9, "accumulate": 2},
        {"method": "dsr", "packed": False, "optimizer": "adam", "learning_rate": 3e-3, "exclude": ["7"]},
    ],
    ids=["rigl", "set-kernel-average", "dsr-masked-adam"],
)
def test_killed_in_each_stage(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**SETTINGS, "epochs": 3, **settings}
    run(tmp_path / "whole", settings)
    for batch, stage in ((14, "dynamic"), (28, "fixed")):
        progress = At(batch, kill)
        with pytest.raises(Killed):
            run(tmp_path / stage, settings, progress)
        assert progress.stage == stage
        resume(tmp_path / stage)
        assert_same_run(tmp_path / stage, tmp_path / "whole")
