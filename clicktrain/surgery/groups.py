"""Which channels live and die together: dependency analysis (PruneTrain 4.2, figure 5a, for any graph).

A channel is a set of indices along dimensions of parameters and buffers: a filter of one convolution, the
batch norm's four numbers, the column in every layer that reads it, and, over an addition, the same in the
other branch. Channels that are sets along the same dimensions form a group, e.g. all of a residual stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from clicktrain.surgery.flow import ChannelFlow
from clicktrain.surgery.graph import NetworkGraph


@dataclass(frozen=True, slots=True)
class Member:
    """A dimension of a parameter or buffer in a group.

    Attributes:
        name: path of the tensor, e.g. ``layer1.0.conv1.weight``.
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
        fixed: why none of them may be removed; None if they may.
    """

    name: str
    members: tuple[Member, ...]
    size: int
    fixed: str | None


class Dependencies:
    """The groups of a model, and where its values have their channels."""

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self.flow = ChannelFlow(graph)
        self.groups: tuple[ChannelGroup, ...] = ()
        self._place: dict[int, tuple[int, int]] = {}
        self.collect()

    def place(self, atom: int) -> tuple[int, int] | None:
        """(number of the group, channel in it) of an atom; None if no tensor has that channel."""
        return self._place.get(self.flow.atoms.find(atom))

    def places(self, node: fx.Node) -> list[tuple[int, int] | None]:
        """The same for every channel of a node's value."""
        return [self.place(atom) for atom in self.flow.channels[node].ids]

    def hold(self, group: ChannelGroup, reason: str) -> None:
        """Keep the channels of a group, from the next `collect` on."""
        atoms = self.flow.atoms
        for member in group.members:
            ids = atoms.members[member.name, member.dim]
            atoms.fix([ids[index] for indices in member.indices for index in indices], reason)

    def hold_tensors(self, held: Iterable[tuple[str, int, str]]) -> None:
        """Keep all channels along (tensor, dimension), for a reason."""
        for name, dim, reason in held:
            self.flow.atoms.fix(self.flow.atoms.members.get((name, dim), ()), reason)
        self.collect()

    def collect(self) -> None:
        """Sort all channels that tensors have into groups."""
        self._place = {}
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
