"""The alternating direction method of multipliers (ADMM): weights that are pulled towards a constraint.

Training ``f(W)`` with ``W`` in a set S (few nonzero kernels, on patterns of a pool) is taken apart (Boyd et
al. 2011, section 3.1; for pruning Zhang et al. 2018, arXiv:1804.03294):

- W: some steps of the optimizer on ``f(W) + rho / 2 ||W - Z + U||^2``;
- Z: the nearest member of S to ``W + U``, its Euclidean projection;
- U: ``U + W - Z``, the scaled dual variable, which adds up how far W still is from S.

With several constraints each has its own Z and U, and W is pulled to all of them. What S keeps is a mask,
so that a projection is one: ``(W + U) * mask``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.regrowth import largest
from clicktrain.sparsity.units import Unit


class Auxiliary(NamedTuple):
    """What a constraint keeps of a layer between its updates; tensors of the weight's shape."""

    target: Tensor
    """Z, which meets the constraint."""
    dual: Tensor
    """U."""


def begin(weight: Tensor, mask: Tensor) -> Auxiliary:
    """Z is the projection of the weights, by its mask; U is zero. In float32 at the least."""
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return Auxiliary(values * mask, torch.zeros_like(values))


def update(weight: Tensor, before: Auxiliary, mask: Tensor) -> Auxiliary:
    """The updates of Z and U; ``mask`` is that of the projection of ``weight + before.dual``."""
    values = weight.detach().to(before.dual.dtype) + before.dual
    target = values * mask
    return Auxiliary(target, values - target)


def rescaled(one: Auxiliary, rho: float, following: float) -> Auxiliary:
    """The same once rho changes: the unscaled dual variable, rho U, stays (Boyd et al., section 3.4.1)."""
    return one._replace(dual=one.dual * (rho / following))


def add_pull_(grad: Tensor, weight: Tensor, towards: Auxiliary, rho: float | Tensor) -> None:
    """Add the gradient of ``rho / 2 ||W - Z + U||^2`` to ``grad``, in place; all of one shape."""
    pull = weight.detach().to(towards.target.dtype) - towards.target + towards.dual
    grad.add_((pull * rho).to(grad.dtype))


def nearest_mask(scores: Tensor, unit: Unit | PatternUnit, count: int, rows: int = 1) -> Tensor:
    """Mask of the Euclidean projection onto weights with ``count`` nonzero units: bool [F, C, R, S].

    The projection keeps the units with the largest norms: what it zeroes is what it is away. Of a unit that
    is a kernel with a pattern that is the norm inside its best pattern, which it then keeps.

    Args:
        scores: squares of the weights, [F, C, R, S]; those of another criterion keep what matters most to it.
        unit: what is kept or zeroed as a whole.
        count: units.
        rows: equal parts of the layer, along its filters, with equally many units each.
    """
    units = largest(unit.scores(scores), count, rows)
    return unit.first(units, scores) if isinstance(unit, PatternUnit) else unit.weights(units, scores.shape)
