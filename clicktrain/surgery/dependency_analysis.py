"""The groups of a model as they stand in its graph, and tried: a channel of each is taken out of a copy.

What the graph does not show is seen there: numbers of a layer that ``forward`` reads (``conv.out_channels``,
``weight.shape``), and whatever else computes something different with fewer channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clicktrain.graph.inputs import Inputs, as_inputs
from clicktrain.surgery.channel_union import cuts, resized_gates, tensors_of
from clicktrain.surgery.compare import blamed, check_repeats, difference, sample
from clicktrain.surgery.graph import trace
from clicktrain.surgery.groups import ChannelGroup, Dependencies
from clicktrain.surgery.layers import ChannelScatter
from clicktrain.surgery.plan import SurgeryPlan

_Held = tuple[tuple[str, int, str], ...]
_tried: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], _Held]] = WeakKeyDictionary()
"""Per model the names of its tensors, and which dimensions of which cannot be cut. Code does not change."""


def dependencies(model: nn.Module, example: Any) -> Dependencies:
    """Analyze a model.

    Args:
        model: any module that torch.fx can trace; modules inside that it cannot are kept whole.
        example: its inputs, a batch of at least one, see `clicktrain.graph.inputs.as_inputs`.

    Raises:
        UserError: the model has no graph.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> group = dependencies(model, torch.zeros(1, 3, 8, 8)).groups[1]
        >>> group.size, [(member.name, member.dim) for member in group.members][:2]
        (8, [('0.weight', 0), ('0.bias', 0)])
    """
    inputs = sample(as_inputs(example, model))
    deps = Dependencies(trace(model, inputs))
    names = tuple(tensors_of(model))
    known = _tried.get(model)
    if known is not None and known[0] == names:
        deps.hold_tensors(known[1])
        return deps
    held = _hold(deps, inputs)
    if held is not None:
        _tried[model] = names, held
    return deps


def channel_groups(model: nn.Module, example: Any) -> tuple[ChannelGroup, ...]:
    """The groups of a model alone; arguments and errors as `dependencies`."""
    return dependencies(model, example).groups


def _hold(deps: Dependencies, inputs: Inputs) -> _Held | None:
    """Fix the groups that a copy of the model does not do without one channel of; None: not to be cached."""
    model = deps.graph.model
    free = [n for n, group in enumerate(deps.groups) if group.fixed is None and group.size > 1]

    def wrong(some: Sequence[int]) -> str | None:
        return difference(_without_one(deps, some), model, inputs)

    if wrong(free) is None:
        return ()
    check_repeats(model, inputs)
    bad = blamed(free, wrong)
    whole: list[tuple[str, int, str]] = []
    tensors = tensors_of(model)
    for number, why in bad.items():
        group = deps.groups[number]
        reason = f"without one of its channels the network computes something else ({why})"
        for member in group.members:
            if sum(map(len, member.indices)) == tensors[member.name].shape[member.dim]:
                whole.append((member.name, member.dim, reason))
                break
        deps.hold(group, reason)
    deps.collect()
    return tuple(whole) if len(whole) == len(bad) else None


def _without_one(deps: Dependencies, numbers: Sequence[int]) -> SurgeryPlan:
    """What takes one channel out of each of these groups, but no gate's only one."""
    precious = _only_selected(deps)
    masks = [torch.ones(group.size, dtype=torch.bool) for group in deps.groups]
    for number in numbers:
        spare = [c for c in range(deps.groups[number].size) if (number, c) not in precious]
        if spare:
            masks[number][spare[0]] = False
    return SurgeryPlan(tuple(cuts(deps.groups, masks).values()), gates=resized_gates(deps, masks))


def _only_selected(deps: Dependencies) -> set[tuple[int, int] | None]:
    """Places of channels that are all that a gate in the model selects."""
    places: set[tuple[int, int] | None] = set()
    for node in deps.graph.all_nodes:
        if deps.graph.operation(node) in ("select", "scatter"):
            module = deps.graph.module(node)
            assert isinstance(module.channels, Tensor)
            if module.channels.numel() == 1:
                wide = deps.places(node if isinstance(module, ChannelScatter) else node.all_input_nodes[0])
                places.add(wide[int(module.channels)])
    return places
