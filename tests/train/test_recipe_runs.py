"""Losses on soft targets number by number, and runs with every ingredient of a recipe at once."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from short_runs import At, Killed, Silent, assert_same_run, kill, resume, run

from clicktrain.data import Batch, Mixing
from clicktrain.errors import UserError
from clicktrain.methods import METHODS
from clicktrain.runs.folder import RunFolder
from clicktrain.train import RunConfig, TrainingInterrupted, from_dict
from clicktrain.train.loss import binary_loss, guessing_loss, label_loss, training_loss
from clicktrain.train.prepare import prepare
from clicktrain.train.recipe_lines import recipe_lines
from clicktrain.train.training_run import TrainingRun

EVERYTHING: dict[str, Any] = {
    "auto_augment": "randaugment",
    "randaugment_magnitude": 5,
    "randaugment_deviation": 0.5,
    "erasing": 0.3,
    "augment_repeats": 2,
    "mixup": 0.2,
    "cutmix": 1.0,
    "mix_probability": 0.9,
    "loss": "bce",
    "bce_threshold": 0.2,
    "label_smoothing": 0.1,
    "optimizer": "lamb",
    "learning_rate": 0.01,
    "layer_decay": 0.9,
    "decay_norm_and_bias": False,
    "ema_decay": 0.9,
}
SMALL: dict[str, Any] = {
    "model": "resnet8",
    "width": 0.25,
    "data": "synthetic:classes=4,size=8,train=48,val=20",
    "batch_size": 12,
    "epochs": 4,
    "threads": 1,
    "augment": "cifar",
    "operators": "reference",
    "method": "dense",
}

OF_METHODS: dict[str, dict[str, Any]] = {"prunetrain": {"optimizer": "sgd", "learning_rate": 0.05}}
"""Steps of LAMB, a share of each weight's norm, do not keep up with a lasso that has 16 of them in all."""


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("soft", [True, False])
def test_binary_loss_number_by_number(soft: bool, threshold: float | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])
    shares = F.one_hot(labels, 5).double()
    if soft:
        shares = 0.75 * shares + 0.25 * shares.roll(1, dims=0)
        shares[0] = torch.tensor([0.85, 0.15, 0, 0, 0])
    total = 0.0
    for image in range(6):
        for cls in range(5):
            target = float(shares[image, cls])
            if threshold is not None:
                target = 1.0 if target > threshold else 0.0
            target = target * (1 - smoothing) + smoothing / 5
            p = 1 / (1 + math.exp(-float(logits[image, cls])))
            total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    made = binary_loss(logits, shares if soft else labels, smoothing, threshold)
    assert float(made) == pytest.approx(total / 6)


def test_both_losses_pull_the_logits_alike_and_know_what_guessing_is() -> None:
    logits = torch.zeros(2, 10, requires_grad=True)
    config = RunConfig(loss="bce")
    label_loss(config, logits, torch.tensor([3, 4])).backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 3]) == pytest.approx((0.5 - 1) / 2)
    target = torch.tensor([1, 8])
    for settings in (config, RunConfig()):
        even = torch.full((2, 10), math.log(1 / 9) if settings.loss == "bce" else 0.0)
        assert guessing_loss(settings, 10) == pytest.approx(float(label_loss(settings, even, target)))


def test_label_smoothing_of_mixed_labels_is_pytorchs() -> None:
    torch.manual_seed(1)
    logits, soft = torch.randn(4, 3), torch.rand(4, 3).softmax(dim=1)
    made = label_loss(RunConfig(label_smoothing=0.2), logits, soft)
    smooth = soft * 0.8 + 0.2 / 3
    assert float(made) == pytest.approx(float(-(smooth * logits.log_softmax(1)).sum(1).mean()), rel=1e-5)


def started(tmp_path: Path, **settings: Any) -> TrainingRun:
    prepared = prepare(*from_dict({**SMALL, **settings}))
    return TrainingRun(prepared, RunFolder(tmp_path / "run"), Silent())


