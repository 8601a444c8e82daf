"""A plan is believed only after the smaller network has been compared; what does not bear it stays."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from clicktrain.graph.inputs import as_inputs
from clicktrain.surgery.blame import blamed
from clicktrain.surgery.channel_union import Sides
from clicktrain.surgery.compare import check_repeats, difference, sample
from clicktrain.surgery.dependency_analysis import dependencies
from clicktrain.surgery.groups import ChannelGroup
from clicktrain.surgery.plan import SurgeryPlan
from clicktrain.surgery.planning import Scheme, plan_keeping, plans_from_zeros
from clicktrain.surgery.restriction import parts_of, restricted


@dataclass(frozen=True, slots=True)
class Verified:
    """What is left of a plan.

    Attributes:
        plan: computes what the network with silenced channels does, in both modes.
        held: group of channels -> why it stays after all.
    """

    plan: SurgeryPlan
    held: dict[str, str] = field(default_factory=dict)

    def warn(self) -> None:
        """Say which channels stay."""
        if self.held:
            names, reason = ", ".join(self.held), next(iter(self.held.values()))
            what = "the others are removed" if self.plan else "nothing is removed"
            warnings.warn(
                f"channels of {names} stay, because without them the network computes something else "
                f"({reason}); {what}",
                stacklevel=3,
            )


def verified(plan: SurgeryPlan, model: nn.Module, example: Any) -> Verified:
    """Compare outputs with and without what a plan removes, in both modes; leave out what changes them.

    It costs two forward passes for each mode, on copies of the model, and more only where outputs differ.

    Args:
        plan: made for this model.
        model: stays as it is.
        example: its inputs, see `dependencies`.

    Raises:
        UserError: the model gives other outputs each time, or does not run on the example.
    """
    if not plan:
        return Verified(plan)
    inputs = sample(as_inputs(example, model))
    if difference(plan, model, inputs) is None:
        return Verified(plan)
    check_repeats(model, inputs)
    found = dependencies(model, inputs)

    def wrong(some: Sequence[Hashable]) -> str | None:
        return difference(restricted(plan, found, some), model, inputs)

    parts = parts_of(plan, found)
    bad = blamed(parts, wrong)
    rest = restricted(plan, found, [part for part in parts if part not in bad])
    held = {_name(part, found.groups): reason for part, reason in bad.items()}
    return Verified(rest, held or {"gated branches": "outputs differ with gates"})


def _name(part: Hashable, groups: Sequence[ChannelGroup]) -> str:
    return groups[part].name if isinstance(part, int) else "removed branches"


def plan_from_zeros(
    model: nn.Module,
    example: Any,
    threshold: float = 1e-4,
    scheme: Scheme = "union",
    round_to: int = 1,
    sides: Sides = "both",
) -> SurgeryPlan:
    """`plans_from_zeros` for one multiple, compared; channels that the network does not do without stay.

    Raises:
        UserError: as `plans_from_zeros` and `verified`.
    """
    plan = plans_from_zeros(model, example, threshold, scheme, (round_to,), sides)[round_to]
    result = verified(plan, model, example)
    result.warn()
    return result.plan


def plan_from_keep(
    model: nn.Module, example: Any, keep: Mapping[str, Tensor], round_to: int = 1
) -> SurgeryPlan:
    """`plan_keeping`, compared; channels that the network does not do without stay.

    Raises:
        UserError: as `plan_keeping` and `verified`.
    """
    result = verified(plan_keeping(model, example, keep, round_to), model, example)
    result.warn()
    return result.plan
