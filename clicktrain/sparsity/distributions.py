"""Distributions: how dense each layer is, for one density over all of them.

A distribution maps the shapes of the layers' weights and a density in (0, 1] to a density per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from clicktrain.sparsity.guard import guard_of, keys_problem, share_problem
from clicktrain.sparsity.registry import Registry

Distribution: TypeAlias = Callable[[Mapping[str, Sequence[int]], float], dict[str, float]]


def uniform_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """The same density for every layer (RigL section 3, "Uniform"; DSR)."""
    return dict.fromkeys(shapes, density)


def erdos_renyi_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdos-Renyi-kernel: densities in proportion to (F + C + R + S) / (F C R S) (RigL section 3).

    Of a linear layer (O + I) / (O I). Layers for which that would be more than 1 stay dense, and the others
    share what is left, so that ``density`` of all weights live.
    """
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    scales = {name: erdos_renyi_scale(shape) for name, shape in shapes.items()}
    budget = density * sum(weights.values())
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        left = budget - sum(weights[name] for name in dense)
        factor = left / max(sum(scales[name] * weights[name] for name in free), 1e-300)
        over = [name for name in free if factor * scales[name] > 1]
        if not over:
            return {name: 1.0 if name in dense else factor * scales[name] for name in shapes}
        top = max(scales[name] for name in over)
        dense |= {name for name in over if scales[name] == top}


def erdos_renyi_scale(shape: Sequence[int]) -> float:
    """What the density of a layer is proportional to, as long as no layer is full."""
    return sum(shape) / math.prod(shape)


def densities_below(
    wanted: Mapping[str, float], shapes: Mapping[str, Sequence[int]], most: Mapping[str, float]
) -> dict[str, float]:
    """Densities in proportion to those wanted, of as many weights, and in no layer above ``most``.

    What a layer cannot take goes to the others; what none can take is left out.
    """
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    left = sum(wanted[name] * weights[name] for name in wanted)
    result: dict[str, float] = {}
    while len(result) < len(wanted):
        free = {name: wanted[name] * weights[name] for name in wanted if name not in result}
        factor = left / max(sum(free.values()), 1e-300)
        # Nothing is changed where everything fits, not even by rounding.
        over = [name for name in free if wanted[name] * (factor if result else 1.0) > most[name]]
        if not over:
            return {name: result.get(name, wanted[name] * (factor if result else 1.0)) for name in wanted}
        for name in over:
            result[name] = most[name]
            left -= most[name] * weights[name]
    return {name: result[name] for name in wanted}


OFF = 0.05
"""How far a user's own densities may be off the density asked for, as a share of it."""


def _problem(value: Any, shapes: Mapping[str, Sequence[int]], density: float) -> str | None:
    if (wrong := keys_problem(value, shapes)) is not None:
        return wrong
    for name in shapes:
        if (wrong := share_problem(value[name])) is not None:
            return f"{wrong} for {name}"
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(value[name] * size for name, size in sizes.items()) / max(sum(sizes.values()), 1)
    return (
        f"gave {total:.3g} of all weights, not {density:.3g}"
        if abs(total - density) > OFF * density
        else None
    )


DISTRIBUTIONS: Registry[Distribution] = Registry(
    "distribution",
    {"erk": erdos_renyi_densities, "uniform": uniform_densities},
    guard=guard_of(
        "distribution",
        "a function ({layer: shape}, density) -> {layer: from 0 to 1}, together that density of all weights",
        _problem,
    ),
    trial=lambda rule, layers: rule({layer.name: layer.shape for layer in layers}, 0.5),
)
DistributionChoice: TypeAlias = Annotated[str | Distribution, DISTRIBUTIONS]
