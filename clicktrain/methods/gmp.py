"""Gradual magnitude pruning: To prune, or not to prune (Zhu and Gupta, 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from clicktrain.methods.masks.moving import Gradual
from clicktrain.runs.events import DroppedEvent, Event
from clicktrain.sparsity.distributions import DistributionChoice
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import Units, Update
from clicktrain.sparsity.schedules import left_at


@dataclass(frozen=True, kw_only=True)
class GMP(Gradual):
    """Prune by magnitude on a rising schedule (Zhu and Gupta, 2017).

    What is pruned stays pruned: it is zero and gets no gradient.
    """

    name: ClassVar[str] = "gmp"
    title: ClassVar[str] = "GMP"
    usual_interval: ClassVar[tuple[int, int]] = (100, 100)

    densities: DistributionChoice = "uniform"
    """Weights over layers: the same share everywhere (the paper's), or Erdos-Renyi-kernel."""
    start: float = 0.1
    """Share of the run at which pruning begins."""
    interval: int | None = None
    """Batches between pruning steps (the paper's frequency); by default 100, or a hundredth of a run of under
    10,000 batches."""

    def move(self, now: Update) -> tuple[Units, Units]:
        """Each layer keeps its largest, as many as Eq. (1) leaves at this time."""
        sparsity = self.sparsity * (1 - left_at(self.sparsity_schedule, now.done))
        kept = now.keep(self.counts_at(now, 1 - sparsity))
        return kept, kept

    def event(self, now: Update, kept: Units, alive: Units, threshold: float) -> Event:
        """Nothing grows."""
        left, total = now.weights(kept), sum(math.prod(shape) for shape in now.shapes.values())
        return DroppedEvent(dropped=now.weights(now.alive) - left, sparsity=1 - left / total)

    def describe(self) -> str:
        """How units move, in words."""
        return f"the smallest of each layer go, 0 to {self.sparsity:g} by a " + (
            f"{choice_name(self.sparsity_schedule)} schedule"
        )
