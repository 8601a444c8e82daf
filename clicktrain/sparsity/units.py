"""Units of unstructured and kernel sparsity: what is dropped, pruned and grown as one.

Units are computed on views [F, C, R, S] of a weight (`clicktrain.graph.prunable`); scores and masks of units
keep four dimensions, with those that a unit spans of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.sparsity.pattern_units import USUAL
from clicktrain.sparsity.registry import Registry, smallest


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit that spans these dimensions of [F, C, R, S] whole; none of them: a single weight."""

    dims: tuple[int, ...] = ()

    def shape(self, view: Sequence[int]) -> tuple[int, ...]:
        """Shape of the units of a layer, with four dimensions."""
        return tuple(1 if dim in self.dims else size for dim, size in enumerate(view))

    def size(self, view: Sequence[int]) -> int:
        """Weights of a unit."""
        return math.prod(view[dim] for dim in self.dims)

    def scores(self, scores: Tensor) -> Tensor:
        """Mean score of each unit's weights: a mean, so that units of all sizes compare over layers."""
        return scores.mean(dim=self.dims, keepdim=True) if self.dims else scores

    def units(self, mask: Tensor) -> Tensor:
        """Mask of units from a mask of weights that is made of whole units."""
        for dim in self.dims:
            mask = mask.narrow(dim, 0, 1)
        return mask

    def weights(self, units: Tensor, view: Sequence[int]) -> Tensor:
        """Mask of weights from a mask of units."""
        return units.expand(*view).contiguous()


METHODS = ("shape", "size", "scores", "units", "weights")


def _is_unit(value: object) -> bool:
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in METHODS)


def _try(unit: Unit, layers: Sequence[Any]) -> None:
    """UserError unless a unit takes a layer apart and puts it together again."""
    layer = smallest(layers)
    shape, view = layer.view_shape, layer.view(layer.weight.detach()).float().abs()
    try:
        scores, size = unit.scores(view), unit.size(shape)
        whole = unit.weights(unit.units(torch.ones_like(view, dtype=torch.bool)), shape)
        wrong = (
            "" if tuple(scores.shape) == tuple(unit.shape(shape)) else "scores have another shape than units"
        )
        if scores.numel() * size != view.numel() or whole.shape != view.shape or not bool(whole.all()):
            wrong = "units do not make up the layer"
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        raise UserError(f"of a layer of shape {list(shape)}, {wrong}: see clicktrain.sparsity.units.Unit")


UNITS: Registry[Any] = Registry(
    "granularity",
    {"weight": Unit(), "kernel": Unit((2, 3)), "pattern": USUAL},
    fits=_is_unit,
    wanted="an object with the methods of clicktrain.sparsity.units.Unit, ",
    own="package.module:unit",
    trial=_try,
)
"""Single weights, the kernels of a convolution (in a linear layer a kernel is a weight), and kernels with a
pattern each."""
UnitChoice: TypeAlias = Annotated[str | Unit, UNITS]


def best_of_each_group(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the ``n`` best of every ``m`` neighboring input channels (N:M sparsity): [F, C, R, S] -> bool.

    m divides C. Ties go to the first channel.
    """
    groups = scores.reshape(scores.shape[0], -1, m, *scores.shape[2:])
    order = groups.sort(dim=2, descending=True, stable=True).indices[:, :, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).flatten(1, 2)
