"""Removing the channels that a penalty has pushed to zero, in the widths that pay (PruneTrain 4.1, 4.2)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers, SeenBatch
from clicktrain.latency.channel_multiple import MULTIPLES, WidthChoice, fastest_multiple
from clicktrain.methods.channels.lasso import Axes, weights_of
from clicktrain.methods.channels.steering import plan_within
from clicktrain.methods.channels.target import ChannelTarget
from clicktrain.sparsity.channel_lasso import zero_small_channels_
from clicktrain.surgery import SurgeryPlan, agreed_plans, plans_from_zeros

Scheme = Literal["union", "gating"]
Sides = Literal["both", "readers"]


@dataclass(frozen=True, slots=True)
class ZeroRemoval:
    """How zero channels are removed. The fields are settings of `clicktrain.methods.prunetrain.PruneTrain`.

    Raises:
        UserError: a value out of range.
    """

    threshold: float = 1e-4
    scheme: Scheme = "union"
    sides: Sides = "both"
    round_to: int | Literal["auto"] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < math.inf:
            raise UserError(f"threshold must not be negative, not {self.threshold}")
        if self.round_to != "auto" and self.round_to < 1:
            raise UserError(f"round_to must be at least 1, or auto, not {self.round_to}")

    @property
    def fixed_multiple(self) -> int:
        """The multiple of the widths where none is measured."""
        return 1 if self.round_to == "auto" else self.round_to

    def zero_small_(self, prunable: PrunableLayers, axes: Axes) -> int:
        """Set channels under the threshold to zero; how many."""
        return sum(zero_small_channels_(w, own, self.threshold) for w, own in weights_of(prunable, axes))

    def plans(
        self, prunable: PrunableLayers, multiples: Sequence[int] | None = None
    ) -> dict[int, SurgeryPlan]:
        """The removal of what is zero now, for each multiple of the widths; by default for all candidates."""
        if multiples is None:
            multiples = MULTIPLES if self.round_to == "auto" else sorted({1, self.round_to})
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
        if self.round_to != "auto":
            widths = f"widths in {self.round_to}s"
        return f"{self.scheme}, threshold {self.threshold:g}, {widths}"


def agree(prunable: PrunableLayers, plans: Mapping[int, SurgeryPlan]) -> dict[int, SurgeryPlan]:
    """The plans of the first process."""
    return agreed_plans(plans, prunable.layers[0].weight.device)
