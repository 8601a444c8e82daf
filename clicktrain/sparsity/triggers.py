"""Triggers: when to begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossSlope:
    """Fires when the loss no longer changes sharply (ClickTrain section 4.1, Figure 5).

    The derivative of the loss over epochs is the drop of the mean training loss between two epochs; the
    paper's threshold is 0.27 (section 6.1).
    """

    threshold: float = 0.27

    def fires(self, losses: Sequence[float]) -> str | None:
        """The reason in words if the trigger fires, else None.

        Args:
            losses: mean training loss of every epoch so far; at least two are needed.
        """
        if len(losses) < 2:
            return None
        slope = losses[-2] - losses[-1]
        if slope < self.threshold:
            return f"the loss fell by {slope:.3f} in the last epoch, under {self.threshold:g}"
        return None
