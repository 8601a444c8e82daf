"""The learning rate at each step, against PyTorch's own schedulers where they have the same curve."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from clicktrain.train.config import RunConfig
from clicktrain.train.schedule import learning_rate_factor, make_scheduler

STEPS = 40


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
