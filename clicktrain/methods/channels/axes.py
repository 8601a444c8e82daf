"""The channels that a penalty may push to zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import dependencies


def channel_axes(
    model: nn.Module, example: Any, layers: Collection[str]
) -> dict[str, tuple[ChannelAxis, ...]]:
    """The removable channels of layers, by the network's own dependencies (PruneTrain 4.1).

    Left out are channels that have to stay: those of the image in the first layer, the classes of the last,
    and channels that an operation in between fixes. Indices that can only be removed together are one
    channel: the pixels of a channel after a flatten, the same input channel of every group of a grouped
    convolution.

    Returns:
        Layer name -> those of its dimensions 0 and 1 that have removable channels.

    Raises:
        UserError: torch.fx cannot trace the model, or no channel can be removed.
    """
    weights = {f"{name}.weight": name for name in layers}
    numbers: dict[tuple[str, int], Tensor] = {}
    """Layer and dimension -> the channel of each index, -1 where it has to stay."""
    counts: Counter[tuple[str, int]] = Counter()
    groups = dependencies(model, example).groups
    for group in groups:
        for member in group.members if group.fixed is None else ():
            if member.name not in weights:
                continue
            weight, key = model.get_parameter(member.name), (weights[member.name], member.dim)
            if (
                member.dim == 1
                and weight.shape[1] == 1
                and getattr(model.get_submodule(key[0]), "groups", 1) > 1
            ):
                continue  # depthwise: the filters are the channels that it reads
            unknown = torch.full((weight.shape[member.dim],), -1, dtype=torch.int64)
            channel = numbers.setdefault(key, unknown)
            for indices in member.indices:
                channel[list(indices)] = counts[key]
                counts[key] += 1
    axes: dict[str, tuple[ChannelAxis, ...]] = {}
    for name in layers:
        device = model.get_parameter(f"{name}.weight").device
        own = [(dim, numbers[name, dim].to(device)) for dim in (0, 1) if (name, dim) in numbers]
        if own:
            axes[name] = tuple(ChannelAxis(dim, channel, counts[name, dim]) for dim, channel in own)
    if not axes:
        fixed = [group for group in groups if group.fixed and group.members][:3]
        why = "; ".join(f"{group.members[0].name}:{group.members[0].dim}: {group.fixed}" for group in fixed)
        raise UserError(f"no channel of this network can be removed ({why or 'it has no layers'})")
    return axes
