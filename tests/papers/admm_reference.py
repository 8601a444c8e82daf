"""Pattern pruning by ADMM once more, in plain loops over lists: PatDNN's pattern set, projections, updates.

Written from the equations (Niu et al. 2020; Zhang et al. 2018; Boyd et al. 2011), with one auxiliary variable
for both constraints, or with PatDNN's two. A layer is a list of filters, a filter a list of kernels, a kernel
a list of numbers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

Kernel = list[float]
Layer = list[list[Kernel]]
Pattern = frozenset[int]


def natural_pattern(kernel: Kernel, entries: int, center: int | None) -> Pattern:
    """The center, then the largest magnitudes; equal ones from the first on."""
    chosen = [] if center is None else [center]
    while len(chosen) < entries:
        best = None
        for position, value in enumerate(kernel):
            if position not in chosen and (best is None or abs(value) > abs(kernel[best])):
                best = position
        assert best is not None
        chosen.append(best)
    return frozenset(chosen)


def bits(pattern: Pattern) -> int:
    return sum(1 << position for position in pattern)


def pool(layers: Sequence[Layer], entries: int, size: int, center: int | None) -> list[Pattern]:
    """The natural patterns that most kernels of all layers have; of equally frequent ones the lowest bits."""
    counts: Counter[Pattern] = Counter()
    for layer in layers:
        for kernel in itertools.chain.from_iterable(layer):
            counts[natural_pattern(kernel, entries, center)] += 1
    return sorted(counts, key=lambda pattern: (-counts[pattern], bits(pattern)))[:size]


def energy(kernel: Kernel, pattern: Pattern) -> float:
    return sum(value * value for position, value in enumerate(kernel) if position in pattern)


def on_patterns(layer: Layer, patterns: Sequence[Pattern]) -> Layer:
    """The nearest layer whose kernels all have a pattern of the pool."""
    result = []
    for row in layer:
        kernels = []
        for kernel in row:
            best = max(patterns, key=lambda pattern: energy(kernel, pattern))
            kernels.append([value if position in best else 0.0 for position, value in enumerate(kernel)])
        result.append(kernels)
    return result


def few_kernels(layer: Layer, count: int) -> Layer:
    """The nearest layer with this many nonzero kernels in every filter."""
    result = []
    for row in layer:
        norms = [sum(value * value for value in kernel) for kernel in row]
        order = sorted(range(len(row)), key=lambda place: -norms[place])[:count]
        result.append([kernel if place in order else [0.0] * len(kernel) for place, kernel in enumerate(row)])
    return result


def on_both(layer: Layer, patterns: Sequence[Pattern], count: int) -> Layer:
    """The nearest layer that meets both: `the_nearest` finds no nearer one."""
    return few_kernels(on_patterns(layer, patterns), count)


def distance(one: Layer, other: Layer) -> float:
    """Squared."""
    return sum(
        (a - b) ** 2
        for rows in zip(one, other, strict=True)
        for kernels in zip(*rows, strict=True)
        for a, b in zip(*kernels, strict=True)
    )


def the_nearest(layer: Layer, patterns: Sequence[Pattern], count: int) -> float:
    """Squared distance to the nearest layer that meets both constraints, by trying all of them."""
    total = 0.0
    for row in layer:
        tries = []
        for kept in itertools.combinations(range(len(row)), count):
            for chosen in itertools.product(patterns, repeat=count):
                own = dict(zip(kept, chosen, strict=True))
                candidate = [
                    [
                        value if position in own.get(place, frozenset()) else 0.0
                        for position, value in enumerate(k)
                    ]
                    for place, k in enumerate(row)
                ]
                tries.append(distance([row], [candidate]))
        total += min(tries)
    return total


def added(one: Layer, other: Layer, sign: float = 1.0) -> Layer:
    return [
        [[a + sign * b for a, b in zip(x, y, strict=True)] for x, y in zip(*rows, strict=True)]
        for rows in zip(one, other, strict=True)
    ]


def times(layer: Layer, factor: float) -> Layer:
    return [[[value * factor for value in kernel] for kernel in row] for row in layer]


def rho_of(iteration: int, iterations: int, first: float, last: float) -> float:
    """By the same factor from iteration to iteration."""
    factor = (last / first) ** (1 / max(iterations - 1, 1))
    return first * factor**iteration
