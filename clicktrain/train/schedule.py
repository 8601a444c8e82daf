"""Learning rate over a run, as a plain function of the optimizer step, or of the place in the run."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clicktrain.train.batch_sizes import BatchSizes
from clicktrain.train.config import RunConfig

_ONECYCLE_RISE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1 / 25e4


def learning_rate_factor(config: RunConfig, total_steps: int) -> Callable[[float], float]:
    """The factor on the peak learning rate at each optimizer step.

    ``onecycle`` is the curve of ``torch.optim.lr_scheduler.OneCycleLR`` (cosine up from 1/25, cosine down to
    1/250000) without its change of momentum. The others start with a linear warm-up when ``warmup_epochs`` is
    set; ``cosine`` then falls to zero at the step after the last.

    Args:
        config: the schedule and its settings.
        total_steps: optimizer steps of the whole run.

    Returns:
        A function of the step, counted from 0; steps after the last give the last value. With batches that
        grow, the steps are those of a run without (`BatchSizes.schedule_step`), and fall between them.
    """
    warmup = round(config.warmup_epochs / config.epochs * total_steps)

    def after_warmup(step: float) -> float:
        share = step / total_steps
        match config.schedule:
            case "cosine":
                return _cosine(1.0, 0.0, (step - warmup) / max(total_steps - warmup, 1))
            case "step":
                return config.gamma ** sum(share >= milestone for milestone in config.milestones)
            case _:
                return 1.0

    def onecycle(step: float) -> float:
        top = warmup - 1.0 if warmup else _ONECYCLE_RISE * total_steps - 1.0
        if step <= top:
            return _cosine(_ONECYCLE_START, 1.0, step / top if top > 0 else 1.0)
        return _cosine(1.0, _ONECYCLE_END, (step - top) / max(total_steps - 1.0 - top, 1.0))

    def factor(step: float) -> float:
        step = min(step, total_steps)
        if config.schedule == "onecycle":
            return onecycle(min(step, total_steps - 1))
        if step < warmup:
            return (step + 1) / warmup
        return after_warmup(step)

    return factor


def make_scheduler(
    optimizer: Optimizer, config: RunConfig, total_steps: int, sizes: BatchSizes | None = None
) -> LambdaLR:
    """Make the scheduler, to be stepped once after each optimizer step.

    Args:
        optimizer: whose learning rates it sets.
        config: the schedule and its settings.
        total_steps: optimizer steps of the whole run, if batches do not grow.
        sizes: of the batches; followed as they grow (`refresh_` after that).
    """
    factor = learning_rate_factor(config, total_steps)
    if sizes is None:
        return LambdaLR(optimizer, factor)
    return LambdaLR(
        optimizer, lambda step: factor(sizes.schedule_step(step)) * sizes.learning_rate_factor(step)
    )


def refresh_(scheduler: LambdaLR) -> None:
    """Set the learning rates of the coming step again, after the batch size has changed."""
    step = scheduler.last_epoch
    rates = [
        base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
