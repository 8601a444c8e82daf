"""Stage 5 on the compiler's operators: the same training, remembered by the run, resumed bit for bit."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_networks
import torch
from short_runs import (
    BATCH_IN_STAGE,
    BATCHES,
    FIVE_STAGES,
    At,
    Killed,
    Messages,
    assert_same_run,
    kill,
    resume,
    run,
    run_in_process,
    weights,
)

from clicktrain.compiler import LoweringPlan
from clicktrain.kernels.native import toolchain
from clicktrain.train import RunFolder

pytestmark = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")

SPARSE: dict[str, Any] = {**FIVE_STAGES, "operators": "sparse"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("operators") / "whole"
    run(path, SPARSE)
    return path


def test_the_run_says_which_operators_it_used(whole: Path) -> None:
    folder = RunFolder(whole)
    plan = LoweringPlan.from_json(folder.operators.read_text())
    assert plan.rule == "sparse"
    events = [event for event in folder.read_events() if event["event"] == "operators"]
    assert len(events) == 1
    assert set(events[0]["layers"].values()) == {"sparse blocked", "dense blocked"}  # the first one is dense
    summary = folder.summary()
    assert summary is not None
    operators = {layer["name"]: layer["operator"] for layer in summary["layers"]}
    assert operators["3"] == operators["7"] == "sparse blocked"
    assert operators["13"] == "dense"
    assert set(summary["step_ms"]) >= {"dense", "accelerated"}


def test_training_is_that_of_the_reference_operator(tmp_path: Path, whole: Path) -> None:
    """To float32 accuracy, which training loosens from step to step."""
    settings = {**FIVE_STAGES, "augment": "none", "learning_rate": 0.005}
    run(tmp_path / "reference", settings)
    run(tmp_path / "sparse", {**settings, "operators": "sparse"})
    one, two = weights(tmp_path / "reference"), weights(tmp_path / "sparse")
    for name, tensor in one.items():
        assert torch.allclose(tensor.double(), two[name].double(), atol=2e-3, rtol=2e-2), name
    zeros = [(tensor == 0, two[name] == 0) for name, tensor in one.items() if tensor.dim() == 4]
    assert all(torch.equal(a, b) for a, b in zeros)


def test_the_same_run_twice(tmp_path: Path, whole: Path) -> None:
    run(tmp_path / "run", SPARSE)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "settings", [{}, {"ema_decay": 0.9, "precision": "bf16"}], ids=["plain", "average-bf16"]
)
def test_measured_operators_twice(tmp_path: Path, settings: dict[str, Any], monkeypatch: Any) -> None:
    """The first run measures, the second takes what is remembered: the same to the last bit."""
    monkeypatch.setattr("clicktrain.train.operators.SHORT_FLOPS", 0)
    measured = {**FIVE_STAGES, **settings, "operators": "measured"}
    run(tmp_path / "one", measured)
    run(tmp_path / "two", measured)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_short_run_measures_nothing(tmp_path: Path) -> None:
    run(tmp_path / "run", {**FIVE_STAGES, "operators": "measured"})
    plan = LoweringPlan.from_json(RunFolder(tmp_path / "run").operators.read_text())
    assert plan.rule == "density"


@pytest.mark.long
def test_killed_after_the_hard_prune(tmp_path: Path, whole: Path) -> None:
    killed = run_in_process(tmp_path / "run", SPARSE, BATCH_IN_STAGE["accelerated"], signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_killed_between_the_choice_and_the_next_checkpoint(tmp_path: Path, whole: Path) -> None:
    """The plan is there, the event went with the checkpoint that was never written: it is told again."""
    settings = {**SPARSE, "checkpoint_every": 6}
    with pytest.raises(Killed):
        run(tmp_path / "run", settings, At(BATCH_IN_STAGE["accelerated"], kill))
    assert RunFolder(tmp_path / "run").operators.is_file()
    resume(tmp_path / "run")
    events = RunFolder(tmp_path / "run").read_events()
    assert [event["event"] for event in events].count("operators") == 1
    assert all(
        torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(tmp_path / "run").items()
    )


def test_a_plan_edited_by_hand_is_obeyed_and_nonsense_refused(tmp_path: Path) -> None:
    progress = At(BATCH_IN_STAGE["accelerated"], kill)
    with pytest.raises(Killed):
        run(tmp_path / "run", SPARSE, progress)
    path = RunFolder(tmp_path / "run").operators
    plan = json.loads(path.read_text())
    for choice in plan["choices"]:
        choice["layout"] = "plain"
    path.write_text(json.dumps(plan))
    messages = Messages()
    resume(tmp_path / "run", messages)
    assert any(text.startswith("0 of 3 convolutions") for text in messages.messages)


def test_stochastic_depth_goes_on_after_the_hard_prune(tmp_path: Path, monkeypatch: Any) -> None:
    """The same batches drop the same branches as on the reference operator, to the end of the run."""
    made = []
    monkeypatch.setattr(tiny_networks, "stochastic_depth", remembered(tiny_networks.stochastic_depth, made))
    settings = {**FIVE_STAGES, "model": "tiny_networks:stochastic_depth", "augment": "none"}
    settings["learning_rate"] = 0.005
    run(tmp_path / "reference", settings)
    messages = Messages()
    run(tmp_path / "sparse", {**settings, "operators": "sparse"}, messages)
    told = [text for text in messages.messages if "dropped" in text]
    assert len(told) == 1
    assert "dropped draws random numbers in forward" in told[0] or "dropped changes" in told[0]
    counts = [(model.dropped.kept, model.dropped.left_out) for model in made[-2:]]
    assert counts[0] == counts[1]
    assert counts[0][1] > 6 * BATCHES / 4
    one, two = weights(tmp_path / "reference"), weights(tmp_path / "sparse")
    for name, tensor in one.items():
        assert torch.allclose(tensor.double(), two[name].double(), atol=2e-3, rtol=2e-2), name


def remembered(factory: Any, made: list[Any]) -> Any:
    def make(**arguments: Any) -> Any:
        made.append(factory(**arguments))
        return made[-1]

    return functools.wraps(factory)(make)
