"""The learning rate at each step, against PyTorch's own schedulers where they have the same curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from clicktrain.errors import UserError
from clicktrain.methods import Campfire
from clicktrain.train.config import RunConfig, load_config
from clicktrain.train.optim import learning_rate_factor, make_optimizer, make_scheduler

STEPS = 40
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def optimizer() -> SGD:
    return SGD([nn.Parameter(torch.zeros(1))], lr=0.4)


def course(scheduler: LRScheduler) -> list[float]:
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "step", "constant"])
def test_same_as_pytorch(schedule: str) -> None:
    config = RunConfig(epochs=4, learning_rate=0.4, schedule=schedule, gamma=0.2)  # type: ignore[arg-type]
    ours = course(make_scheduler(optimizer(), config, STEPS))
    theirs = {
        "cosine": lambda o: CosineAnnealingLR(o, T_max=STEPS),
        "onecycle": lambda o: OneCycleLR(o, max_lr=0.4, total_steps=STEPS + 1, cycle_momentum=False),
        "step": lambda o: MultiStepLR(o, [STEPS // 2, STEPS * 3 // 4], gamma=0.2),
        "constant": lambda o: MultiStepLR(o, []),
    }[schedule](optimizer())
    if schedule == "onecycle":
        # PyTorch's counts one step more here, so that it may be stepped after the last one as well.
        factor = learning_rate_factor(config, STEPS + 1)
        ours = [0.4 * factor(step) for step in range(STEPS)]
    assert ours == pytest.approx(course(theirs))


def test_linear_warm_up_then_cosine_to_zero() -> None:
    config = RunConfig(epochs=4, warmup_epochs=1, schedule="cosine")
    factor = learning_rate_factor(config, STEPS)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(10) == 1
    assert factor(25) == pytest.approx(0.5)
    assert factor(STEPS) == pytest.approx(0)


def test_onecycle_rises_for_the_warm_up() -> None:
    config = RunConfig(epochs=4, warmup_epochs=2, schedule="onecycle")
    factor = learning_rate_factor(config, STEPS)
    rates = [factor(step) for step in range(STEPS)]
    assert rates.index(max(rates)) == 19
    assert rates[0] == pytest.approx(1 / 25)
    assert rates[-1] == pytest.approx(1 / 25e4)


def test_a_run_of_one_step() -> None:
    for schedule in ("cosine", "onecycle", "step", "constant"):
        config = RunConfig(epochs=1, schedule=schedule)  # type: ignore[arg-type]
        assert 0 < learning_rate_factor(config, 1)(0) <= 1


def test_scaled_to_the_images_per_step() -> None:
    """Campfire appendix B.3: 0.1 is meant for 256 images; 64 make it 0.025, or 0.05 by the root."""
    meant = {"learning_rate": 0.1, "learning_rate_batch": 256}
    assert RunConfig(batch_size=64, **meant).peak_learning_rate == pytest.approx(0.025)  # type: ignore[arg-type]
    assert RunConfig(batch_size=64, accumulate=8, **meant).peak_learning_rate == pytest.approx(0.2)  # type: ignore[arg-type]
    config = RunConfig(batch_size=64, learning_rate_scaling="sqrt", **meant)  # type: ignore[arg-type]
    assert config.peak_learning_rate == pytest.approx(0.05)
    (group,) = make_optimizer(nn.Linear(2, 2), config).param_groups
    assert group["lr"] == pytest.approx(0.05)
    assert RunConfig(batch_size=64, learning_rate=0.1).peak_learning_rate == 0.1
    with pytest.raises(UserError, match="learning_rate_batch is 0: must be at least 1"):
        RunConfig(learning_rate_batch=0)


def test_the_papers_recipes() -> None:
    """Campfire appendix B: the learning rate in each epoch, and the optimizer."""
    config, method = load_config(RECIPES / "imagenet-campfire.yaml")
    factor = learning_rate_factor(config, 100 * 10)
    rates = [config.peak_learning_rate * factor(10 * epoch) for epoch in (0, 29, 30, 60, 89, 90, 99)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    config, method = load_config(RECIPES / "tiny-imagenet-campfire.yaml")
    factor = learning_rate_factor(config, 40 * 10)
    assert [config.peak_learning_rate * factor(10 * epoch) for epoch in (0, 29, 30)] == pytest.approx(
        [1e-3, 1e-3, 1e-4]
    )
    made = make_optimizer(nn.Linear(2, 2), config)
    assert type(made) is Adam  # weight decay in the gradient
    assert made.param_groups[0]["betas"] == (0.9, 0.999)
    assert made.param_groups[0]["weight_decay"] == 1e-4
    assert method == Campfire(granularity="window", max_non_zero=2, sparsity=0.6, era=(0, 10))


def test_triangular_rises_from_a_fifth_and_falls_to_zero() -> None:
    factor = learning_rate_factor(RunConfig(epochs=4, schedule="triangular"), 100)
    assert factor(0) == pytest.approx(0.2)
    assert factor(23) == pytest.approx(1)
    assert [factor(s) for s in range(24)] == pytest.approx([0.2 + 0.8 * s / 23 for s in range(24)])
    assert [factor(s) for s in range(23, 101)] == pytest.approx([(100 - s) / 77 for s in range(23, 101)])
    early = learning_rate_factor(RunConfig(epochs=4, warmup_epochs=1, schedule="triangular"), 100)
    assert early(25) == pytest.approx(1)


def test_linear_falls_to_zero_after_the_warm_up() -> None:
    factor = learning_rate_factor(RunConfig(epochs=4, warmup_epochs=1, schedule="linear"), 100)
    assert factor(12) == pytest.approx(13 / 25)
    assert [factor(s) for s in (25, 50, 75, 100)] == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_biases_learn_faster_and_decay_as_fast() -> None:
    config = RunConfig(learning_rate=0.1, weight_decay=0.01, bias_rate_factor=64)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    groups = {
        id(p): (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, config).param_groups
        for p in group["params"]
    }
    biases, others = (model[0].bias, model[1].bias), (model[0].weight, model[1].weight)
    assert all(groups[id(p)] == pytest.approx((6.4, 0.01 / 64)) for p in biases)
    assert all(groups[id(p)] == pytest.approx((0.1, 0.01)) for p in others)
    plain = make_optimizer(model, RunConfig(bias_rate_factor=64, decay_norm_and_bias=False))
    decays = {id(p): group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [5e-4, 0, 0, 0]
