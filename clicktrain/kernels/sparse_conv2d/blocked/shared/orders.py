"""Sorting of a layer's index in milliseconds: tables are made again whenever masks have moved."""

from __future__ import annotations

import numpy as np
import torch

_NARROW = 1 << 16
"""Keys below it are sorted by NumPy's radix sort, which takes two bytes."""


def order_by(*keys: tuple[np.ndarray, int]) -> np.ndarray:
    """The order, int64, in which keys ascend, the first of them most significant; ties stay as they are.

    Each is (numbers from 0 on, a bound above them all), of equal lengths.
    """
    order: np.ndarray | None = None
    for key in reversed(_joined(keys)):
        number = key[0] if order is None else key[0][order]
        step = _order(number, key[1])
        order = step if order is None else order[step]
    return np.zeros(0, np.int64) if order is None else order


def _joined(keys: tuple[tuple[np.ndarray, int], ...]) -> list[tuple[np.ndarray, int]]:
    """Fewer keys for the same order: neighbors are one number where that stays narrow."""
    joined = [keys[0]]
    for number, bound in keys[1:]:
        before, most = joined[-1]
        if most * bound <= _NARROW:
            joined[-1] = before.astype(np.int32) * bound + number, most * bound
        else:
            joined.append((number, bound))
    return joined


def _order(number: np.ndarray, bound: int) -> np.ndarray:
    if bound <= 1 or (number[1:] >= number[:-1]).all():
        return np.arange(len(number))
    if bound <= _NARROW:
        return np.argsort(number.astype(np.uint16), kind="stable")
    order: np.ndarray = torch.from_numpy(number.astype(np.int64)).sort(stable=True).indices.numpy()
    return order


def starts_of(sorted_keys: np.ndarray, count: int) -> np.ndarray:
    """Where the run of each key from 0 to ``count`` begins in ascending keys: int64 [count + 1]."""
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(sorted_keys, minlength=count), out=starts[1:])
    return starts