def test_a_teacher_sees_the_images_as_they_were_mixed(tmp_path: Path) -> None:
    state = started(tmp_path, cutmix=1.0, loss="bce", label_smoothing=0.1)

    class Teacher:
        def logits(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x
            return torch.zeros(len(x), 4)

    teacher = Teacher()
    batch = Batch(*next(state.prepared.train_loader.epoch(0)))
    torch.manual_seed(5)
    training_loss(state, batch, teacher)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    mixed, _ = Mixing(cutmix=1.0)(batch.x, batch.y, 4, generator)
    assert torch.equal(teacher.seen, mixed)
    assert not torch.equal(mixed, batch.x)


@pytest.mark.long
def test_a_run_with_everything_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = {**SMALL, **EVERYTHING}
    run(tmp_path / "whole", settings)
    with pytest.raises(Killed):
        run(tmp_path / "killed", settings, At(10, kill))
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "stopped", settings, At(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")
@pytest.mark.filterwarnings("ignore:the steps of this optimizer are in proportion to the weights")
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_on_soft_targets(name: str, tmp_path: Path) -> None:
    settings = {**SMALL, **EVERYTHING, **OF_METHODS.get(name, {}), "method": name}
    if METHODS[name]().expects_trained:
        run(tmp_path / "dense", {**SMALL, "epochs": 1})
        settings["initial_weights"] = str(tmp_path / "dense")
    summary = run(tmp_path / "run", settings)
    assert 0 <= summary["val_accuracy"] <= 100
    losses = [line["train_loss"] for line in RunFolder(tmp_path / "run").read_metrics()]
    assert len(losses) == SMALL["epochs"]
    assert all(map(math.isfinite, losses))


def test_a_plan_says_what_is_done(tmp_path: Path) -> None:
    state = started(tmp_path, **EVERYTHING)
    assert recipe_lines(state.prepared) == [
        "training images: shifted by up to 4 pixels, mirrored at random, RandAugment (2 of strength 5 +- 0.5 "
        "of 10), 30% with a box erased (random); each of them 2 times in an epoch; then mixup (alpha 0.2) or "
        "cutmix (alpha 1) in 90% of the batches",
        "loss: binary cross-entropy of each class, classes of more than 20% of a label count in full, label "
        "smoothing 0.1",
        "optimizer: lamb, learning rate 0.01 (cosine), weight decay 0.0005, not of norms and biases, 5 rates "
        "by layer, from x0.656 to x1, average of the weights (decay 0.9)",
    ]
    plain = started(tmp_path / "plain", augment="none")
    assert recipe_lines(plain.prepared)[:2] == ["training images: as they are", "loss: cross-entropy"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bce_threshold": 0.2}, "bce_threshold is set but loss is cross_entropy: set loss to bce"),
        ({"loss": "bce", "bce_threshold": 1.0}, r"bce_threshold is 1\.0: must be at least 0 and below 1"),
        ({"loss": "focal"}, "loss is 'focal': use one of cross_entropy, bce"),
        ({"mix_probability": 0.5}, "mix_probability is set but mixup and cutmix are 0"),
        ({"cutmix": -1}, r"cutmix is -1\.0: must be at least 0"),
        ({"erasing": 2}, r"erasing is 2\.0: must be at most 1"),
        ({"erasing_fill": "mean"}, "erasing_fill is set but erasing is 0"),
        ({"randaugment_magnitude": 5}, "randaugment_magnitude is set but auto_augment is none"),
        (
            {"auto_augment": "randaugment", "randaugment_magnitude": 12},
            r"randaugment_magnitude is 12\.0: must be at most 10",
        ),
        ({"augment_repeats": 9, "batch_size": 8}, r"augment_repeats is 9: must be at most batch_size \(8\)"),
    ],
)
def test_mistakes_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        from_dict(settings)
