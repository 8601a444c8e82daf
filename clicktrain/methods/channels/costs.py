"""The inference FLOPs or parameters of a network as a function of the channels that are left.

Each entry of a weight costs its share of the FLOPs (or 1), so a weight costs that times its remaining
entries. Predictions are exact: `clicktrain.accounting.count` gives the same number for the smaller network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from clicktrain.accounting import count
from clicktrain.surgery import ChannelGroup, SurgeryPlan

Cost = Literal["flops", "parameters"]


class ChannelCosts:
    """The cost of every tensor of a network, and the channels that it depends on.

    Attributes:
        groups: channels that can only be removed together.
        total: cost of the network as it is.
    """

    def __init__(
        self, model: nn.Module, example: Any, groups: Sequence[ChannelGroup], what: Cost = "flops"
    ) -> None:
        """Count the model on ``example``, a batch of at least one input; per image."""
        self.groups = tuple(groups)
        parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        if what == "parameters":
            self.unit = dict.fromkeys(parameters, 1.0)
        else:
            self.unit = _flops_per_weight(model, example, parameters)
        self.total = sum(unit * math.prod(self.shapes[name]) for name, unit in self.unit.items())

    def after(self, plan: SurgeryPlan) -> float:
        """The cost once a plan has been carried out."""
        total = 0.0
        for name, unit in self.unit.items():
            if plan.new_name(name) is None:
                continue
            left = list(self.shapes[name])
            for cut in plan.cuts_of(name):
                left[cut.dim] = len(cut.keep)
            total += unit * math.prod(left)
        return total


def _flops_per_weight(model: nn.Module, example: Any, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    names = {id(tensor): name for name, tensor in parameters.items()}
    units: dict[str, float] = {}
    for layer in count(model, example, {}).layers:
        name = names.get(id(model.get_submodule(layer.name).weight))
        if name is not None:
            units[name] = units.get(name, 0.0) + layer.forward_flops_dense / max(layer.weights, 1)
    return units


class CostMeter:
    """The cost while channels are removed one after the other; the network is not touched."""

    def __init__(
        self,
        costs: ChannelCosts,
        round_to: int = 1,
        plan: SurgeryPlan | None = None,
        gone: Mapping[int, int] | None = None,
    ) -> None:
        """Begin with the network as it is, or as a plan leaves it, which removes ``gone`` channels per group.

        Widths are multiples of ``round_to``; the cost falls only when a whole multiple is removed.
        """
        plan = plan or SurgeryPlan()
        self._costs, self._round_to = costs, round_to
        self._unit = {name: unit for name, unit in costs.unit.items() if plan.new_name(name) is not None}
        self._left = {name: list(shape) for name, shape in costs.shapes.items()}
        for cut in plan.cuts:
            if cut.name in self._left:
                self._left[cut.name][cut.dim] = len(cut.keep)
        self._gone = [(gone or {}).get(number, 0) for number in range(len(costs.groups))]
        self._each = [
            min((len(m.indices[0]) for m in group.members if m.dim == 0), default=1) for group in costs.groups
        ]
        self.cost = sum(map(self._of, self._unit))

    def remove(self, group: int, channel: int) -> None:
        """Remove a channel."""
        self._gone[group] += 1
        self.cost = self._step(group, channel, keep=True)

    def would_be(self, group: int, channel: int) -> float:
        """The cost if that channel were removed too."""
        return self._step(group, channel, keep=False)

    def _step(self, group: int, channel: int, *, keep: bool) -> float:
        number = self._falls(group, counted=keep)
        if number == 0:
            return self.cost
        members = [m for m in self._costs.groups[group].members if m.name in self._unit]
        names = {member.name for member in members}
        before = sum(self._of(name) for name in names)
        for member in members:
            self._left[member.name][member.dim] -= number * len(member.indices[channel])
        after = sum(self._of(name) for name in names)
        if not keep:
            for member in members:
                self._left[member.name][member.dim] += number * len(member.indices[channel])
        return self.cost + after - before

    def _falls(self, group: int, *, counted: bool) -> int:
        """By how many channels the width falls with the next one; ``counted``: with the last one."""
        gone = self._gone[group] - (1 if counted else 0)
        return self._width(group, gone) - self._width(group, gone + 1)

    def _width(self, group: int, gone: int) -> int:
        size = self._costs.groups[group].size
        width = max(size - gone, 1)
        while width < size and (width * self._each[group]) % self._round_to:
            width += 1
        return width

    def _of(self, name: str) -> float:
        return self._unit[name] * math.prod(self._left[name])
