"""How many channels are removed: a share of them, or as many as it takes to meet a latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer
from clicktrain.latency.channel_multiple import liked_multiple
from clicktrain.methods.outcome import NOTED, Reached, Target, check_latency_target, latency_target


@dataclass(frozen=True, slots=True)
class ChannelBudget:
    """How many channels are removed. The fields are settings of `clicktrain.methods.pat.PaT`.

    Raises:
        UserError: a value out of range, or settings that contradict each other.
    """

    prune_ratio: float = 0.3
    latency_target: float | None = None
    latency_target_ms: float | None = None
    latency_batch: int = 1
    latency_penalty: float | None = None
    min_channels: int = 1
    round_to: int | Literal["device"] = 1
    prune_ratio_of: str = "filters"

    def __post_init__(self) -> None:
        if not 0 < self.prune_ratio < 1:
            raise UserError(f"prune_ratio must be between 0 and 1 (0.3 keeps 70%), not {self.prune_ratio}")
        if isinstance(self.round_to, int) and self.round_to < 1:
            raise UserError(f"round_to must be at least 1, or device, not {self.round_to}")
        for key in ("min_channels", "latency_batch"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, not {getattr(self, key)}")
        check_latency_target(self.latency_target, self.latency_target_ms)
        if self.latency_batch != 1 and not self.by_latency and self.latency_penalty is None:
            raise UserError(
                f"latency_batch is {self.latency_batch} but no latency counts: give latency_target or "
                "latency_penalty too"
            )
        if self.latency_penalty is not None and not 0 <= self.latency_penalty < math.inf:
            raise UserError(f"latency_penalty must not be negative, not {self.latency_penalty}")

    def on(self, layers: Sequence[PrunableLayer]) -> ChannelBudget:
        """The same, with ``device`` as the multiple that the device of a network's layers takes."""
        return replace(self, round_to=liked_multiple(layers)) if self.round_to == "device" else self

    @property
    def by_latency(self) -> bool:
        """Whether a latency is the target."""
        return self.latency_target is not None or self.latency_target_ms is not None

    @property
    def penalty(self) -> float:
        """The power of the saved time that importance is divided by."""
        return float(self.by_latency) if self.latency_penalty is None else self.latency_penalty

    def describe(self, num_pruned: int) -> str:
        """What is asked for, in a clause; ``num_pruned`` is the ratio in what it counts."""
        if self.latency_target_ms is not None:
            return f"as many are removed as it takes to reach {self.latency_target_ms:g} ms"
        if self.latency_target is not None:
            return f"as many are removed as it takes to reach {self.latency_target:.0%} of the time"
        return (
            f"{num_pruned} {self.prune_ratio_of} are removed ({self.prune_ratio:g} asked), wherever they are"
        )

    def target(self, reached: Reached) -> Target:
        """What was asked for and what was reached, by the last removal."""
        event = reached.last_event("reconfigured", "neurons")
        if self.by_latency:
            return latency_target(event, self.latency_target, self.latency_target_ms)
        removed = float(event.get("prune_ratio", 0.0))
        reason = "" if event else "the run ended before a batch was seen"
        if event and abs(removed - self.prune_ratio) > NOTED * self.prune_ratio:
            reason = f"there are {event['neurons']} neurons"
            if self.prune_ratio_of == "filters":
                reason += f" of {event['filters']} filters, which go together"
            multiple = event.get("round_to", 1)
            if multiple > 1:
                reason += f", and widths are multiples of {multiple}"
        return Target(f"{self.prune_ratio_of} removed", self.prune_ratio, removed, "share", reason)
