"""When to Prune? section 3 once more, in plain loops over single numbers."""

from __future__ import annotations

import math

Filters = list[list[list[float]]]
"""[layer of the coupled ones][neuron][weight]."""


def magnitude(filters: Filters) -> list[float]:
    """Eq. (2), over all filters that can only go together."""
    result = []
    for n in range(len(filters[0])):
        own = [w for layer in filters for w in layer[n]]
        result.append(math.sqrt(sum(w * w for w in own)) / math.sqrt(len(own)))
    return result


def taylor(filters: Filters, grads: Filters) -> list[float]:
    """Eq. (3)."""
    result = []
    for n in range(len(filters[0])):
        total = 0.0
        for layer, grad in zip(filters, grads, strict=True):
            for w, g in zip(layer[n], grad[n], strict=True):
                total += g * w
        result.append(abs(total))
    return result


def prune(
    scores: dict[str, list[float]], num_pruned: int, least: int, filters: dict[str, int] | None = None
) -> dict[str, list[bool]]:
    """The bottom-ranked neurons, one at a time; the first of equals; no group below ``least``.

    Until ``num_pruned`` are pruned, or that many filters at least: a neuron of a group may have several.
    """
    kept = {name: [True] * len(values) for name, values in scores.items()}
    pruned = 0
    while pruned < num_pruned:
        best: tuple[str, int] | None = None
        for name, values in scores.items():
            if sum(kept[name]) <= least:
                continue
            for i, value in enumerate(values):
                if kept[name][i] and (best is None or value < scores[best[0]][best[1]]):
                    best = (name, i)
        assert best is not None
        kept[best[0]][best[1]] = False
        pruned += 1 if filters is None else filters[best[0]]
    return kept


def epi(structures: list[list[int]], r: int) -> float:
    """Eq. (4) to (6) for the last structure."""
    t, total = len(structures) - 1, 0.0
    for j in range(1, r + 1):
        distance = 0.0
        layers = len(structures[t])
        for layer in range(layers):
            n1, n2 = structures[t][layer], structures[t - j][layer]
            distance += abs(n1 - n2) / (n1 + n2)
        total += 1 - distance / layers
    return total / r


def epoch_that_prunes(values: list[float | None], tau: float, needed: int) -> int | None:
    """Algorithm 2, lines 9 and 10: the first epoch after which the status becomes prune.

    Of the five values before, so many must exist; as printed all five are compared.
    """
    for t, now in enumerate(values):
        if now is None or now < tau:
            continue
        before = []
        for j in range(1, 6):
            if t - j >= 0 and values[t - j] is not None:
                before.append(values[t - j])
        if len(before) >= needed and all(now >= value for value in before):
            return t
    return None
