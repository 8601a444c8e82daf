"""Distillation after the cut: its loss, its teachers, their cost, and the same after an interruption."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from short_runs import (
    BATCH_IN_STAGE,
    DENSE,
    FIVE_STAGES,
    At,
    Killed,
    Silent,
    assert_same_run,
    kill,
    resume,
    run,
)
from tiny_networks import tiny

from clicktrain.errors import UserError
from clicktrain.methods.driver.publisher import MasksFrozen
from clicktrain.runs.events import FinalizedEvent
from clicktrain.train import RunConfig, RunFolder, TrainingInterrupted
from clicktrain.train.teacher import Teacher, distillation_loss

TAUGHT: dict[str, Any] = {**FIVE_STAGES, "distill": 0.7, "distill_temperature": 2.0}


def test_loss_number_by_number() -> None:
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(5, 4), torch.randn(5, 4), 3.0
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = ([math.exp(value / temperature) for value in row] for row in (s, t))
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(9 * total / 5, rel=1e-5)
    assert distillation_loss(student, student, temperature).item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_other_normalization_sees_its_own() -> None:
    facts = {"image_shape": [1, 8, 8], "mean": [0.5], "std": [0.25]}
    own = {**facts, "mean": [0.4], "std": [0.2]}
    model = tiny(4, 1)
    pixels = torch.rand(3, 1, 8, 8)
    teacher = Teacher(model, facts, own)
    assert not any(p.requires_grad for p in model.parameters())
    wanted = model((pixels - 0.5) / 0.25)
    assert torch.allclose(teacher.logits((pixels - 0.4) / 0.2), wanted, atol=1e-5)


class Watch(Silent):
    """Keeps the dense weights when masks are chosen."""

    def __init__(self) -> None:
        self.dense: dict[str, torch.Tensor] = {}

    def start(self, config: Any, method: Any, prepared: Any) -> None:
        def keep(event: Any) -> None:
            self.dense = {n: v.clone() for n, v in prepared.model.state_dict().items()}

        prepared.pruner.subscribe(keep, FinalizedEvent)
        prepared.pruner.subscribe(lambda _: None, MasksFrozen)


def test_taught_by_its_dense_weights_and_counted(tmp_path: Path) -> None:
    plain, watch = run(tmp_path / "plain", FIVE_STAGES), Watch()
    summary = run(tmp_path / "run", TAUGHT, watch)
    images = (66 - 50) * 128  # in stage 5
    dense = plain["inference_flops"] / plain["inference_flops_ratio"]
    assert summary["train_flops"] - plain["train_flops"] == pytest.approx(images * dense)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    with safe_open(newest, "pt") as file:
        names = [key for key in file.keys() if "teacher" in key]  # noqa: SIM118 - no mapping
        assert names
        kept = {key: file.get_tensor(key) for key in names}
    (conv,) = [value for value in kept.values() if value.shape == watch.dense["3.weight"].shape]
    assert torch.equal(conv, watch.dense["3.weight"])
    assert (conv != 0).all()


@pytest.mark.parametrize("extra", [{}, {"packed": False, "mixup": 0.2, "channels_last": True}])
def test_resumed(tmp_path: Path, extra: dict[str, Any]) -> None:
    settings = {**TAUGHT, **extra}
    run(tmp_path / "whole", settings)
    with pytest.raises(TrainingInterrupted):  # masks are chosen, not frozen yet
        run(tmp_path / "run", settings, At(45, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Killed):
        resume(tmp_path / "run", At(BATCH_IN_STAGE["accelerated"], kill))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_taught_by_another_run(tmp_path: Path) -> None:
    """One that is never pruned learns from the first step on."""
    small = {**DENSE, "epochs": 1}
    plain = run(tmp_path / "teacher", small)
    teacher = str(tmp_path / "teacher")
    summary = run(tmp_path / "dense", {**small, "distill": 0.5, "teacher": teacher, "seed": 1})
    assert summary["train_flops"] == plain["train_flops"] + 11 * 128 * plain["inference_flops"]
    rigl = {**DENSE, "method": "rigl", "distill": 0.5, "teacher": teacher, "operators": "reference"}
    run(tmp_path / "rigl", rigl)
    with pytest.raises(Killed):
        run(tmp_path / "again", rigl, At(19, kill))
    resume(tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "rigl")


def test_after_channels_were_removed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**DENSE, "method": "prunetrain-clicktrain", "epochs": 5, "distill": 0.5}
    settings |= {"interval": 1, "floor": 0.0, "target_parameters": 0.6, "operators": "reference"}
    run(tmp_path / "whole", settings)
    events = [event["event"] for event in RunFolder(tmp_path / "whole").read_events()]
    assert events.index("reconfigured") < events.index("finalised")
    with pytest.raises(Killed):
        run(tmp_path / "run", settings, At(50, kill))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distill is 2: must be between 0 and 1"):
        RunConfig(distill=2)
    with pytest.raises(UserError, match="teacher is set but distill is 0"):
        RunConfig(teacher="runs/x")
    with pytest.raises(UserError, match="method rigl has no dense network to learn from when its masks are"):
        run(tmp_path / "run", {**DENSE, "method": "rigl", "distill": 0.5})
    with pytest.raises(UserError, match="method dense has no dense network to learn from"):
        run(tmp_path / "run", {**DENSE, "distill": 0.5})
    data = "synthetic:classes=3,size=8,channels=1,train=40,val=9"
    other = str(tmp_path / "other")
    run(Path(other), {**DENSE, "epochs": 1, "data": data, "batch_size": 8})
    with pytest.raises(UserError, match=r"was trained with classes .* this run has .*: choose one of the"):
        run(tmp_path / "run", {**DENSE, "distill": 0.5, "teacher": other})
    assert not (tmp_path / "run").exists()
