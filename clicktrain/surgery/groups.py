"""Which channels live and die together: dependency analysis (PruneTrain 4.2, figure 5a, for any graph).

A channel is a set of indices along dimensions of parameters and buffers: a filter of one convolution, the
batch norm's four numbers, the column in every layer that reads it, and, over an addition, the same in the
other branch. Channels that are sets along the same dimensions form a group, e.g. all of a residual stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from clicktrain.surgery.flow import ChannelFlow
from clicktrain.surgery.graph import ModelGraph, trace


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension of a parameter or buffer in a group.

    Attributes:
        name: path of the tensor, e.g. ``layer1.0.conv1.weight``.
        dim: the dimension.
        indices: for every channel of the group, its indices along the dimension: one as a rule, H * W after
            a flatten, one per group of a grouped convolution.
    """

    name: str
    dim: int
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that are cut along the same dimensions of the same tensors.

    Attributes:
        name: tensor and dimension of the first member, e.g. ``conv1.weight:0``; further groups that start
            there (a concatenation, a gate) are numbered, ``conv1.weight:0#2``.
        members: in the order in which the network uses them.
        size: number of channels.
        fixed: why none of them may be removed; None if they may.
    """

    name: str
    members: tuple[Member, ...]
    size: int
    fixed: str | None


class Dependencies:
    """The groups of a model, and where its values have their channels.

    Attributes:
        graph: of the model.
        flow: the channels of every value in it.
        groups: of all channels that parameters or buffers have.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.flow = ChannelFlow(graph)
        self.groups: tuple[ChannelGroup, ...] = ()
        self._place: dict[int, tuple[int, int]] = {}
        self._collect()

    def place(self, atom: int) -> tuple[int, int] | None:
        """(number of the group, channel in it) of an atom; None if no tensor has that channel."""
        return self._place.get(self.flow.atoms.find(atom))

    def places(self, node: fx.Node) -> list[tuple[int, int] | None]:
        """The same for every channel of a node's value."""
        return [self.place(atom) for atom in self.flow.channels[node].ids]

    def _collect(self) -> None:
        atoms = self.flow.atoms
        keys: dict[int, dict[tuple[str, int], list[int]]] = {}
        for (name, dim), ids in atoms.members.items():
            for index, atom in enumerate(ids):
                keys.setdefault(atoms.find(atom), {}).setdefault((name, dim), []).append(index)
        alike: dict[Any, list[int]] = {}
        for root, held in keys.items():
            alike.setdefault((frozenset(held), atoms.reason(root)), []).append(root)
        groups: list[ChannelGroup] = []
        count: dict[str, int] = {}
        for (_, reason), roots in alike.items():
            members = tuple(
                Member(name, dim, tuple(tuple(keys[root][name, dim]) for root in roots))
                for name, dim in keys[roots[0]]
            )
            for channel, root in enumerate(roots):
                self._place[root] = (len(groups), channel)
            name = f"{members[0].name}:{members[0].dim}"
            count[name] = count.get(name, 0) + 1
            name += f"#{count[name]}" if count[name] > 1 else ""
            groups.append(ChannelGroup(name, members, len(roots), reason))
        self.groups = tuple(groups)


def dependencies(model: nn.Module, example: Tensor | tuple[Any, ...]) -> Dependencies:
    """Analyse a model.

    Args:
        model: any module that torch.fx can trace; modules inside that it cannot are kept whole.
        example: its arguments, a batch of at least one input.

    Raises:
        UserError: the model has no graph.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> group = dependencies(model, torch.zeros(1, 3, 8, 8)).groups[1]
        >>> group.size, [(member.name, member.dim) for member in group.members][:2]
        (8, [('0.weight', 0), ('0.bias', 0)])
    """
    return Dependencies(trace(model, example))


def channel_groups(model: nn.Module, example: Tensor | tuple[Any, ...]) -> tuple[ChannelGroup, ...]:
    """The groups of a model alone; arguments and errors as `dependencies`."""
    return dependencies(model, example).groups
