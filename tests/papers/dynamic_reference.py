"""One update of DSR (Mostafa and Wang 2019, Algorithm 1) and of RigL (Evci et al. 2020, Algorithm 1).

Plain loops over lists, written from the papers; nothing of the library is used. A layer is a list of units,
each a list of weights; ``alive`` says which units live.
"""

from __future__ import annotations

import math
from fractions import Fraction

Layer = list[list[float]]


def magnitude(unit: list[float]) -> float:
    return sum(abs(weight) for weight in unit) / len(unit)


def rigl_update(
    weights: Layer, gradients: Layer, alive: list[bool], step: int, end: int, alpha: float
) -> list[bool]:
    """Which units live after the update of one layer."""
    kept, after = rigl_halves(weights, gradients, alive, step, end, alpha)
    del kept
    return after


def rigl_halves(
    weights: Layer, gradients: Layer, alive: list[bool], step: int, end: int, alpha: float
) -> tuple[list[bool], list[bool]]:
    """Which units of one layer stay, and which live after the update."""
    share = alpha / 2 * (1 + math.cos(step * math.pi / end))
    living = [i for i in range(len(alive)) if alive[i]]
    k = min(math.floor(share * len(living)), len(living) - 1)
    # ArgTopK(-|theta|, k): of equal ones the last goes.
    by_size = sorted(living, key=lambda i: (magnitude(weights[i]), -i))
    dropped = set(by_size[:k])
    active = [i for i in living if i not in dropped]
    candidates = [i for i in range(len(alive)) if i not in active]
    candidates.sort(key=lambda i: (-magnitude(gradients[i]), i))
    grown = set(candidates[:k])
    every = range(len(alive))
    return [i in active for i in every], [i in active or i in grown for i in every]


def with_living_filters(
    weights: Layer,
    gradients: Layer | None,
    before: list[bool],
    kept: list[bool],
    alive: list[bool],
    filters: int,
) -> list[bool]:
    """What the library adds: no filter loses its last unit that is not zero.

    It keeps its largest. For each, that unit of the layer goes which matters least, grown ones (by gradient)
    before those that stayed (by magnitude), the last of equal ones; never the largest of a filter.
    """
    size = [magnitude(unit) if live else 0.0 for unit, live in zip(weights, before, strict=True)]
    each = len(alive) // filters
    parts = [range(f * each, (f + 1) * each) for f in range(filters)]
    bare = [
        part
        for part in parts
        if any(size[i] > 0 for i in part) and not any(alive[i] and size[i] > 0 for i in part)
    ]
    largest = set()
    for part in parts:
        living = [i for i in part if alive[i] and size[i] > 0]
        if living:
            largest.add(max(living, key=lambda i: (size[i], -i)))

    def worth(i: int) -> float:
        if kept[i]:
            return 1 + size[i]
        slope = 0.0 if gradients is None else magnitude(gradients[i])
        return slope / (1 + slope)

    spare = sorted(
        (i for i in range(len(alive)) if alive[i] and i not in largest), key=lambda i: (worth(i), -i)
    )
    result = list(alive)
    for goes in spare[: len(bare)]:
        result[goes] = False
    for part in bare[: len(spare)]:
        result[max(part, key=lambda i: (size[i], -i))] = True
    return result


def dsr_prune(weights: Layer, alive: list[bool], threshold: float) -> list[bool]:
    """prune_by_threshold; the largest unit stays if all would go."""
    kept = [live and magnitude(unit) >= threshold for unit, live in zip(weights, alive, strict=True)]
    if not any(kept):
        best = None
        for i, live in enumerate(alive):
            if live and (best is None or magnitude(weights[i]) > magnitude(weights[best])):
                best = i
        kept = [i == best for i in range(len(alive))]
    return kept


def dsr_grow_counts(total: int, survivors: list[int], free: list[int]) -> list[int]:
    """(l_i / L) K units of one weight for each layer, as whole numbers that add up to K if there is room."""
    grown = [0] * len(free)
    while total > sum(grown) and any(g < f for g, f in zip(grown, free, strict=True)):
        able = [i for i in range(len(free)) if grown[i] < free[i]]
        left = total - sum(grown)
        quota = {i: Fraction(survivors[i] * left, sum(survivors[j] for j in able)) for i in able}
        if any(math.floor(quota[i]) > free[i] - grown[i] for i in able):
            for i in able:
                grown[i] += min(math.floor(quota[i]), free[i] - grown[i])
            continue
        for i in able:
            grown[i] += math.floor(quota[i])
        rest = total - sum(grown)
        by_remainder = sorted(able, key=lambda i: (-(quota[i] - math.floor(quota[i])), i))
        for i in by_remainder:
            if rest > 0 and grown[i] < free[i]:
                grown[i] += 1
                rest -= 1
    return grown


def dsr_threshold(threshold: float, pruned: int, target: float, delta: float) -> float:
    """adjust_pruning_threshold."""
    if pruned < (1 - delta) * target:
        return threshold * 2
    if pruned > (1 + delta) * target:
        return threshold / 2
    return threshold
