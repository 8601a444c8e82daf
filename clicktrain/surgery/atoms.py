"""Channels as atoms: one number for each index along a dimension of a tensor, in a union-find.

Two indices whose atoms are united live and die together. Atoms of parameters and buffers are known by the
tensor and the dimension, so that shared layers and tied weights share their channels by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Channels:
    """Which dimension of a value has channels, and the atom of each index along it."""

    dim: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SizeOf:
    """A number, or several, that depends on how many channels there are; ``exact``: it is their number."""

    ids: tuple[int, ...]
    exact: bool


class Atoms:
    """Union-find over channels, with the reasons why some are fixed and the tensors that they index."""

    def __init__(self, model: nn.Module) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}
        self._owned: dict[tuple[int, int], tuple[int, ...]] = {}
        self.members: dict[tuple[str, int], tuple[int, ...]] = {}
        self._names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self._names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)

    def fresh(self, size: int, reason: str | None = None) -> tuple[int, ...]:
        """New atoms, each alone; fixed if there is a reason."""
        first = len(self._parent)
        ids = tuple(range(first, first + size))
        self._parent.extend(ids)
        if reason is not None:
            self.fix(ids, reason)
        return ids

    def of(self, tensor: Tensor, dim: int) -> tuple[int, ...]:
        """The atoms of a parameter's or buffer's dimension, made at the first question."""
        key = (id(tensor), dim)
        if key not in self._owned:
            self._owned[key] = self.fresh(tensor.shape[dim])
            self.members[self._names[id(tensor)], dim] = self._owned[key]
        return self._owned[key]

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer."""
        return id(tensor) in self._names

    def knows(self, tensor: Tensor, dim: int) -> bool:
        """Whether that dimension has been met."""
        return (id(tensor), dim) in self._owned

    def name(self, tensor: Tensor) -> str:
        """First name of a parameter or buffer."""
        return self._names[id(tensor)]

    def find(self, atom: int) -> int:
        """The representative of an atom's class."""
        root = atom
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[atom] != root:
            self._parent[atom], atom = root, self._parent[atom]
        return root

    def unite(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Tie channels of two values, index by index."""
        for a, b in zip(left, right, strict=True):
            root, other = self.find(a), self.find(b)
            if root != other:
                self._parent[other] = root
                if other in self._reason:
                    self._reason.setdefault(root, self._reason[other])

    def fix(self, ids: Sequence[int], reason: str) -> None:
        """These stay, and whatever is or will be united with them; the first reason is kept."""
        for atom in ids:
            self._reason.setdefault(self.find(atom), reason)

    def reason(self, atom: int) -> str | None:
        """Why an atom's class is fixed; None if it is not."""
        return self._reason.get(self.find(atom))
