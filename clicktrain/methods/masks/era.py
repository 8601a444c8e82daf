"""The pruning era over a run: when Campfire's threshold rises, and what may begin it early."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clicktrain.errors import UserError
from clicktrain.methods.base import RunLength
from clicktrain.methods.triggers import EarlyTrigger
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.schedules import SCHEDULES, Era, ScheduleChoice, campfire_threshold

PRESETS: dict[str, tuple[float, float]] = {
    "default": (0.3, 0.5),  # section 4: era 30-50 of 100 epochs
    "from-scratch": (0.0, 0.3),  # Tables 4 and 5: "start 0, era 0-30"
    "after-training": (0.0, 0.0),
}
"""First and last epoch of the era, as shares of the run."""


@dataclass(frozen=True, kw_only=True)
class EraSettings(EarlyTrigger):
    """When the share of weights that is zero rises, and how."""

    preset: Literal["default", "from-scratch", "after-training"] = "default"
    """Where the era lies if it is not given: 30% to 50% of the run, its first 30%, or, on weights that are
    trained already (--initial-weights), all at once before the first step."""
    initial_sparsity: float = 0.0
    """Threshold with which the era begins."""
    era: tuple[float, float] | None = None
    """First and last epoch of pruning, from 0 (the same twice: all at once); the preset's by default."""
    exponent: float = 3.0
    """Exponent r of the schedule; larger rises sooner."""
    sparsity_schedule: ScheduleChoice = "linear"
    """What the exponent is of: the time of the era that is left (linear, the paper's Eq. (1)), or another
    course of it."""
    rise: Literal["epoch", "step"] = "epoch"
    """The threshold rises from epoch to epoch (the paper's), or from step to step."""

    def check_era(self, sparsity: float) -> None:
        """UserError for a value out of range."""
        if not 0 <= self.initial_sparsity <= sparsity:
            raise UserError(f"initial_sparsity must be between 0 and sparsity, not {self.initial_sparsity}")
        if self.era is not None:
            object.__setattr__(self, "era", tuple(self.era))
            if not 0 <= self.era[0] <= self.era[1]:
                raise UserError(
                    f"era is the first and the last epoch of pruning, as in 30 50, not {list(self.era)}"
                )
        if not 0 < self.exponent < math.inf:
            raise UserError(f"exponent must be above 0, not {self.exponent}")

    def era_of(self, length: RunLength) -> Era:
        """The pruning era, in epochs.

        Raises:
            UserError: it ends after the run does, or holds no batch although it is to be longer than that.
        """
        era = Era.of_run(length.epochs, *PRESETS[self.preset]) if self.era is None else Era(*self.era)
        if era.last_epoch > length.epochs:
            raise UserError(
                f"the era ends at epoch {era.last_epoch:g} but the run has {length.epochs}: end it earlier"
            )
        first, last = _batches(era, length)
        if first >= last and era.length > 0 and self.era is None:
            raise UserError(
                f"a run of {length.total} batches is too short for the era of preset {self.preset}, epochs "
                f"{era.first_epoch:g} to {era.last_epoch:g}, which holds no batch: give more epochs, a "
                "smaller batch_size, or an era"
            )
        if first >= last and era.length > 0:
            raise UserError(
                f"the era {era.first_epoch:g}-{era.last_epoch:g} holds no batch "
                f"(an epoch has {length.steps_per_epoch}): make it longer"
            )
        return era

    def batches(self, length: RunLength) -> tuple[int, int]:
        """Batches seen when the era begins and when it is over."""
        return _batches(self.era_of(length), length)

    def threshold_at(self, sparsity: float, epoch: float, era: Era) -> float:
        """Eq. (1)."""
        schedule = SCHEDULES.resolve(self.sparsity_schedule)
        return campfire_threshold(epoch, era, sparsity, self.initial_sparsity, self.exponent, schedule)

    def threshold_of(self, sparsity: float, seen: int, length: RunLength) -> float:
        """Eq. (1) for the batch that follows ``seen`` batches, whose forward pass the mask is for."""
        era, (first, last) = self.era_of(length), self.batches(length)
        if not first <= seen < last:
            return sparsity if seen >= last else 0.0
        done = (seen - first) / length.steps_per_epoch
        epoch = era.first_epoch + (done if self.rise == "step" else math.floor(done))
        return self.threshold_at(sparsity, epoch, era)

    def describe_era(self, sparsity: float, epi: float, length: RunLength) -> tuple[str, str]:
        """How long training is dense, and how the threshold rises, in words."""
        era = self.era_of(length)
        early, until = "", f"until epoch {era.last_epoch:g}"
        if self.trigger != "own":
            sign = (
                f"EPI is at least {epi:g}"
                if self.trigger == "epi"
                else f"{choice_name(self.trigger)} says so"
            )
            early, until = f" at the latest, or until {sign}", f"{era.length:g} epochs"
        every = {"epoch": "by epoch", "step": "by step"}[self.rise]
        of = "" if self.sparsity_schedule == "linear" else f" of {choice_name(self.sparsity_schedule)}"
        rise = f"{self.initial_sparsity:g} to {sparsity:g} {every}, exponent {self.exponent:g}{of}"
        rise = rise if era.length else f"{sparsity:g} all at once"
        return f"until epoch {era.first_epoch:g}{early}", f"{until}, {rise}"


def _batches(era: Era, length: RunLength) -> tuple[int, int]:
    return round(era.first_epoch * length.steps_per_epoch), round(era.last_epoch * length.steps_per_epoch)
