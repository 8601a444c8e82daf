"""Pruning after training by ADMM, as a run of the trainer: its cost, its course, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import DENSE, At, Killed, assert_same_run, kill, resume, run, weights

from clicktrain.errors import UserError
from clicktrain.kernels.native import toolchain
from clicktrain.report import write_report
from clicktrain.report.run_data import read_runs
from clicktrain.train import RunFolder, from_dict, load_run
from clicktrain.train.prepare import prepare

ADMM: dict[str, Any] = {**DENSE, "method": "admm-patterns", "compression": 4, "operators": "reference",
                        "learning_rate": 0.02, "epochs": 3, "iterations": 5}  # fmt: skip
ONE_SHOT: dict[str, Any] = {**DENSE, "method": "clicktrain", "preset": "one-shot", "earliest_start": 0.0,
                            "latest_start": 0.0, "compression": 4, "operators": "reference",
                            "learning_rate": 0.02, "epochs": 3}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, DENSE)
    return path


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, {**ADMM, "initial_weights": str(trained)})
    return path


def test_its_course_and_what_it_costs(trained: Path, whole: Path) -> None:
    folder = RunFolder(whole)
    kinds = [event["event"] for event in folder.read_events()]
    assert kinds[:2] == ["pool", "stage"]
    assert kinds.count("admm") == 4
    assert kinds[6:9] == ["finalised", "hard_prune", "stage"]
    summary, before = folder.summary(), RunFolder(trained).summary()
    assert summary is not None
    assert before is not None
    assert summary["compression_ratio"] == pytest.approx(4, rel=0.05)
    assert summary["hard_prune_epoch"] == pytest.approx(1.5, abs=0.1)
    # Dense until masks are frozen, then as many FLOPs as are left; the dense run's training included.
    assert 0.5 < summary["train_flops_ratio"] < 0.85
    spent = before["train_flops"] + summary["train_flops"]
    dense = summary["train_flops"] / summary["train_flops_ratio"]
    assert dense == pytest.approx(1.5 * before["train_flops"])  # 3 epochs against 2
    assert summary["total_train_flops_ratio"] == pytest.approx(spent / dense)
    assert summary["total_train_seconds"] == before["train_seconds"] + summary["train_seconds"]
    (event,) = [event for event in folder.read_events() if event["event"] == "pool"]
    pool = {p["bits"] for p in event["pools"][0]["patterns"]}
    for name, mask in load_run(whole, model="tiny_networks:tiny").masks.items():
        kept = [sum(1 << i for i in range(9) if k[i]) for k in mask.flatten(2).flatten(0, 1).tolist()]
        assert set(kept) - {0} <= pool, name
        assert len(mask.flatten(1).sum(dim=1).unique()) == 1, name
    page = write_report([whole], whole.parent / "report.html").read_text("utf-8")
    for words in ("ADMM patterns", "auxiliary weights updated", "pattern pool chosen"):
        assert words in page


def test_one_shot_after_training_is_accounted_for_alike(trained: Path, whole: Path, tmp_path: Path) -> None:
    """The second baseline: magnitudes once, on the trained weights."""
    summary = run(tmp_path / "run", {**ONE_SHOT, "initial_weights": str(trained)})
    admm = RunFolder(whole).summary()
    assert admm is not None
    assert summary["hard_prune_epoch"] < 0.3
    assert summary["initial_train_flops"] == admm["initial_train_flops"]
    dense = summary["train_flops"] / summary["train_flops_ratio"]
    assert summary["total_train_flops_ratio"] == pytest.approx(
        (summary["train_flops"] + summary["initial_train_flops"]) / dense
    )
    assert summary["total_train_flops_ratio"] < admm["total_train_flops_ratio"]
    ratios = [shown.train_flops_ratio for shown in read_runs([whole, tmp_path / "run"])]
    assert ratios == [admm["total_train_flops_ratio"], summary["total_train_flops_ratio"]]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"constraints": "split", "optimizer": "adam", "learning_rate": 3e-3, "accumulate": 2,
         "ema_decay": 0.9},
        pytest.param({"operators": "sparse", "precision": "bf16", "second_cycle": 1.0},
                     marks=pytest.mark.slow),
    ],
    ids=["joint", "split-adam-average", "fast-bf16"],
)  # fmt: skip
def test_killed_in_each_stage(trained: Path, whole: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    if more.get("operators") == "sparse" and toolchain() is None:
        pytest.skip("there is no C compiler")
    settings = {**ADMM, "initial_weights": str(trained), **more}
    if more:
        whole = tmp_path / "whole"
        run(whole, settings)
    for batch, stage in ((15, "admm"), (28, "fixed")):
        progress = At(batch, kill)
        with pytest.raises(Killed):
            run(tmp_path / stage, settings, progress)
        assert progress.stage == stage
        resume(tmp_path / stage)
        assert_same_run(tmp_path / stage, whole)


@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
def test_retraining_runs_on_the_fast_kernels(trained: Path, tmp_path: Path) -> None:
    """As masked dense training does, but for rounding."""
    settings = {**ADMM, "initial_weights": str(trained), "augment": "none", "stop": 0.34}
    run(tmp_path / "fast", {**settings, "operators": "sparse"})
    assert any("sparse" in name for name in RunFolder(tmp_path / "fast").read_events()[-2]["layers"].values())
    run(tmp_path / "masked", {**settings, "packed": False})
    fast, masked = weights(tmp_path / "fast"), weights(tmp_path / "masked")
    for name, tensor in masked.items():
        assert torch.allclose(tensor.double(), fast[name].double(), atol=2e-3, rtol=2e-2), name


def test_it_needs_a_training() -> None:
    with pytest.raises(UserError, match="give initial_weights, the folder of a finished run"):
        prepare(*from_dict(ADMM))
