"""Whether two implementations of a network do the same: which of all that calls do differs first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from clicktrain.graph.copying import contents
from clicktrain.graph.observe import Observation
from clicktrain.graph.random_state import same_random_state

Close = Callable[[Tensor, Tensor, float], bool]


def difference(
    found: Sequence[Observation], expected: Sequence[Observation], close: Close | None = None
) -> str:
    """What one of two implementations does otherwise, in words; "" if nothing.

    Args:
        found: calls of the one to be tried.
        expected: the same calls of the original.
        close: whether two floating-point tensors of one shape count as the same, of which differences up to
            the third argument are nothing; as good as equal by default.
    """
    close = close or nearly_equal
    for mine, theirs in zip(found, expected, strict=True):
        if not same_random_state(mine.random, theirs.random):
            return "other random numbers"
        if not same(mine.output, theirs.output, close):
            return "other outputs"
        if not same(mine.inputs, theirs.inputs, close):
            return "other changes to its inputs"
        # The gradient of a bias before a batch norm is zero but for rounding.
        sizes = [float(g.abs().max()) for g in theirs.gradients.values() if g is not None and g.numel()]
        for what, ours, originals, floor in (
            ("attribute", mine.attributes, theirs.attributes, 0.0),
            ("buffer", mine.buffers, theirs.buffers, 0.0),
            ("gradient of", mine.gradients, theirs.gradients, 1e-6 * max(sizes, default=0.0)),
        ):
            for name in {**originals, **ours}:
                both = name in ours and name in originals
                if not both or not same(ours[name], originals[name], close, floor):
                    return f"another {what} {name.lstrip('.')}"
    return ""


def same(one: Any, other: Any, close: Close, floor: float = 0.0) -> bool:
    """Whether two values are, tensors compared by ``close``, everything else exactly."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return close(one, other, floor) if one.is_floating_point() else torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], close, floor) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(lambda a, b: same(a, b, close, floor), one, other))
    if (hasattr(one, "__dict__") or is_dataclass(one)) and not callable(one):
        return same(contents(one), contents(other), close, floor)
    return one is other or bool(one == other) or bool(one != one and other != other)


def nearly_equal(one: Tensor, other: Tensor, floor: float) -> bool:
    """Up to rounding in the last places of the largest number: the operations are the same ones."""
    if torch.equal(one, other):
        return True
    one, other = one.double(), other.double()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max() + floor)
