"""One update of moving patterns in plain loops; nothing of the library is used.

A layer is [filters][channels][positions] of weights, ``mask``
the same of bools; a pattern is a set of positions.
"""

from __future__ import annotations

import math

Kernel = list[float]
Layer = list[list[Kernel]]
Pattern = frozenset[int]
At = tuple[int, int]


def best_pattern(values: Kernel, pool: list[Pattern]) -> int:
    """The first with the largest sum of magnitudes."""
    sums = [sum(abs(values[i]) for i in pattern) for pattern in pool]
    return sums.index(max(sums))


def worth(values: Kernel, pool: list[Pattern]) -> float:
    return sum(abs(values[i]) for i in pool[best_pattern(values, pool)])


def kept_of_filters(scores: list[dict[int, float]], keep: int) -> set[At]:
    """In every filter equally many of the largest; what is over goes to the filters with the next largest."""
    orders = [sorted(own, key=lambda c, own=own: (-own[c], c)) for own in scores]  # type: ignore[misc]
    each, more = divmod(keep, len(scores))
    kept = {(f, c) for f, order in enumerate(orders) for c in order[:each]}
    following = [f for f, order in enumerate(orders) if each < len(order)]
    following.sort(key=lambda f: (-scores[f][orders[f][each]], f))
    return kept | {(f, orders[f][each]) for f in following[:more]}


def exchanged(weights: Kernel, own: Pattern, pool: list[Pattern]) -> tuple[Pattern, float]:
    """What a kernel would keep of its pattern at an exchange, and the magnitudes that it would give up.

    Neighbors share as many positions with the pattern as any other pattern does.
    """
    shared = max(len(own & other) for other in pool if other != own)
    sets = {own & other for other in pool if other != own and len(own & other) == shared}
    best = min(sets, key=lambda kept: (given_up(weights, own, kept), first_of(kept, pool)))
    return best, given_up(weights, own, best)


def given_up(weights: Kernel, own: Pattern, kept: Pattern) -> float:
    return sum(abs(weights[i]) for i in own - kept)


def first_of(kept: Pattern, pool: list[Pattern]) -> int:
    """Place of a set in the order in which neighbors of the pool's patterns share sets, for ties."""
    place = {}
    for own in pool:
        shared = max(len(own & other) for other in pool if other != own)
        for other in pool:
            if other != own and len(own & other) == shared:
                place.setdefault(own & other, len(place))
    return place[kept]


def update(
    weights: Layer, gradients: Layer, mask: list[list[list[bool]]], pool: list[Pattern], share: float
) -> tuple[list[list[Pattern]], int]:
    """Each kernel's positions after the update, and how many that stayed have another pattern."""
    filters, channels = range(len(weights)), range(len(weights[0]))
    own = [[frozenset(i for i, k in enumerate(mask[f][c]) if k) for c in channels] for f in filters]
    alive = [{c: worth(weights[f][c], pool) for c in channels if own[f][c]} for f in filters]
    total = sum(len(one) for one in alive)
    each = total // len(weights)
    kept = kept_of_filters(alive, max(total - math.floor(share * total), len(weights)))
    result = [[own[f][c] if (f, c) in kept else frozenset() for c in channels] for f in filters]
    for f in filters:
        free = [c for c in channels if (f, c) not in kept]
        free.sort(key=lambda c, f=f: (-worth(gradients[f][c], pool), c))  # type: ignore[misc]
        for c in free[: each - sum(1 for at in kept if at[0] == f)]:
            result[f][c] = pool[best_pattern(gradients[f][c], pool)]
    moving = len(kept) * (total - len(kept)) // total
    costs = [
        {c: exchanged(weights[f][c], own[f][c], pool)[1] for c in channels if (f, c) in kept} for f in filters
    ]
    changed = 0
    for f, c in kept - kept_of_filters(costs, len(kept) - moving) if moving else ():
        stays, _ = exchanged(weights[f][c], own[f][c], pool)
        shared = max(len(own[f][c] & other) for other in pool if other != own[f][c])
        steepest, best = sum(abs(gradients[f][c][i]) for i in own[f][c]), own[f][c]
        for other in pool:
            slope = sum(abs(gradients[f][c][i]) for i in other)
            neighbor = other != own[f][c] and len(other & own[f][c]) == shared
            if neighbor and other & own[f][c] == stays and slope > steepest:
                steepest, best = slope, other
        changed += best != own[f][c]
        result[f][c] = best
    return result, changed
