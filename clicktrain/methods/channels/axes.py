"""Which channels of which layers a penalty over channels may push to zero."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import dependencies


def channel_axes(
    model: nn.Module, example: Any, layers: Collection[str]
) -> dict[str, tuple[ChannelAxis, ...]]:
    """The removable channels of layers, by the network's own dependencies (PruneTrain 4.1).

    Left out are channels that cannot go: those of the image in the first layer, the classes of the last, and
    whatever an operation in between fixes. Indices that only live and die together are one channel: the
    pixels of a channel behind a flatten, the same input channel of every group of a grouped convolution.

    Args:
        model: any module that torch.fx can trace.
        example: its inputs, see `clicktrain.surgery.dependencies`.
        layers: names of convolutions and linear layers.

    Returns:
        Layer name -> its dimensions 0 and 1, as far as they have removable channels.

    Raises:
        UserError: the model has no graph.
    """
    weights = {f"{name}.weight": name for name in layers}
    found: dict[tuple[str, int], tuple[Tensor, int]] = {}
    for group in dependencies(model, example).groups:
        if group.fixed is not None:
            continue
        for member in group.members:
            if member.name not in weights:
                continue
            key = (weights[member.name], member.dim)
            weight = model.get_parameter(member.name)
            if (
                member.dim == 1
                and weight.shape[1] == 1
                and getattr(model.get_submodule(key[0]), "groups", 1) > 1
            ):
                continue  # depthwise: the filters are the channels that it reads
            if key not in found:
                unknown = torch.full((weight.shape[member.dim],), -1, dtype=torch.int64)
                found[key] = (unknown, 0)
            channel, count = found[key]
            for indices in member.indices:
                channel[list(indices)] = count
                count += 1
            found[key] = (channel, count)
    axes: dict[str, tuple[ChannelAxis, ...]] = {}
    for name in layers:
        own = [
            ChannelAxis(
                dim, found[name, dim][0].to(model.get_parameter(f"{name}.weight").device), found[name, dim][1]
            )
            for dim in (0, 1)
            if (name, dim) in found
        ]
        if own:
            axes[name] = tuple(own)
    return axes


def why_fixed(model: nn.Module, example: Any, most: int = 3) -> str:
    """Why channels of a network cannot be removed: the first few of them, in a clause."""
    fixed = [group for group in dependencies(model, example).groups if group.fixed and group.members]
    named = (f"{group.members[0].name}:{group.members[0].dim}: {group.fixed}" for group in fixed[:most])
    return "; ".join(named)
