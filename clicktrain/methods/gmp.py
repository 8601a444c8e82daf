"""Gradual magnitude pruning: To prune, or not to prune (Zhu and Gupta, 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clicktrain.errors import UserError
from clicktrain.methods.base import RunLength
from clicktrain.methods.masks.moving import Moving
from clicktrain.methods.masks.update_times import Timing, make_timing
from clicktrain.sparsity.distributions import DISTRIBUTIONS, DistributionChoice
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import Units, Update
from clicktrain.sparsity.schedules import ScheduleChoice, left_at


@dataclass(frozen=True, kw_only=True)
class GMP(Moving):
    """The smallest weights of every layer go, step by step from dense to sparse (Zhu and Gupta, 2017).

    What is pruned stays pruned: it is zero and gets no gradient.
    """

    name: ClassVar[str] = "gmp"
    title: ClassVar[str] = "GMP"
    moves_last: ClassVar[bool] = True
    moves_in: ClassVar[str] = "pruning"

    densities: DistributionChoice = "uniform"
    """Weights over layers: the same share everywhere (the paper's), or Erdos-Renyi-kernel."""
    sparsity_schedule: ScheduleChoice = "cubic"
    """How the sparsity rises: s_f + (s_i - s_f) * (1 - t)^3 (the paper's), or another course of (1 - t)^3."""
    start: float = 0.1
    """Share of the run at which pruning begins."""
    stop: float = 0.6
    """Share of the run at which the sparsity asked for is reached and masks are frozen."""
    interval: int | None = None
    """Batches between pruning steps (the paper's frequency); by default 100, or a hundredth of a run of under
    10,000 batches."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if not 0 <= self.start < self.stop:
            raise UserError(
                f"start is a share of the run, from 0 to below stop ({self.stop:g}), not {self.start}"
            )

    def timing(self, length: RunLength) -> Timing:
        """When weights are pruned."""
        usual = min(100, length.total // 100)
        return make_timing(length, self.interval, usual, self.stop, start=self.start)

    def move(self, now: Update) -> tuple[Units, Units]:
        """Each layer keeps its largest, as many as Eq. (1) leaves at this time."""
        sparsity = self.sparsity * (1 - left_at(self.sparsity_schedule, now.done))
        kept = now.keep(now.counts(DISTRIBUTIONS.resolve(self.densities)(now.shapes, 1 - sparsity)))
        return kept, kept

    def describe(self) -> str:
        """How units move, in words."""
        return f"the smallest of each layer go, 0 to {self.sparsity:g} by a " + (
            f"{choice_name(self.sparsity_schedule)} schedule"
        )
