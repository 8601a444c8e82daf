"""The length of a run from a time budget: against sums written out, and in whole runs."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_runs import DENSE, FIVE_STAGES, At, Messages, assert_same_run, resume, run

from clicktrain.errors import UserError
from clicktrain.methods import METHODS
from clicktrain.train import RunConfig, RunFolder, TrainingInterrupted, from_dict, load_config
from clicktrain.train import time_budget as module
from clicktrain.train.setting_checks import budget_of
from clicktrain.train.stage_times import RunTimes, StageTimes, measure_run
from clicktrain.train.time_budget import fitting_epochs, plan_time, run_seconds, time_target

SLOW, FAST = StageTimes(1.0, 7.0, 0.5, 3.0), StageTimes(0.25, 2.0, 0.125, 11.0)


class Cut:
    """A pruner that freezes its masks after a share of the run, which has at least 3 epochs."""

    def __init__(self, share: float | None) -> None:
        self.share = share

    def latest_cut(self, length: Any) -> float | None:
        if length.epochs < 3:
            raise UserError("a run of 2 epochs is too short")
        return None if self.share is None else self.share * length.epochs


def times(share: float | None = 0.5, after: StageTimes | None = FAST) -> RunTimes:
    return RunTimes(dense=StageTimes(0.9, 6.0, 0.5), before=SLOW, after=after, batches=10, pruner=Cut(share))


@pytest.mark.parametrize("every", [(1, 1), (2, 3), (4, 9)])
@pytest.mark.parametrize("share", [0.5, 0.37, None])
@pytest.mark.parametrize("epochs", [3, 8, 9])
def test_seconds_of_a_run_batch_by_batch(every: tuple[int, int], share: float | None, epochs: int) -> None:
    config = RunConfig(evaluate_every=every[0], checkpoint_every=every[1])
    cut = epochs if share is None else share * epochs
    total = 3.0 + (11.0 if share is not None else 0.0)
    for epoch in range(1, epochs + 1):
        for batch in range(10):
            total += SLOW.batch if (epoch - 1) * 10 + batch < round(cut * 10) else FAST.batch
        stage = SLOW if epoch <= cut else FAST
        total += stage.evaluation * (epoch % every[0] == 0 or epoch == epochs)
        total += stage.checkpoint * (epoch % every[1] == 0 or epoch == epochs)
    assert run_seconds(config, times(share), epochs) == pytest.approx(total)


def test_the_dense_run_and_one_that_never_freezes() -> None:
    config = RunConfig()
    assert run_seconds(config, times(), 4, dense=True) == pytest.approx(4 * (9 + 6.5))
    assert run_seconds(config, times(after=None), 4) == pytest.approx(3 + 4 * (10 + 7.5))


def test_as_many_epochs_as_fit() -> None:
    config = RunConfig()
    for budget in (0.0, 20.4, 20.6, 100.0, 333.0, 1e5):
        fits = [epochs for epochs in range(1, 12_000) if run_seconds(config, times(), epochs) <= budget]
        assert fitting_epochs(config, times(), budget) == (fits[-1] if fits else 0)


def test_budgets_in_words() -> None:
    assert budget_of(1.5) == (1.5, None)
    assert [budget_of(text)[1] for text in ("90s", "1.5 min", "2h")] == [90, 90, 7200]
    for wrong in ("20", "20m", "-3s", "0s", "soon", ""):
        with pytest.raises(UserError, match=r"write a share of the dense run's time, as 1\.0, or a time"):
            budget_of(wrong)
    for value in (0, 90.0, -1.0):
        with pytest.raises(UserError, match=r"a time has a unit, as 90s, 20min or 2h"):
            RunConfig(time_budget=value)
    with pytest.raises(UserError, match="budget_epochs is set but time_budget is not"):
        RunConfig(budget_epochs=3)


def test_what_was_asked_and_used() -> None:
    assert not time_target(100, 98, 100.5, 7).missed
    assert time_target(100, 98, 100.5, 7).reason == ""
    short = time_target(100, 90, 90.5, 7)
    assert short.missed
    assert short.reason == "1.5 min were planned for 7 whole epochs"
    slow = time_target(100, 98, 120, 7)
    assert slow.missed
    assert "steps took longer than was measured" in slow.sentence()
    assert "asked 100 s, reached 120 s" in slow.sentence()


BUDGET = {**FIVE_STAGES, "epochs": 6, "time_budget": 1.0}


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned step that takes a fifth of the time, so that more epochs fit, whatever the machine."""

    def measured(config: RunConfig, method: Any) -> RunTimes:
        real = measure_run(config, method)
        stage, fast = StageTimes(0.01, 0.02, 0.01), StageTimes(0.002, 0.01, 0.01)
        return replace(real, dense=stage, before=stage, after=fast)

    monkeypatch.setattr(module, "measure_run", measured)


