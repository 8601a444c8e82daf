"""Triggers: when to begin, decided at the end of an epoch from what the run has seen so far.

The early pruning indicator asks whether the structure of what would be kept is stable (When to Prune?,
section 3.3). A structure says how many neurons (or kernels) of each layer belong to the best of the network.
Filters that can only go together count as one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from clicktrain.sparsity.guard import guard_of, returned
from clicktrain.sparsity.registry import Registry

Structure: TypeAlias = Sequence[int]
"""Kept neurons per layer, always in the same order of layers."""

GRADIENT_THRESHOLD = 0.944
"""tau for the gradient criterion, all networks and ratios (section 4.2)."""
MAGNITUDE_THRESHOLD = 0.983
"""tau for the magnitude criterion."""
NOT_LOWER_THAN = 5
"""EPI must not be lower than in this many epochs before (Algorithm 2, line 9)."""
SLOPE = 0.27
"""ClickTrain's threshold of the derivative of the loss (section 6.1)."""


def layer_distance(first: int, second: int) -> float:
    """``|n1 - n2| / (n1 + n2)``, from 0 to 1: Eq. (4). A layer that is empty in both has not changed: 0."""
    return abs(first - second) / (first + second) if first or second else 0.0


def structure_similarity(first: Structure, second: Structure) -> float:
    """``1 - mean over layers of the distance``, from 0 to 1: Eq. (5).

    Example:
        >>> structure_similarity([4, 4], [6, 2])
        0.7333333333333334
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"structures of {len(first)} and {len(second)} layers cannot be compared")
    distances = [layer_distance(a, b) for a, b in zip(first, second, strict=True)]
    return 1 - sum(distances) / len(distances)


def early_pruning_indicator(structures: Sequence[Structure], window: int) -> float | None:
    """Mean similarity of the last structure to those of the r epochs before, ``window``: Eq. (6).

    None while there are fewer.
    """
    if len(structures) <= window:
        return None
    now, before = structures[-1], structures[-1 - window : -1]
    return sum(structure_similarity(now, past) for past in before) / window


def kept_kernels(scores: Mapping[str, Tensor], share: float) -> list[int]:
    """The structure of a network of kernels: how many of each layer are among this share of the best of all.

    Scores compare over layers, larger = keep; ties go to the first.
    """
    flat = torch.cat([score.detach().float().flatten() for score in scores.values()])
    owner = torch.cat(
        [torch.full((score.numel(),), number) for number, score in enumerate(scores.values())]
    ).to(flat.device)
    best = torch.sort(flat, descending=True, stable=True).indices[: max(1, round(share * flat.numel()))]
    counts: list[int] = torch.bincount(owner[best], minlength=len(scores)).tolist()
    return counts


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
    "trigger",
    {"epi": when_stable, "loss_slope": when_loss_settles},
    group="clicktrain.triggers",
    guard=guard_of(
        "trigger",
        "a function (History) -> why pruning begins, a text, or None",
        lambda value, seen: None if value is None or (isinstance(value, str) and value) else returned(value),
    ),
    trial=lambda trigger, layers: trigger(History(0, 1)),
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
