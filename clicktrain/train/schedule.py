"""Learning rate over a run, as a plain function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clicktrain.train.config import RunConfig

_ONECYCLE_RISE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1 / 25e4


def learning_rate_factor(config: RunConfig, total_steps: int) -> Callable[[int], float]:
    """What the peak learning rate is multiplied with at each optimizer step.

    ``onecycle`` is the curve of ``torch.optim.lr_scheduler.OneCycleLR`` (cosine up from 1/25, cosine down to
    1/250000) without its change of momentum. The others start with a linear warm-up when ``warmup_epochs`` is
    set; ``cosine`` then falls to zero at the step after the last.

    Args:
        config: the schedule and its settings.
        total_steps: optimizer steps of the whole run.

    Returns:
        A function of the step, counted from 0; steps after the last give the last value.
    """
    warmup = round(config.warmup_epochs / config.epochs * total_steps)

    def after_warmup(step: int) -> float:
        share = step / total_steps
        match config.schedule:
            case "cosine":
                return _cosine(1.0, 0.0, (step - warmup) / max(total_steps - warmup, 1))
            case "step":
                return config.gamma ** sum(share >= milestone for milestone in config.milestones)
            case _:
                return 1.0

    def onecycle(step: int) -> float:
        top = warmup - 1.0 if warmup else _ONECYCLE_RISE * total_steps - 1.0
        if step <= top:
            return _cosine(_ONECYCLE_START, 1.0, step / top if top > 0 else 1.0)
        return _cosine(1.0, _ONECYCLE_END, (step - top) / max(total_steps - 1.0 - top, 1.0))

    def factor(step: int) -> float:
        step = min(step, total_steps)
        if config.schedule == "onecycle":
            return onecycle(min(step, total_steps - 1))
        if step < warmup:
            return (step + 1) / warmup
        return after_warmup(step)

    return factor


def make_scheduler(optimizer: Optimizer, config: RunConfig, total_steps: int) -> LambdaLR:
    """The scheduler to step once after each optimizer step."""
    return LambdaLR(optimizer, learning_rate_factor(config, total_steps))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
