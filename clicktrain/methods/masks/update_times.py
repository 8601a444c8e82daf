"""When units move in dynamic sparse training, and checks of the settings that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clicktrain.errors import UserError


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


def check_shares(settings: Any, names: Sequence[str]) -> None:
    """UserError unless these settings lie between 0 and 1."""
    for name in names:
        if not 0 < getattr(settings, name) < 1:
            raise UserError(f"{name} is a share and must be between 0 and 1, not {getattr(settings, name)}")
