"""Which channels of the network as it was at first the layers of a smaller one still have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from clicktrain.surgery.plan import SurgeryPlan


@dataclass(frozen=True, slots=True)
class OriginalChannels:
    """Where a layer's channels come from.

    Attributes:
        name: of the layer before any surgery.
        numbers: for dimension 0 (outputs) and 1 (inputs) of its weight, the first number of every index.
    """

    name: str
    numbers: tuple[tuple[int, ...], tuple[int, ...]]


def original_channels(model: nn.Module) -> dict[str, OriginalChannels]:
    """Name -> channels of every convolution of a network that no plan has touched: 0, 1, 2 ..."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs = module.weight.shape[:2]
            found[name] = OriginalChannels(name, (tuple(range(outputs)), tuple(range(inputs))))
    return found


def renumbered(channels: Mapping[str, OriginalChannels], plan: SurgeryPlan) -> dict[str, OriginalChannels]:
    """The channels that are left after one more plan, by the layers' names after it; layers that go drop out.

    Args:
        channels: by the names before the plan.
        plan: the next one of the network.
    """
    left = {}
    for name, layer in channels.items():
        moved = plan.new_name(f"{name}.weight")
        if moved is None:
            continue
        numbers = list(layer.numbers)
        for cut in plan.cuts_of(f"{name}.weight"):
            if cut.dim < len(numbers):
                numbers[cut.dim] = tuple(numbers[cut.dim][index] for index in cut.keep)
        left[moved.removesuffix(".weight")] = OriginalChannels(layer.name, (numbers[0], numbers[1]))
    return left
