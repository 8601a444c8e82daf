"""When units move in dynamic sparse training, and checks of the settings that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clicktrain.errors import UserError
from clicktrain.methods.base import RunLength


@dataclass(frozen=True, slots=True)
class Timing:
    """When units move: every ``interval`` batches, before ``end``; with ``doubling`` half as often in each
    further quarter of the run."""

    interval: int
    end: int
    total: int
    doubling: bool = False

    def due(self, seen: int, updated: int) -> bool:
        """Whether units are to move after ``seen`` batches, given when they last did."""
        if seen >= self.end:
            return False
        interval = self.interval
        if self.doubling:
            interval *= 2 ** min(4 * updated // self.total, 3)
        return seen // interval > updated // interval


def make_timing(
    length: RunLength, interval: int | None, usual: int, stop: float, *, doubling: bool = False
) -> Timing:
    """Batches from settings: ``stop`` is a share of the run, ``usual`` stands in for no interval.

    Raises:
        UserError: no unit would ever move.
    """
    timing = Timing(
        max(usual, 1) if interval is None else interval, round(stop * length.total), length.total, doubling
    )
    if timing.interval >= timing.end:
        raise UserError(
            f"interval is {timing.interval} but masks are fixed after {timing.end} of {length.total} batches "
            f"(stop {stop:g}): they would never change; take a shorter interval or a longer run"
        )
    return timing


def check_times(interval: int | None, stop: float, mask_seed: int | None) -> None:
    """UserError unless updates can be timed by these."""
    if interval is not None and interval < 1:
        raise UserError(f"interval is a number of batches, at least 1, not {interval}")
    if not 0 < stop <= 1:
        raise UserError(f"stop is a share of the run, above 0 and at most 1, not {stop}")
    if mask_seed is not None and mask_seed < 0:
        raise UserError(f"mask_seed must be at least 0, not {mask_seed}")


def check_shares(settings: Any, names: Sequence[str]) -> None:
    """UserError unless these settings lie between 0 and 1."""
    for name in names:
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"{name} is a share and must be between 0 and 1, not {getattr(settings, name)}")
