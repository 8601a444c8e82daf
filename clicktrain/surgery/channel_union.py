"""Which channels go: the union of what is alive, over everything that shares them (PruneTrain 4.2).

Channel union "prunes only the intersection of the sparsified channels of all neighboring convolution layers
within a residual stage". A channel goes when, at every layer that reads it,

* what arrives carries nothing of the input, and the layer's weights for it are under the threshold (both
  sides are sparse, the paper's rule); whatever constant a batch norm adds to it then reaches nothing; or
* what arrives is zero, batch norm included, while training and in evaluation.

So what a layer computes changes by at most the threshold times what arrives, or times its weights. Zero
filters whose batch norm sends a constant into nonzero weights stay, as do nonzero filters that nothing reads:
the lasso makes these zero next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn

from clicktrain.surgery.groups import ChannelGroup, Dependencies
from clicktrain.surgery.plan import Cut, Gate
from clicktrain.surgery.values import Values

Sides = Literal["both", "readers"]


def dead_channels(
    deps: Dependencies,
    values: Values,
    threshold: float,
    gone: Collection[fx.Node] = (),
    sides: Sides = "both",
) -> tuple[list[Tensor], list[str]]:
    """For every group, which channels may go, and why dead ones stay.

    Args:
        deps, values: the groups, and values of the channels for the same threshold.
        gone: layers that read no more, because their branch is removed.
        sides: ``both``: nothing of the input arrives and nothing is read, the paper's intersection of
            adjacent layers; ``readers``: what no layer reads may go, whatever arrives. Neither changes what
            the network computes.

    Returns:
        Per group a bool mask [size], True = may go; per group the reason why not more go, or "".
    """
    may_go, silent = ([torch.ones(g.size, dtype=torch.bool) for g in deps.groups] for _ in range(2))
    read = [torch.zeros(group.size, dtype=torch.bool) for group in deps.groups]
    readers: list[dict[str, int]] = [{} for _ in deps.groups]
    for edge in values.edges:
        if edge.node in gone:
            continue
        vanishes = edge.value.size <= threshold
        good = (edge.unread if sides == "readers" else edge.value.dead & edge.unread) | vanishes
        ids = deps.flow.channels[edge.node.all_input_nodes[0]].ids
        for index, place in enumerate(map(deps.place, ids)):
            if place is None:
                continue
            number, channel = place
            read[number][channel] = True
            may_go[number][channel] &= good[index]
            silent[number][channel] &= edge.value.dead[index]
            if edge.value.dead[index] and not good[index]:
                name = str(edge.node.target)
                readers[number][name] = readers[number].get(name, 0) + 1
    reasons = []
    for number, group in enumerate(deps.groups):
        may_go[number] &= read[number]
        if group.fixed is not None:
            may_go[number][:] = False
        reasons.append(group.fixed or _why(silent[number] & read[number] & ~may_go[number], readers[number]))
    return may_go, reasons


def _why(held: Tensor, readers: Mapping[str, int]) -> str:
    count = int(held.sum())
    if not count:
        return ""
    first, *rest = sorted(readers, key=lambda name: -readers[name])
    more = f" and {len(rest)} more" if rest else ""
    return f"{count} dead channels stay: {first}{more} would miss the constant of their batch norm"


def keep_masks(
    model: nn.Module, groups: tuple[ChannelGroup, ...], may_go: list[Tensor], round_to: int = 1
) -> list[Tensor]:
    """Which channels stay, per group bool [size]: at least one, and whole multiples.

    Layers' widths become multiples of ``round_to`` where the group is large enough: of the channels that may
    go, those with the largest weights are kept.
    """
    tensors = tensors_of(model)
    masks = []
    for group, dead in zip(groups, may_go, strict=True):
        kept = int((~dead).sum())
        each = min((len(m.indices[0]) for m in group.members if m.dim == 0), default=1)
        wanted = max(kept, 1)
        while wanted < group.size and (wanted * each) % round_to:
            wanted += 1
        mask = ~dead
        if wanted > kept:
            size = largest_weights(tensors, group).masked_fill(mask, -1.0)
            mask[torch.sort(size, descending=True, stable=True).indices[: wanted - kept]] = True
        masks.append(mask)
    return masks


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def largest_weights(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """[size]: the largest absolute weight of each channel, in all layers of the group (figure 4)."""
    result = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        tensor = tensors.get(member.name)
        if tensor is None or tensor.dim() < 2:
            continue
        along = tensor.detach().abs().transpose(0, member.dim).flatten(1).amax(1).double().cpu()
        result = torch.maximum(result, along[torch.tensor(member.indices)].amax(1))
    return result


def cuts(
    groups: tuple[ChannelGroup, ...], masks: list[Tensor], gone: Collection[str] = ()
) -> dict[tuple[str, int], Cut]:
    """Cuts of all tensors that shrink, by name and dimension, but those that disappear anyway.

    ``masks`` are per group bool [size], True = stays.
    """
    keep: dict[tuple[str, int], list[tuple[int, bool]]] = {}
    for group, mask in zip(groups, masks, strict=True):
        for member in group.members:
            if member.name not in gone:
                places = keep.setdefault((member.name, member.dim), [])
                for indices, stays in zip(member.indices, mask.tolist(), strict=True):
                    places += [(index, stays) for index in indices]
    return {
        key: Cut(*key, tuple(index for index, stays in sorted(places) if stays), len(places))
        for key, places in keep.items()
        if not all(stays for _, stays in places)
    }


def resized_gates(deps: Dependencies, masks: list[Tensor]) -> tuple[Gate, ...]:
    """What gates that are in the model already select after the cuts."""
    changed: dict[str, Gate] = {}
    for node in deps.graph.all_nodes:
        kind = deps.graph.operation(node)
        if kind not in ("select", "scatter"):
            continue
        wide = deps.flow.channels[node if kind == "scatter" else node.all_input_nodes[0]].ids
        places = [deps.place(atom) for atom in wide]
        stays = [place is None or bool(masks[place[0]][place[1]]) for place in places]
        number = {old: new for new, old in enumerate(i for i, kept in enumerate(stays) if kept)}
        module = deps.graph.module(node)
        assert isinstance(module.channels, Tensor)
        channels = tuple(number[i] for i in module.channels.tolist() if i in number)
        if not all(stays):
            name = str(node.target)
            changed[name] = Gate(name, "select" if kind == "select" else "scatter", channels, len(number))
    return tuple(changed.values())
