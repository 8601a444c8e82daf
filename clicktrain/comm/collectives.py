"""Collectives on tensors, counted where they are called: bytes that this process hands over, by purpose.

What a link carries for them depends on the algorithm: a ring all-reduce of P processes sends each byte
2 (P - 1) / P times. Short pickled messages between processes (`agreement.gathered`) are not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

GRADIENTS = "gradients"
"""Gradients of parameters: of masked weights those at kept positions."""
GROWTH = "growth"
"""Gradients of pruned weights, in steps that choose by them what grows, or that move pruned weights."""
BUFFERS = "buffers"
"""The first process's statistics of batch norms, and other buffers."""
NORMS = "norms"
"""Sums of synchronized batch norms, on the way forward and back."""
AGREEMENT = "agreement"
"""Losses, decisions, and whatever else processes agree on."""

Exchange: TypeAlias = dict[str, list[int]]
"""Purpose -> bytes that this process has handed to collectives, and number of these."""

_COUNTS: list[Exchange] = []
_CARRIERS: list[Callable[..., Any]] = []


@contextlib.contextmanager
def counted(into: Exchange) -> Iterator[Exchange]:
    """Add to ``into`` what this process exchanges inside the block; blocks may be nested."""
    _COUNTS.append(into)
    try:
        yield into
    finally:
        _COUNTS[:] = [count for count in _COUNTS if count is not into]


@contextlib.contextmanager
def carried_by(carrier: Callable[..., Any]) -> Iterator[None]:
    """Have ``carrier`` do every all-reduce inside the block, as a link that benchmarks slow down.

    It is called as ``torch.distributed.all_reduce(tensor, op, group, async_op)`` and returns what that does.
    """
    _CARRIERS.append(carrier)
    try:
        yield
    finally:
        _CARRIERS.pop()


def add_exchange(total: Exchange, more: Exchange) -> None:
    """Add one count to another."""
    for purpose, (size, calls) in more.items():
        row = total.setdefault(purpose, [0, 0])
        row[0] += size
        row[1] += calls


def all_reduce_(
    tensor: Tensor,
    purpose: str,
    op: Any = None,
    *,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce a tensor over all processes, in place; ``async_op`` returns the work in progress.

    ``op``: sum by default.
    """
    note(purpose, tensor.nbytes)
    carry = _CARRIERS[-1] if _CARRIERS else dist.all_reduce
    return carry(tensor, dist.ReduceOp.SUM if op is None else op, group, async_op)


def broadcast_(tensor: Tensor, purpose: str = AGREEMENT) -> None:
    """Overwrite a tensor with the first process's."""
    note(purpose, tensor.nbytes)
    dist.broadcast(tensor, 0)


def note(purpose: str, size: int, calls: int = 1) -> None:
    """Count bytes of a collective, or a part of it for another purpose (``calls`` = 0)."""
    for count in _COUNTS:
        add_exchange(count, {purpose: [size, calls]})
