"""The generators that a forward pass may draw from without asking: torch's, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def random_state(devices: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """Where all generators stand."""
    numpy = sys.modules.get("numpy")
    return (
        torch.random.get_rng_state(),
        random.getstate(),
        None if numpy is None else numpy.random.get_state(),
        tuple((index, torch.cuda.get_rng_state(index)) for index in devices),
    )


def same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two states."""
    if not torch.equal(one[0], other[0]) or one[1] != other[1]:
        return False
    if one[2] is not None and other[2] is not None and not _same_numpy(one[2], other[2]):
        return False
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(one[3], other[3], strict=True))


@contextlib.contextmanager
def own_random_numbers(tensors: tuple[Tensor, ...] = (), seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn inside, afterwards all generators stand where they stood.

    Args:
        seed: where all generators start inside; None: where they stand.
    """
    numpy = sys.modules.get("numpy")
    cpu, own, arrays, cuda = random_state(
        tuple(sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"}))
    )
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
        yield
    finally:
        torch.random.set_rng_state(cpu)
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(arrays)
        for index, saved in cuda:
            torch.cuda.set_rng_state(saved, index)


def _same_numpy(one: Any, other: Any) -> bool:
    return bool(one[0] == other[0] and (one[1] == other[1]).all() and one[2:] == other[2:])
