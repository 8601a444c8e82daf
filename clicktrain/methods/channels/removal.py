"""Removing the channels that are zero: when, and in which widths (PruneTrain 4.1, 4.2, 5)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers, SeenBatch
from clicktrain.latency.channel_multiple import MULTIPLES, WidthChoice, fastest_multiple, liked_multiple
from clicktrain.methods.channels.lasso import Axes, weights_of
from clicktrain.methods.channels.steering import plan_within
from clicktrain.methods.channels.target import ChannelTarget
from clicktrain.methods.contract import RunLength
from clicktrain.sparsity.channel_lasso import zero_small_channels_
from clicktrain.surgery import SurgeryPlan, agreed_plans, plans_from_zeros

Scheme = Literal["union", "gating"]
Sides = Literal["both", "readers"]
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
        """Epoch of the only reconfiguration before the end."""
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
        """Whether channels go after this epoch; ``last`` was the epoch of the last removal, if ``done``."""
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
            "once": f"once, after epoch {self.once(length):g}, and at the end",
            "end": "at the end of the run only",
        }[self.reconfigure]


@dataclass(frozen=True, slots=True)
class ZeroRemoval:
    """How zero channels are removed. The fields are settings of `clicktrain.methods.prunetrain.PruneTrain`.

    Raises:
        UserError: a value out of range.
    """

    threshold: float = 1e-4
    scheme: Scheme = "union"
    sides: Sides = "both"
    round_to: int | Literal["auto", "device"] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise UserError(f"threshold must not be negative, not {self.threshold}")
        if isinstance(self.round_to, int) and self.round_to < 1:
            raise UserError(f"round_to must be at least 1, auto or device, not {self.round_to}")

    def fixed_multiple(self, prunable: PrunableLayers) -> int:
        """The multiple of the widths where none is measured."""
        if isinstance(self.round_to, int):
            return self.round_to
        return 1 if self.round_to == "auto" else liked_multiple(prunable.layers)

    def zero_small_(self, prunable: PrunableLayers, axes: Axes) -> int:
        """Set channels under the threshold to zero; how many."""
        return sum(zero_small_channels_(w, own, self.threshold) for w, own in weights_of(prunable, axes))

    def plans(
        self, prunable: PrunableLayers, multiples: Sequence[int] | None = None
    ) -> dict[int, SurgeryPlan]:
        """The removal of what is zero now, for each multiple of the widths; by default for all candidates."""
        if multiples is None:
            fixed = sorted({1, self.fixed_multiple(prunable)})
            multiples = MULTIPLES if self.round_to == "auto" else fixed
        if prunable.example is None:
            return dict.fromkeys(multiples, SurgeryPlan())
        assert prunable.model is not None
        return plans_from_zeros(
            prunable.model, prunable.example, self.threshold, self.scheme, multiples, self.sides
        )

    def choose_width(
        self, prunable: PrunableLayers, seen: SeenBatch, plans: Mapping[int, SurgeryPlan]
    ) -> WidthChoice | None:
        """The multiple with which the network trains fastest, measured; None if nothing is to be chosen."""
        assert prunable.model is not None
        return fastest_multiple(prunable.model, seen, plans) if self.round_to == "auto" else None

    def within(
        self, target: ChannelTarget, prunable: PrunableLayers, multiple: int, *, fill: bool
    ) -> SurgeryPlan:
        """The removal of what is zero, not beyond a target; with ``fill`` also of what is missing."""

        def make(
            stay: Mapping[str, Tensor], remove_layers: bool, scheme: Scheme = self.scheme
        ) -> SurgeryPlan:
            assert prunable.model is not None
            return plans_from_zeros(
                prunable.model, prunable.example, self.threshold, scheme, (multiple,), self.sides,
                stay=stay, remove_layers=remove_layers,
            )[multiple]  # fmt: skip

        union = functools.partial(make, scheme="union")
        plan = plan_within(target, make, union, round_to=multiple, fill=fill)
        return agree(prunable, {multiple: plan})[multiple]

    def describe(self) -> str:
        """How, in a clause."""
        widths = "widths in the multiple that trains fastest here, measured"
        if self.round_to == "device":
            widths = "widths in what the device likes (8s on GPUs)"
        elif self.round_to != "auto":
            widths = f"widths in {self.round_to}s"
        return f"{self.scheme}, threshold {self.threshold:g}, {widths}"


def agree(prunable: PrunableLayers, plans: Mapping[int, SurgeryPlan]) -> dict[int, SurgeryPlan]:
    """The plans of the first process."""
    return agreed_plans(plans, prunable.layers[0].weight.device)
