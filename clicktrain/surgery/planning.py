"""Making plans: from weights that have become zero (PruneTrain), or from a ranking of channels (PaT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.surgery.channel_gating import gate_branches
from clicktrain.surgery.channel_union import Sides, cuts, dead_channels, keep_masks, resized_gates, tensors_of
from clicktrain.surgery.dependency_analysis import dependencies
from clicktrain.surgery.groups import Dependencies
from clicktrain.surgery.layer_removal import removable_branches, replacements
from clicktrain.surgery.plan import Cut, Gate, LayerChange, RemovedLayer, SurgeryPlan
from clicktrain.surgery.values import Values

Scheme = Literal["union", "gating"]


def plans_from_zeros(
    model: nn.Module,
    example: Any,
    threshold: float = 1e-4,
    scheme: Scheme = "union",
    multiples: Sequence[int] = (1,),
    sides: Sides = "both",
    *,
    stay: Mapping[str, Tensor] | None = None,
    remove_layers: bool = True,
) -> dict[int, SurgeryPlan]:
    """What PruneTrain's reconfiguration removes (4.1, 4.2): zeroed channels, and zeroed layers of branches.

    Nothing is compared, see `verify`. The model is not changed. Weights under the threshold are taken for
    zero only where nothing can make them large again; a batch norm can (it divides by their standard
    deviation), so set groups under the threshold to zero first, as the paper does.

    Args:
        threshold: largest absolute weight of a channel that counts as zero.
        scheme: ``union`` or ``gating``, see the modules of these names.
        multiples: widths become multiples of it, by keeping the largest of the dead channels: one plan each.
        sides: ``both`` or ``readers``, see `channel_union.dead_channels`.
        stay: name of a group -> bool [channels], True = stays although it is zero.
        remove_layers: whether zeroed layers of branches go.

    Raises:
        UserError: the model has no graph, or an argument is out of range.
    """
    if scheme not in ("union", "gating"):
        raise UserError(f"the scheme must be 'union' or 'gating', got {scheme!r}")
    if sides not in ("both", "readers"):
        raise UserError(f"sides must be 'both' or 'readers', got {sides!r}")
    if not threshold >= 0:
        raise UserError(f"the threshold must be at least 0, got {threshold}")
    for multiple in multiples:
        _check_round_to(multiple)
    deps = dependencies(model, example)
    values = Values(deps, threshold)
    branches = removable_branches(deps.graph, values, threshold) if remove_layers else {}
    removed = [branch for branch, reason in branches.items() if reason is None]
    layers = tuple(r for branch in removed for r in replacements(deps.graph, branch, values, threshold))
    gone = {node for branch in removed for view in branch.views for node in view.nodes}
    may_go, reasons = dead_channels(deps, values, threshold, gone, sides)
    for group, dead in zip(deps.groups, may_go, strict=True):
        if stay is not None and group.name in stay:
            dead &= ~stay[group.name]
    stays = {str(branch.last.target): reason for branch, reason in branches.items() if reason is not None}
    plans, names = {}, gone_names(model, layers)
    for multiple in multiples:
        masks = keep_masks(model, deps.groups, may_go, multiple)
        made = cuts(deps.groups, masks, names)
        gates: tuple[Gate, ...] = ()
        if scheme == "gating":
            made, gates = gate_branches(deps, values, threshold, masks, made, removed, multiple)
        plans[multiple] = plan_of(deps, masks, made, layers, gates, reasons, stays)
    return plans


def plan_keeping(
    model: nn.Module, example: Any, keep: Mapping[str, Tensor], round_to: int = 1
) -> SurgeryPlan:
    """What a ranking of channels removes, whatever the weights are; not compared, see `verify`.

    Args:
        keep: by name of a group (see `groups.ChannelGroup.name`) or of a layer (its output channels), a bool
            mask [channels], True = stays. Where masks of several layers meet in one group, a channel stays
            if one of them keeps it (channel union).
        round_to: widths become multiples of it, by keeping channels with the largest weights.

    Raises:
        UserError: no such layer, a mask of another size or without a True, or channels that cannot go.
    """
    _check_round_to(round_to)
    deps = dependencies(model, example)
    asked = [torch.zeros(group.size, dtype=torch.bool) for group in deps.groups]
    kept = [torch.zeros(group.size, dtype=torch.bool) for group in deps.groups]
    for name, mask in keep.items():
        places = _places(deps, name)
        if mask.dtype != torch.bool or tuple(mask.shape) != (len(places),):
            raise UserError(f"{name} has {len(places)} channels: its mask must be bool of that length")
        if not mask.any():
            raise UserError(f"the mask of {name} keeps no channel: keep at least one")
        for (number, channel), stays in zip(places, mask.tolist(), strict=True):
            asked[number][channel] = True
            kept[number][channel] |= stays
    may_go = [a & ~k for a, k in zip(asked, kept, strict=True)]
    for group, dead in zip(deps.groups, may_go, strict=True):
        if group.fixed is not None and dead.any():
            raise UserError(f"channels of {group.name} cannot be removed: {group.fixed}")
    masks = keep_masks(model, deps.groups, may_go, round_to)
    return plan_of(deps, masks, cuts(deps.groups, masks), (), (), [g.fixed or "" for g in deps.groups], {})


def _check_round_to(round_to: int) -> None:
    if round_to < 1:
        raise UserError(f"round_to must be at least 1, got {round_to}")


def _places(deps: Dependencies, name: str) -> list[tuple[int, int]]:
    """(group, channel) of every channel of a group, or of a layer's outputs."""
    for number, group in enumerate(deps.groups):
        if group.name == name:
            return [(number, channel) for channel in range(group.size)]
    module: Any = dict(deps.graph.model.named_modules(remove_duplicate=False)).get(name)
    weight: Any = getattr(module, "weight", None)
    dim = 1 if "Transpose" in type(module).__name__ else 0
    atoms = deps.flow.atoms
    if not isinstance(weight, Tensor) or not atoms.knows(weight, dim):
        raise UserError(f"there is no layer or group of channels called {name!r}")
    return [place for atom in atoms.of(weight, dim) if (place := deps.place(atom)) is not None]


