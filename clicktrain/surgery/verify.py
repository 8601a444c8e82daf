"""A plan is believed only after the smaller network has been compared; what does not bear it stays."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.inputs import as_inputs
from clicktrain.surgery.channel_union import Sides, cuts
from clicktrain.surgery.compare import blamed, check_repeats, difference, sample
from clicktrain.surgery.dependency_analysis import dependencies
from clicktrain.surgery.groups import ChannelGroup, Dependencies
from clicktrain.surgery.plan import SurgeryPlan
from clicktrain.surgery.planning import Scheme, gone_names, plan_keeping, plan_of, plans_from_zeros


@dataclass(frozen=True, slots=True)
class Verified:
    """What is left of a plan: it computes what the network with silenced channels does, in both modes.

    ``held`` says of groups of channels why they stay after all.
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

    Raises:
        UserError: the model gives other outputs each time, or does not run on the example.
    """
    if not plan:
        return Verified(plan)
    inputs = sample(as_inputs(example, model))
    if difference(plan, model, inputs) is None:
        return Verified(plan)
    check_repeats(model, inputs)
    deps = dependencies(model, inputs)

    def wrong(some: Sequence[Hashable]) -> str | None:
        return difference(restricted(plan, deps, some), model, inputs)

    parts = parts_of(plan, deps)
    bad = blamed(parts, wrong)
    rest = restricted(plan, deps, [part for part in parts if part not in bad])
    names = {part: deps.groups[part].name if isinstance(part, int) else "removed branches" for part in bad}
    held = {names[part]: reason for part, reason in bad.items()}
    return Verified(rest, held or {"gated branches": "outputs differ with gates"})


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


BRANCHES = "branches"
"""The part that stands for all branches that are removed."""


def parts_of(plan: SurgeryPlan, deps: Dependencies) -> list[Hashable]:
    """What can be left out of a plan: numbers of groups that it cuts, and `BRANCHES`."""
    cut = [number for number, mask in enumerate(_masks(plan, deps.groups)) if not mask.all()]
    return [*([BRANCHES] if plan.removed_layers else []), *cut]


def restricted(plan: SurgeryPlan, deps: Dependencies, parts: Collection[Hashable]) -> SurgeryPlan:
    """The plan with some of its parts (`parts_of`) alone, and without gates that it would put in."""
    layers = plan.removed_layers if BRANCHES in parts else ()
    whole = enumerate(_masks(plan, deps.groups))
    masks = [mask if number in parts else torch.ones_like(mask) for number, mask in whole]
    made = cuts(deps.groups, masks, gone_names(deps.graph.model, layers))
    stays = {row.name: row.stays for row in plan.layers if row.stays}
    reasons = [group.fixed or "" for group in deps.groups]
    return plan_of(deps, masks, made, layers, (), reasons, stays)


def _masks(plan: SurgeryPlan, groups: Sequence[ChannelGroup]) -> list[Tensor]:
    """Per group bool [size]: whether a channel stays; a gated layer that needs fewer has no say."""
    keep = {(cut.name, cut.dim): set(cut.keep) for cut in plan.cuts}
    masks = []
    for group in groups:
        mask = torch.zeros(group.size, dtype=torch.bool)
        known = [member for member in group.members if plan.new_name(member.name) is not None]
        for member in known:
            kept = keep.get((member.name, member.dim))
            for channel, indices in enumerate(member.indices):
                mask[channel] |= kept is None or not kept.isdisjoint(indices)
        masks.append(mask if known else torch.ones_like(mask))
    return masks
