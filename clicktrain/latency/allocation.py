"""Allocation by time: how many kernels each layer keeps, so that the network meets a latency.

As in `clicktrain.sparsity.allocation`, every filter of a layer keeps the same number of kernels. The price is
not weights but the measured time of the layer, which is not linear: it saturates at the time of the dense
operator, from where on further kernels are free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence

from clicktrain.sparsity.allocation import LayerBudget, allocate, compression_limits

HALVINGS = 40


def allocate_within(
    layers: Sequence[LayerBudget],
    times: Mapping[str, Sequence[float]],
    gains: Mapping[str, Sequence[float]],
    budget: float,
    least: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Kept kernels per filter of every layer, with the most gain for a time.

    The greedy solution of the multiple-choice knapsack problem, which is off the best one by less than one
    jump: it repeats the affordable jump of one layer to more kernels that gains most per millisecond.

    Args:
        layers: the layers that are pruned.
        times: per layer [C], milliseconds with 1, 2, ... kernels per filter; not falling.
        gains: per layer [C], the worth of the 1st, 2nd, ... kernel of every filter.
        budget: milliseconds of all layers together. ``least`` is returned where even that takes more.
        least: fewest kernels of a layer; 1 by default.
    """
    kept = {layer.name: layer.fixed or max(1, (least or {}).get(layer.name, 1)) for layer in layers}
    left = budget - sum(times[layer.name][kept[layer.name] - 1] for layer in layers)
    offers: list[tuple[float, int, int, float]] = []  # (-gain per millisecond, layer, kernels, milliseconds)

    def offer(index: int) -> None:
        layer = layers[index]
        best = _best_jump(times[layer.name], gains[layer.name], kept[layer.name], left)
        if layer.fixed is None and best is not None:
            heapq.heappush(offers, (-best[0], index, best[1], best[2]))

    for index in range(len(layers)):
        offer(index)
    while offers:
        _, index, kernels, cost = heapq.heappop(offers)
        if cost <= max(left, 0.0):
            kept[layers[index].name] = kernels
            left -= cost
        offer(index)  # the next jump, or a smaller one that can be paid for
    return kept


def _best_jump(
    times: Sequence[float], gains: Sequence[float], now: int, left: float
) -> tuple[float, int, float] | None:
    """(gain per millisecond, kernels, milliseconds) of the best affordable jump."""
    best: tuple[float, int, float] | None = None
    gained = 0.0
    for kernels in range(now + 1, len(times) + 1):
        gained += gains[kernels - 1]
        cost = max(times[kernels - 1] - times[now - 1], 0.0)
        if cost > max(left, 0.0):
            break
        rate = gained / cost if cost > 0 else math.inf
        if best is None or rate > best[0]:
            best = rate, kernels, cost
    return best


def least_compression_within(
    layers: Sequence[LayerBudget],
    other_weights: int,
    predict: Callable[[Mapping[str, int]], float],
    budget: float,
    allocated: Callable[[float], dict[str, int]] | None = None,
) -> tuple[float, dict[str, int]]:
    """The smallest compression ratio whose allocation meets a time, and that allocation.

    Args:
        layers: the layers that are pruned.
        other_weights: convolution weights that stay dense.
        predict: kernels per filter of every layer -> milliseconds.
        budget: milliseconds. The largest ratio is returned where even that takes more.
        allocated: compression ratio -> kernels per filter; equal densities by default.
    """
    rule = allocated or (lambda ratio: allocate(layers, other_weights, ratio))
    low, high = compression_limits(layers, other_weights)
    chosen = rule(low)
    if predict(chosen) <= budget:
        return low, chosen
    chosen = rule(high)
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        kept = rule(middle)
        if predict(kept) <= budget:
            high, chosen = middle, kept
        else:
            low = middle
    return high, chosen
