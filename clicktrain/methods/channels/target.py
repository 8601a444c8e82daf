"""The channels to remove for a share of a network's cost to be left, by the norms that the lasso shrinks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.adapters import nearest_adapter
from clicktrain.methods.channels.costs import ChannelCosts, Cost, CostMeter
from clicktrain.surgery import ChannelGroup, SurgeryPlan, channel_groups, dependencies, residual_branches

Channel = tuple[int, int]
"""Number of a group, and of a channel in it."""

WORDS: dict[Cost, str] = {"flops": "inference FLOPs", "parameters": "parameters"}
NEAR = 0.005
"""A share of the cost that is closer to the target than this counts as met."""


class ChannelTarget:
    """A share of the unpruned network's cost that is to be left, and the channels that may be removed for it.

    Attributes:
        costs: of the network as it is.
        dense: cost of the unpruned network.
        share: of ``dense`` that is to be left; removal stops above it.
        least: per group, channels that stay.
        removable: numbers of the groups whose channels may be removed.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        what: Cost,
        share: float,
        *,
        penalized: Collection[str],
        both_sides: bool,
        floor: float,
        branches: bool = True,
        dense: float | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        """Find the channels of a network.

        Args:
            model: as it is now; unpruned if ``dense``, the cost of the unpruned network, is not given.
            example: batch of at least one input.
            what: flops or parameters.
            share: the target.
            penalized: names of the layers that the lasso works on; channels that others read stay.
            both_sides: a channel's norm is the largest on either side, not only where it is read.
            floor: share of each layer's channels that stay.
            branches: whether the floor holds inside residual branches too, which can be removed whole.
            dense: see ``model``.
            widths: from `original_widths` of the unpruned network.
        """
        self.model, self.what, self.share = model, what, share
        self._both = both_sides
        groups = channel_groups(model, example)
        self.costs = ChannelCosts(model, example, groups, what)
        self.dense = self.costs.total if dense is None else dense
        self._layers = _layer_weights(model)
        self._penalized = {f"{name}.weight" for name in penalized}
        first = original_widths(groups) if widths is None else widths
        self.least = [max(1, math.ceil(floor * _first_width(group, first) - 1e-9)) for group in groups]
        if not branches:
            inside = _inside_branches(model, example)
            self.least = [
                0 if inside.issuperset(m.name.rpartition(".")[0] for m in group.members) else least
                for group, least in zip(groups, self.least, strict=True)
            ]
        self.removable = [n for n, group in enumerate(groups) if self._may_go(group)]

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Groups of channels of the network as it is."""
        return self.costs.groups

    def share_after(self, plan: SurgeryPlan) -> float:
        """The share that a plan leaves."""
        return self.costs.after(plan) / self.dense

    @property
    def share_now(self) -> float:
        """The share of the network as it is."""
        return self.costs.total / self.dense

    @property
    def smallest_share(self) -> float:
        """The share left if every group keeps only its least."""
        meter = CostMeter(self.costs)
        for number in self.removable:
            for channel in range(self.groups[number].size - self.least[number]):
                meter.remove(number, channel)
        return meter.cost / self.dense

    def check_reachable(self, setting: str, floor: float) -> None:
        """Raise UserError if the target lies below what the floor leaves."""
        least = self.smallest_share
        if self.share < least - NEAR:
            raise UserError(
                f"{setting} asks for {self.share:g} of the {WORDS[self.what]}, but with {floor:g} of each "
                f"layer's channels kept (floor), and those that cannot go, "
                f"{math.ceil(1000 * least) / 1000:g} are left: ask for more, or lower the floor"
            )

    # ---- norms ------------------------------------------------------------------------------

    def norms(self) -> dict[int, Tensor]:
        """Per removable group [channels], float64 on the CPU: the norm that has to vanish before removal."""
        return {number: self._norms(self.groups[number]) for number in self.removable}

    def _norms(self, group: ChannelGroup) -> Tensor:
        result = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            if self._counts(member.name, member.dim):
                weight = self.model.get_parameter(member.name).detach()
                along = weight.float().square().transpose(0, member.dim).flatten(1).sum(1).double().cpu()
                squares = torch.stack([along[list(indices)].sum() for indices in member.indices])
                result = torch.maximum(result, squares.sqrt())
        return result

    def _counts(self, name: str, dim: int) -> bool:
        return name in self._penalized and name in self._layers and (self._both or self._reads(name, dim))

    def _reads(self, name: str, dim: int) -> bool:
        """Whether a layer reads the channels along a dimension (no dimension of a depthwise layer)."""
        return name in self._layers and dim == self._layers[name]

    def _may_go(self, group: ChannelGroup) -> bool:
        readers = [m.name for m in group.members if self._reads(m.name, m.dim)]
        return group.fixed is None and bool(readers) and self._penalized.issuperset(readers)

    # ---- which channels ---------------------------------------------------------------------

    def order(self, norms: Mapping[int, Tensor]) -> list[tuple[float, Channel]]:
        """(norm, channel), the smallest first, without the largest channels, which every group keeps."""
        order: list[tuple[float, Channel]] = []
        for number, values in norms.items():
            rising = torch.sort(values, stable=True).indices.tolist()
            may_go = rising[: max(self.groups[number].size - self.least[number], 0)]
            order += [(float(values[channel]), (number, channel)) for channel in may_go]
        return sorted(order)

    def choose(
        self, order: Sequence[tuple[float, Channel]], round_to: int = 1, plan: SurgeryPlan | None = None
    ) -> list[Channel]:
        """The first channels of an `order` whose removal comes closest to the target from above.

        A channel that would take the cost below the target is passed over for smaller steps. What ``plan``
        removes goes first and is not chosen again.
        """
        before = set() if plan is None else self.removed_by(plan)
        gone = Counter(number for number, _ in before)
        meter, chosen = CostMeter(self.costs, round_to, plan, gone), []
        aim = self.share * self.dense
        for _, (group, channel) in order:
            if meter.cost <= aim + 1e-9 * self.dense:
                break
            if (group, channel) in before:
                continue
            if meter.would_be(group, channel) >= aim - 1e-9 * self.dense:
                meter.remove(group, channel)
                chosen.append((group, channel))
        return chosen

    def water_lines(self, norms: Mapping[int, Tensor], shares: Sequence[float]) -> list[float]:
        """For falling shares of the cost, the norm of the last channel to remove for each to be met."""
        meter, order = CostMeter(self.costs), self.order(norms)
        lines, norm, done = [], 0.0, 0
        for share in shares:
            while done < len(order) and meter.cost > share * self.dense:
                norm, channel = order[done]
                meter.remove(*channel)
                done += 1
            lines.append(norm)
        return lines

    def held(self, norms: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Group -> bool [channels]: the largest of each group, which always stay."""
        masks = {}
        for number, values in norms.items():
            mask = torch.zeros(len(values), dtype=torch.bool)
            mask[torch.sort(values, descending=True, stable=True).indices[: self.least[number]]] = True
            masks[self.groups[number].name] = mask
        return masks

    def staying(self, chosen: Collection[Channel]) -> dict[str, Tensor]:
        """Group -> bool [channels]: all but the chosen ones."""
        masks = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self.groups}
        for number, channel in chosen:
            masks[self.groups[number].name][channel] = False
        return masks

    @torch.no_grad()
    def zero_(self, chosen: Sequence[Channel]) -> None:
        """Set the weights of channels to zero, where they are written and where they are read."""
        for number, channel in chosen:
            for member in self.groups[number].members:
                if member.name in self._layers:
                    weight = self.model.get_parameter(member.name)
                    index = torch.tensor(member.indices[channel], device=weight.device)
                    weight.index_fill_(member.dim, index, 0.0)

    def removed_by(self, plan: SurgeryPlan) -> set[Channel]:
        """The channels that a plan cuts."""
        removed = set()
        for number in self.removable:
            group = self.groups[number]
            for member in group.members:
                cut = next((c for c in plan.cuts_of(member.name) if c.dim == member.dim), None)
                if cut is not None:
                    keep = set(cut.keep)
                    removed |= {
                        (number, c) for c, indices in enumerate(member.indices) if keep.isdisjoint(indices)
                    }
                    break
        return removed


