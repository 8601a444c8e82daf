"""When units move in dynamic sparse training, and checks of the settings that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clicktrain.errors import UserError
from clicktrain.methods.base import RunLength


@dataclass(frozen=True, slots=True)
class Timing:
    """When units move: every ``interval`` batches between ``begin`` and ``end``; with ``doubling`` half as
    often in each further quarter of the run."""

    interval: int
    end: int
    total: int
    doubling: bool = False
    begin: int = 0

    def due(self, seen: int, updated: int) -> bool:
        """Whether units are to move after ``seen`` batches, given when they last did."""
        if not self.begin < seen < self.end:
            return False
        interval = self.interval
        if self.doubling:
            interval *= 2 ** min(4 * updated // self.total, 3)
        return (seen - self.begin) // interval > max(updated - self.begin, 0) // interval

    def done(self, seen: int) -> float:
        """Share of the time of all updates that is past."""
        return min(max(seen - self.begin, 0) / max(self.end - self.begin, 1), 1.0)

    def describe(self) -> str:
        """In words."""
        every = "every batch" if self.interval == 1 else f"every {self.interval} batches"
        return f"until batch {self.end} of {self.total}, {every}" + (
            ", twice as many by quarters" if self.doubling else ""
        )


def make_timing(
    length: RunLength,
    interval: int | None,
    usual: int,
    stop: float,
    *,
    start: float = 0.0,
    doubling: bool = False,
) -> Timing:
    """Batches from settings: ``start`` and ``stop`` are shares of the run, ``usual`` an interval by default.

    Raises:
        UserError: no unit would ever move.
    """
    every = max(usual, 1) if interval is None else interval
    begin, end = round(start * length.total), round(stop * length.total)
    timing = Timing(every, end, length.total, doubling, begin)
    if timing.interval >= timing.end - timing.begin:
        since = f", start {start:g}" if start else ""
        raise UserError(
            f"interval is {timing.interval} but masks are fixed after {timing.end} of {length.total} batches "
            f"(stop {stop:g}{since}): they would never change; take a shorter interval or a longer run"
        )
    return timing


def check_times(interval: int | None, stop: float) -> None:
    """UserError unless updates can be timed by these."""
    if interval is not None and interval < 1:
        raise UserError(f"interval is a number of batches, at least 1, not {interval}")
    if not 0 < stop <= 1:
        raise UserError(f"stop is a share of the run, above 0 and at most 1, not {stop}")


def check_shares(settings: Any, names: Sequence[str]) -> None:
    """UserError unless these settings lie between 0 and 1."""
    for name in names:
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"{name} is a share and must be between 0 and 1, not {getattr(settings, name)}")
