"""What is inside a value that code has read: where to look to see whether it is still the same."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass
from types import FunctionType, MemberDescriptorType
from typing import Any

import torch
from torch import fx, nn

from clicktrain.graph.watch import is_plain, may_change


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes of an object that has no namespace of its own."""

    owner: Any

    def get(self, name: str) -> Any:
        """The value; None if there is none."""
        return getattr(self.owner, name, None)


@dataclass(frozen=True, slots=True)
class Items:
    """Items of a container by number, and their number."""

    owner: Any

    def get(self, index: int | str) -> Any:
        """The item; None if there are fewer."""
        if index == "length":
            return len(self.owner)
        return self.owner[index] if int(index) < len(self.owner) else None


def inside(value: Any, names: Set[str]) -> list[tuple[Any, Any]]:
    """Where values inside a value are found: pairs of something with ``get`` and what it is asked for.

    Args:
        value: neither a tensor nor a layer is looked into: graphs hold the ones that are used.
        names: of attributes that may have been read; items of containers may all have been.
    """
    if isinstance(value, (torch.Tensor, fx.Proxy, nn.Module)) or is_plain(value):
        return []
    if type(value) is dict:
        return [(Items(value), "length"), *((value, key) for key in value)]
    if isinstance(value, (list, tuple, deque)):
        return [(Items(value), "length"), *((Items(value), number) for number in range(len(value)))]
    if isinstance(value, functools.partial):
        return [(Attributes(value), name) for name in ("func", "args", "keywords")]
    return list(_attributes(value, names)) if may_change(value) else []


def _attributes(value: Any, names: Set[str]) -> Iterator[tuple[Any, str]]:
    if isinstance(value, FunctionType):
        yield from ((Attributes(value), name) for name in ("__defaults__", "__kwdefaults__"))
    own = getattr(value, "__dict__", {})
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    for kind in kinds if may_change(kinds[0]) else ():
        for name in names & vars(kind).keys() if kind is not object else ():
            slot = isinstance(vars(kind)[name], MemberDescriptorType) and kind is not value
            # Methods as the class has them: an object makes another one each time.
            yield (Attributes(value) if slot else vars(kind)), name
            if isinstance(own, dict) and name not in own:
                yield own, name  # nothing hides it yet
    if isinstance(value, threading.local):
        yield from ((Attributes(value), name) for name in names)  # those of the thread that asks
    elif isinstance(own, dict):
        yield from ((own, name) for name in names if name in own)