def original_widths(groups: Sequence[ChannelGroup]) -> dict[str, int]:
    """``tensor:dimension`` -> channels along it, over all groups."""
    widths: dict[str, int] = {}
    for group in groups:
        for member in group.members:
            key = f"{member.name}:{member.dim}"
            widths[key] = widths.get(key, 0) + group.size
    return widths


def renamed(widths: Mapping[str, int], plan: SurgeryPlan) -> dict[str, int]:
    """`original_widths` under the names after a plan."""
    now_named = {}
    for key, width in widths.items():
        name, _, dim = key.rpartition(":")
        if (now := plan.new_name(name)) is not None:
            now_named[f"{now}:{dim}"] = width
    return now_named


def _first_width(group: ChannelGroup, widths: Mapping[str, int]) -> int:
    """Channels of a group in the unpruned network."""
    known = (widths.get(f"{member.name}:{member.dim}") for member in group.members)
    return min((width for width in known if width is not None), default=group.size)


def _inside_branches(model: nn.Module, example: Any) -> set[str]:
    """Modules of residual branches that could be removed whole."""
    branches = residual_branches(dependencies(model, example).graph)
    return {name for branch in branches if branch.refusal is None for name in branch.layers}


def _layer_weights(model: nn.Module) -> dict[str, int]:
    """Weights of convolutions and linear layers -> the axis of the channels they read, -1 if depthwise."""
    axes: dict[str, int] = {}
    for name, module in model.named_modules():
        adapter = nearest_adapter(module)
        if adapter is not None and module._parameters.get("weight") is not None:
            axes[f"{name}.weight"] = -1 if adapter.depthwise(module) else adapter.in_axis
    return axes
