"""Parts of a plan, and the plan without some of them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import torch
from torch import Tensor

from clicktrain.surgery.channel_union import cuts
from clicktrain.surgery.groups import ChannelGroup, Dependencies
from clicktrain.surgery.plan import SurgeryPlan
from clicktrain.surgery.planning import gone_names, plan_of

BRANCHES = "branches"
"""The part that stands for all branches that are removed."""


def parts_of(plan: SurgeryPlan, found: Dependencies) -> list[Hashable]:
    """What can be left out of a plan: numbers of groups that it cuts, and `BRANCHES`."""
    cut = [number for number, mask in enumerate(_masks(plan, found.groups)) if not mask.all()]
    return [*([BRANCHES] if plan.removed_layers else []), *cut]


def restricted(plan: SurgeryPlan, found: Dependencies, parts: Collection[Hashable]) -> SurgeryPlan:
    """The plan with these parts alone, and without gates that it would put in.

    Args:
        plan: of the model as it is.
        found: the model's groups.
        parts: some of `parts_of` it.
    """
    layers = plan.removed_layers if BRANCHES in parts else ()
    masks = [
        mask if number in parts else torch.ones_like(mask)
        for number, mask in enumerate(_masks(plan, found.groups))
    ]
    made = cuts(found.groups, masks, gone_names(found.graph.model, layers))
    stays = {row.name: row.stays for row in plan.layers if row.stays}
    reasons = [group.fixed or "" for group in found.groups]
    return plan_of(found, masks, made, layers, (), reasons, stays)


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