def test_planned_written_and_resumed(tmp_path: Path, fixed_times: None) -> None:
    messages = Messages()
    summary = run(tmp_path / "whole", BUDGET, messages)
    folder = RunFolder(tmp_path / "whole")
    (event,) = [e for e in folder.read_events() if e["event"] == "time_planned"]
    assert (event["dense_epochs"], event["epochs"]) == (6, summary["epochs"])
    assert summary["epochs"] > 6
    assert event["seconds_asked"] == pytest.approx(6 * (11 * 0.01 + 0.03))
    assert event["seconds_planned"] <= event["seconds_asked"]
    assert any(f"{summary['epochs']} epochs fit into 0.8 s" in text for text in messages.messages)
    row = summary["outcome"][-1]
    assert (row["what"], row["unit"]) == ("training time", "s")
    assert (row["asked"], row["reached"]) == (event["seconds_asked"], summary["train_seconds"])
    assert len(folder.read_metrics()) == summary["epochs"]
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "run", BUDGET, At(70, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resume(tmp_path / "run")
    strip(tmp_path / "whole")
    strip(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    # The config of the run, given again, asks for the same share of the same dense run.
    config, method = load_config(folder.config, "tiny_networks:tiny")
    assert (config.epochs, config.budget_epochs) == (summary["epochs"], 6)
    again, second = plan_time(config, method, lambda text: None)
    assert (again.epochs, second.dense_epochs) == (summary["epochs"], 6)


def strip(path: Path) -> None:
    """Leave out the times that two runs cannot share."""
    folder = RunFolder(path)
    summary = json.loads(folder.summary_path.read_text())
    summary["outcome"], summary["warnings"] = summary["outcome"][:-1], []
    folder.summary_path.write_text(json.dumps(summary))


def test_measured_for_real(tmp_path: Path) -> None:
    """Every stage is measured, the dense run apart; what is measured does not change what is trained."""
    settings = {**FIVE_STAGES, "operators": "sparse", "ema_decay": 0.9, "recalibrate_norms": 1}
    config, method = from_dict(settings)
    measured = measure_run(config, method)
    assert measured.after is not None
    assert measured.dense is not measured.before
    for stage in (measured.dense, measured.before, measured.after):
        assert min(stage.batch, stage.evaluation, stage.checkpoint) > 0
    assert measured.latest_cut(6) == pytest.approx(50 / 11)
    dense = measure_run(*from_dict(DENSE))
    assert dense.dense is dense.before
    assert dense.after is None


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dense", "clicktrain"}))
def test_every_method_is_measured(name: str) -> None:
    config, method = from_dict({**DENSE, "method": name, "epochs": 4, "operators": "reference"})
    if method.expects_trained:
        pytest.skip("prunes a network that is trained already")
    measured = measure_run(config, method)
    assert (measured.after is not None) == method.freezes
    assert fitting_epochs(config, measured, run_seconds(config, measured, 4)) == 4


def test_a_dense_run_of_its_own_time_has_its_own_epochs(tmp_path: Path) -> None:
    config, method = from_dict({**DENSE, "epochs": 3, "time_budget": 1.0})
    planned, event = plan_time(config, method, lambda text: None)
    assert planned.epochs == 3
    assert event.seconds_planned == pytest.approx(event.seconds_asked)


def test_too_short(tmp_path: Path, fixed_times: None) -> None:
    with pytest.raises(UserError, match=r"time_budget is 0.001, 0.0 s here, but one epoch takes about 0.1 s"):
        run(tmp_path / "run", {**BUDGET, "time_budget": 0.001})
    with pytest.raises(UserError, match=r"too short for method campfire: 3 epochs fit, but the era ends at"):
        run(tmp_path / "run", {**DENSE, "method": "campfire", "era": [1, 4], "epochs": 5, "time_budget": 0.6})
    assert not (tmp_path / "run").exists()


def test_killed_before_the_first_checkpoint(tmp_path: Path, fixed_times: None) -> None:
    run(tmp_path / "run", {**BUDGET, "epochs": 4})
    folder = RunFolder(tmp_path / "run")
    folder.summary_path.unlink()
    for path in folder.checkpoints():
        path.unlink()
    with pytest.raises(UserError, match="its time budget has to be planned again"):
        resume(tmp_path / "run")
