"""When channels are removed: every few epochs, once, or at the end of the run (PruneTrain 4.1, 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clicktrain.errors import UserError
from clicktrain.methods.contract import RunLength

TARGET_AT = 0.75
"""Share of the run after which a target is met."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """The epochs of reconfigurations. The fields are settings of `clicktrain.methods.prunetrain.PruneTrain`.

    Raises:
        UserError: a value out of range, or settings that contradict each other.
    """

    reconfigure: Literal["interval", "once", "end"] = "interval"
    interval: float | None = None
    once_at: float | None = None
    target_at: float | None = None
    fine_tune: float = 0.0

    def __post_init__(self) -> None:
        for key in ("interval", "once_at", "target_at"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{key} must be above 0, not {value}")
        if not 0 <= self.fine_tune < math.inf:
            raise UserError(f"fine_tune must not be negative, not {self.fine_tune}")
        if self.once_at is not None and self.reconfigure != "once":
            raise UserError("once_at is set but reconfigure is not 'once': set that too")

    def check(self, length: RunLength) -> None:
        """Raise UserError where the run is too short."""
        if self.fine_tune >= length.epochs:
            raise UserError(
                f"fine_tune is {self.fine_tune:g} epochs: leave some of the {length.epochs} to the lasso"
            )
        for key in ("once_at", "target_at"):
            value = getattr(self, key)
            if value is not None and value > length.epochs:
                raise UserError(f"{key} is {value:g} but the run has {length.epochs} epochs")

    def interval_of(self, length: RunLength) -> float:
        """Epochs between two reconfigurations."""
        return self.interval or float(max(1, round(length.epochs / 18)))

    def once(self, length: RunLength) -> float:
        """Epoch of the only reconfiguration."""
        return self.once_at if self.once_at is not None else length.epochs / 2

    def target_epoch(self, length: RunLength) -> int:
        """Finished epochs when a target is met; the run's length: at its end."""
        if self.reconfigure == "end":
            return length.epochs
        if self.reconfigure == "once":
            return max(1, math.floor(self.once(length)))
        at = TARGET_AT * length.epochs if self.target_at is None else self.target_at
        return max(1, math.floor(min(at, length.epochs - self.fine_tune)))

    def due(self, epoch: int, last: float, done: bool, length: RunLength) -> bool:
        """Whether channels are removed after an epoch.

        Args:
            epoch: finished epochs.
            last: those at the last reconfiguration.
            done: whether there was one.
            length: of the run.
        """
        if self.reconfigure == "interval":
            return epoch - last >= self.interval_of(length)
        return self.reconfigure == "once" and not done and epoch >= self.once(length)

    def tunes(self, epoch: int, length: RunLength) -> bool:
        """Whether the last epochs, those without the lasso, have begun."""
        return bool(self.fine_tune) and epoch >= length.epochs - self.fine_tune

    def describe(self, length: RunLength) -> str:
        """When, in a clause."""
        every = self.interval_of(length)
        return {
            "interval": f"every {every:g} epoch{'s' if every != 1 else ''} and at the end",
            "once": f"once, after epoch {self.once(length):g}",
            "end": "at the end of the run only",
        }[self.reconfigure]
