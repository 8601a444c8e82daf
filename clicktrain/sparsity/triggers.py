"""Triggers: when to begin, decided at the end of an epoch from what the run has seen so far.

The early pruning indicator asks whether the structure of what would be kept is stable (When to Prune?,
section 3.3). A structure says how many neurons (or kernels) of each layer belong to the best of the network.
Filters that can only go together count as one layer.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class LossSlope:
    """The derivative of the loss over epochs, and the threshold under which the loss has settled.

    ClickTrain section 4.1 starts pruning when "the derivative of the loss function on epochs" is less than a
    threshold, 0.27 (section 6.1), in its Figure 5 after about 50 of 190 epochs. Its loss function is E(W, D),
    on the data set D: here the loss summed over the batches of an epoch (``of`` "sum"). With 391 batches
    0.27 is a fall of 0.0007 in the mean loss, which CIFAR-10 networks reach after 40 to 50 epochs at the
    learning rate 0.1. The mean loss itself (``of`` "mean") falls by less than 0.27 from the third epoch on.

    The derivative is a difference quotient over ``epochs`` epochs. One epoch is noise: single losses rise
    long before the loss settles. Two are the central difference, which is the derivative one epoch ago.

    Attributes:
        threshold: the slope under which the loss has settled.
        of: "sum" over the batches of an epoch, or their "mean".
        epochs: 1 or more.
    """

    threshold: float = SLOPE
    of: str = "sum"
    epochs: int = 2

    def fall(self, losses: Sequence[float], batches: int) -> float | None:
        """By how much the loss falls per epoch at the end of ``losses``; None while there are too few.

        Args:
            losses: mean training loss of every finished epoch.
            batches: of an epoch.

        Examples:
            >>> LossSlope(of="mean", epochs=1).fall([2.0, 1.5], 100)
            0.5
            >>> LossSlope().fall([2.0, 1.5, 1.0], 100)
            50.0
        """
        if len(losses) <= self.epochs:
            return None
        fall = (losses[-1 - self.epochs] - losses[-1]) / self.epochs
        return fall * batches if self.of == "sum" else fall

    def describe(self) -> str:
        """The rule, in a clause."""
        over = "summed over an epoch's batches" if self.of == "sum" else "mean of an epoch's batches"
        return f"the loss ({over}) falls by less than {self.threshold:g} an epoch"


def layer_distance(first: int, second: int) -> float:
    """``|n1 - n2| / (n1 + n2)``, from 0 to 1: Eq. (4). A layer that is empty in both has not changed: 0."""
    return abs(first - second) / (first + second) if first or second else 0.0


def structure_similarity(first: Structure, second: Structure) -> float:
    """``1 - mean over layers of the distance``, from 0 to 1: Eq. (5).

    Examples:
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
        batches: of an epoch.
        indicators: EPI of every finished epoch, None where there was nothing to compare with.
        threshold: tau, from which a structure is stable.
        compared: earlier indicators that there must be, so that one can be compared with them.
        slope: when the loss has settled.
        chosen: epoch that the user has asked for.
        seed: draws an epoch.
    """

    epoch: int
    latest: int
    losses: Sequence[float] = ()
    batches: int = 1
    indicators: Sequence[float | None] = ()
    threshold: float = MAGNITUDE_THRESHOLD
    compared: int = 0
    slope: LossSlope = LossSlope()
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
    """When the early pruning indicator is high and no longer falls (When to Prune?, Algorithm 2, line 9).

    Line 9 compares an indicator with those of the five epochs before; with ``compared`` 5 all of them must
    exist. ResNet-34 then begins in epoch 11 at the earliest with r = 5, where Table 2 has it begin.
    """
    now = seen.indicators[-1] if seen.indicators else None
    before = [epi for epi in seen.indicators[-1 - NOT_LOWER_THAN : -1] if epi is not None]
    if now is None or len(before) < seen.compared or now < max(seen.threshold, *before, 0):
        return None
    return f"the structure is stable: EPI {now:.3f} is not under {seen.threshold:g}"


def when_loss_settles(seen: History) -> str | None:
    """When the loss no longer changes sharply (ClickTrain section 4.1, Figure 5): see `LossSlope`."""
    fall = seen.slope.fall(seen.losses, seen.batches)
    if fall is None or fall >= seen.slope.threshold:
        return None
    over = "summed over its batches" if seen.slope.of == "sum" else "mean of its batches"
    return f"the loss fell by {fall:.3f} an epoch, {over}: under {seen.slope.threshold:g}"


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
