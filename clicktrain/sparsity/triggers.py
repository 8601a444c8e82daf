"""Triggers: when to begin, decided at the end of an epoch from what the run has seen so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch

from clicktrain.sparsity.registry import Registry
from clicktrain.sparsity.stability import MAGNITUDE_THRESHOLD, NOT_LOWER_THAN

SLOPE = 0.27
"""ClickTrain's threshold of the derivative of the loss (section 6.1)."""


@dataclass(frozen=True, slots=True)
class History:
    """What a trigger sees when an epoch begins.

    Attributes:
        epoch: that begins, from 0.
        latest: the last epoch in which pruning may begin.
        losses: mean training loss of every finished epoch.
        indicators: EPI of every finished epoch, None where there was nothing to compare with.
        threshold: tau, from which a structure is stable.
        slope: from which the loss changes sharply.
        chosen: epoch that the user has asked for.
        seed: draws an epoch.
    """

    epoch: int
    latest: int
    losses: Sequence[float] = ()
    indicators: Sequence[float | None] = ()
    threshold: float = MAGNITUDE_THRESHOLD
    slope: float = SLOPE
    chosen: int | None = None
    seed: int = 0

    @property
    def drawn(self) -> int:
        """Uniform from 0 to the latest epoch, as When to Prune? draws from [0, 30] of 90."""
        generator = torch.Generator().manual_seed(self.seed)
        return int(torch.randint(0, self.latest + 1, (1,), generator=generator))


Trigger: TypeAlias = Callable[[History], str | None]
"""Why pruning begins in this epoch, or None."""


def when_stable(seen: History) -> str | None:
    """When the early pruning indicator is high and no longer falls (When to Prune?, Algorithm 2)."""
    now = seen.indicators[-1] if seen.indicators else None
    before = [epi for epi in seen.indicators[-1 - NOT_LOWER_THAN : -1] if epi is not None]
    if now is None or now < max(seen.threshold, *before, 0):
        return None
    return f"the structure is stable: EPI {now:.3f} is not under {seen.threshold:g}"


def when_loss_settles(seen: History) -> str | None:
    """When the loss no longer changes sharply (ClickTrain section 4.1, Figure 5).

    The derivative of the loss over epochs is the drop of the mean training loss between two epochs.
    """
    slope = seen.losses[-2] - seen.losses[-1] if len(seen.losses) > 1 else math.inf
    if slope < seen.slope:
        return f"the loss fell by {slope:.3f} in the last epoch, under {seen.slope:g}"
    return None


def at_epoch(seen: History) -> str | None:
    """In the epoch that was asked for."""
    return f"epoch {seen.epoch} was asked for" if seen.epoch == seen.chosen else None


def at_drawn_epoch(seen: History) -> str | None:
    """In an epoch drawn at random."""
    return f"epoch {seen.epoch} was drawn from 0 to {seen.latest}" if seen.epoch == seen.drawn else None


def before_training(seen: History) -> str | None:
    """Before the first step."""
    del seen
    return "before training"


def by_its_own_rule(seen: History) -> str | None:
    """Never: the method begins when its own settings say so."""
    del seen
    return None


TRIGGERS: Registry[Trigger] = Registry(
    "trigger", {"epi": when_stable, "loss_slope": when_loss_settles}, group="clicktrain.triggers"
)
"""When dense training is over."""
EARLY_TRIGGERS: Registry[Trigger] = Registry("trigger", {"own": by_its_own_rule}, beneath=TRIGGERS)
"""What may begin pruning before the time that a method's own settings say."""
POLICIES: Registry[Trigger] = Registry(
    "policy",
    {
        "epi": when_stable,
        "loss_slope": when_loss_settles,
        "epoch": at_epoch,
        "random": at_drawn_epoch,
        "init": before_training,
    },
    beneath=TRIGGERS,
)
EarlyTriggerChoice: TypeAlias = Annotated[str | Trigger, EARLY_TRIGGERS]
PolicyChoice: TypeAlias = Annotated[str | Trigger, POLICIES]


def fires(trigger: Trigger, seen: History) -> str | None:
    """Why pruning begins now, or None; at the latest in the latest epoch, unless the trigger has a time."""
    reason = trigger(seen)
    if reason is None and trigger not in (at_epoch, at_drawn_epoch) and seen.epoch >= seen.latest:
        return f"epoch {seen.epoch} is the latest to begin"
    return reason