def gone_names(model: nn.Module, layers: tuple[RemovedLayer, ...]) -> set[str]:
    """Parameters and buffers that disappear with these layers."""
    plan = SurgeryPlan(removed_layers=layers)
    return {name for name in tensors_of(model) if plan.new_name(name) is None}


def plan_of(
    deps: Dependencies,
    masks: list[Tensor],
    made: dict[tuple[str, int], Cut],
    removed: tuple[RemovedLayer, ...],
    gates: tuple[Gate, ...],
    reasons: list[str],
    stays: Mapping[str, str],
) -> SurgeryPlan:
    """A plan from its parts, with the table of all layers and the sizes of gates that are there already."""
    resized = resized_gates(deps, masks)
    rows, seen = [], set()
    for node in deps.graph.all_nodes:
        name, word = str(node.target), deps.graph.operation(node)
        if word in ("conv", "conv_transpose", "linear") and name not in seen:
            seen.add(name)
            rows.append(_row(deps, name, word, made, reasons, stays))
    return SurgeryPlan(tuple(made.values()), removed, (*resized, *gates), tuple(rows))


def _row(
    deps: Dependencies,
    name: str,
    word: str,
    made: Mapping[tuple[str, int], Cut],
    reasons: list[str],
    stays: Mapping[str, str],
) -> LayerChange:
    module: Any = deps.graph.module(next(n for n in deps.graph.all_nodes if str(n.target) == name))
    weight, outputs = module.weight, 1 if word == "conv_transpose" else 0
    path = deps.flow.atoms.name(weight)
    sizes = []
    for dim in (1 - outputs, outputs):
        cut = made.get((path, dim))
        sizes.append((weight.shape[dim], len(cut.keep) if cut else weight.shape[dim]))
    if getattr(module, "groups", 1) > 1:
        # The second dimension of the weight is per group; of a depthwise layer whole groups go.
        grouped, whole = sizes[outputs], sizes[1 - outputs]
        groups = (module.groups, module.groups * whole[1] // whole[0] if grouped[0] == 1 else module.groups)
        sizes[outputs] = (grouped[0] * groups[0], grouped[1] * groups[1])
    note = stays.get(name, "")
    if not note:
        places = [p for atom in deps.flow.atoms.of(weight, outputs) if (p := deps.place(atom))]
        note = next((reasons[group] for group, _ in places if reasons[group]), "")
    return LayerChange(name, sizes[0], sizes[1], note)
