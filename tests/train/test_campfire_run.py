"""Campfire through the trainer: the files it leaves, and runs that are killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import At, Killed, assert_same_run, kill, resume, run, weights
from tiny_networks import tiny

from clicktrain.accounting import count
from clicktrain.formats.packed_file import load_packed
from clicktrain.report import write_report
from clicktrain.train import RunFolder, load_run

SETTINGS: dict[str, Any] = {
    "model": "tiny_networks:tiny",
    "method": "campfire",
    "granularity": "combined",
    "sparsity": 0.7,
    "era": [1, 3],
    "epochs": 4,
    "threads": 1,
    "operators": "reference",
    "learning_rate": 0.05,
}
BATCH_IN_STAGE = {"dense": 5, "era": 28, "fixed": 40}


def test_the_files_of_a_run(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", SETTINGS)
    folder = RunFolder(tmp_path / "run")
    assert summary["hard_prune_epoch"] == 3.0
    metrics = folder.read_metrics()
    assert [line["stage"] for line in metrics] == ["era", "era", "fixed", "fixed"]
    assert metrics[0]["sparsity"] == 0.0
    assert 0.5 < metrics[1]["sparsity"] < metrics[2]["sparsity"] == metrics[3]["sparsity"]
    dense = metrics[0]["train_flops"]
    assert metrics[2]["train_flops"] == 3 * dense  # nothing is saved while weights may come back
    assert metrics[3]["train_flops"] - metrics[2]["train_flops"] < 0.6 * dense
    loaded = load_run(folder.path, model=tiny)
    pruned = {"3", "7", "13"}
    assert set(loaded.masks) == pruned
    for name in pruned:
        weight = loaded.model.get_submodule(name).weight
        assert loaded.masks[name].shape == weight.shape
        assert torch.equal(weight != 0, loaded.masks[name])
    cost = count(loaded.model, torch.zeros(1, *loaded.image_shape), loaded.masks)
    assert cost.compression_ratio == pytest.approx(summary["compression_ratio"])
    assert cost.nonzero_parameters == summary["nonzero_parameters"]
    event = next(e for e in folder.read_events() if e["event"] == "hard_prune")
    rows = {row["name"]: row for row in summary["layers"]}
    for layer in event["layers"]:
        assert 1 - layer["true_sparsity"] == pytest.approx(rows[layer["name"]]["density"])
    packed, plain = load_packed(folder.packed), weights(folder.path)
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[name], plain[name]) for name in plain)
    page = write_report([folder.path], tmp_path / "report.html").read_text("utf-8")
    assert "era" in page


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "pattern", "criterion": "taylor", "rise": "step", "ema_decay": 0.9, "accumulate": 2},
        {"granularity": "ck", "regrow": False, "linear": "block", "packed": False, "optimizer": "adamw",
         "learning_rate": 3e-3, "within": "filter"},
    ],
    ids=["combined", "pattern-average", "masked-adamw"],
)  # fmt: skip
def test_killed_in_each_stage(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**SETTINGS, **settings}
    run(tmp_path / "whole", settings)
    for stage, batch in BATCH_IN_STAGE.items():
        progress = At(batch, kill)
        with pytest.raises(Killed):
            run(tmp_path / stage, settings, progress)
        assert progress.stage == stage
        resume(tmp_path / stage)
        assert_same_run(tmp_path / stage, tmp_path / "whole")
