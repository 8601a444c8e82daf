"""A loss that is no number, or explodes, stops the run and leaves the last good checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from short_runs import DENSE, At, run

from clicktrain.errors import UserError
from clicktrain.train import RunFolder, TrainingDiverged
from clicktrain.train.checkpoint import load_checkpoint
from clicktrain.train.config import from_dict
from clicktrain.train.prepare import prepare
from clicktrain.train.training_run import TrainingRun


@pytest.mark.parametrize(
    ("model", "words"), [("turns_nan", "the loss is nan"), ("explodes", "that of the first epoch was")]
)
def test_a_run_that_diverges(tmp_path: Path, model: str, words: str) -> None:
    with pytest.raises(TrainingDiverged, match=words) as stopped:
        run(tmp_path / "run", {**DENSE, "model": f"tiny_networks:{model}", "learning_rate": 0.01})
    assert isinstance(stopped.value, UserError)  # exit code 2 and one sentence
    text = str(stopped.value)
    assert "in epoch 2 after batch 5" in text
    assert "try a lower learning_rate" in text
    folder = RunFolder(tmp_path / "run")
    good = folder.checkpoints()[-1]
    assert f"the last good checkpoint is {good}" in text
    state = load_checkpoint(good)
    assert state["state"]["epoch"] == 1
    assert folder.summary() is None


def test_a_much_too_high_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="in epoch 1 "):
        run(
            tmp_path / "run",
            {**DENSE, "learning_rate": 1e6, "schedule": "constant", "model": "tiny_networks:plain"},
        )


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    prepared = prepare(*from_dict(DENSE))
    live = TrainingRun(prepared, RunFolder(tmp_path / "run"), At(-1, lambda: None))
    live.begin()
    next(prepared.model.parameters()).data[0] = float("inf")
    live.state.step = 7
    with pytest.raises(TrainingDiverged, match="a weight is not a number"):
        live.save()
    assert [path.name for path in live.folder.checkpoints()] == ["step-000000000-epoch-0000.safetensors"]
