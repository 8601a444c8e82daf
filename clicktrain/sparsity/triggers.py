"""Triggers: when to begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clicktrain.sparsity.stability import MAGNITUDE_THRESHOLD, NOT_LOWER_THAN


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


@dataclass(frozen=True, slots=True)
class StructureStable:
    """Fires when the early pruning indicator is high and no longer falls (When to Prune?, Algorithm 2).

    The indicator is that of `clicktrain.sparsity.stability`; its two thresholds are in that module.
    """

    threshold: float = MAGNITUDE_THRESHOLD
    not_lower_than: int = NOT_LOWER_THAN

    def fires(self, indicators: Sequence[float | None]) -> str | None:
        """The reason in words if the trigger fires after the last epoch, else None.

        Args:
            indicators: EPI of every epoch so far, None where there was nothing to compare with.
        """
        now = indicators[-1] if indicators else None
        if now is None or now < self.threshold:
            return None
        before = [epi for epi in indicators[-1 - self.not_lower_than : -1] if epi is not None]
        if before and now < max(before):
            return None
        return f"the structure is stable: EPI {now:.3f} is not under {self.threshold:g}"
