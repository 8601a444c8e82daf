"""Search for the structure that meets a latency (When to Prune?, section 4.3).

Allocation gives every filter of a layer the same number of kernels. The price is the measured time of the
layer, which saturates at the time of the dense operator, from where on further kernels are free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeVar

from torch import Tensor

from clicktrain.sparsity.allocation import LayerBudget, allocate, compression_limits
from clicktrain.surgery.neurons import widths

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


Masks = dict[str, Tensor]
T = TypeVar("T", bound=tuple[Any, ...])


@dataclass(eq=False)
class LatencySearch:
    """The structures measured so far on the way to a latency, and the next one to measure.

    Attributes:
        predict: kept neurons per group -> milliseconds.
        within: (milliseconds, masks of decided groups) -> the masks with the fewest pruned neurons.
    """

    predict: Callable[[Mapping[str, int]], float]
    within: Callable[[float, Masks], Masks]
    tried: list[tuple[float, float, Masks]] = field(default_factory=list)
    """Predicted milliseconds, measured / target, masks."""
    seen: set[tuple[int, ...]] = field(default_factory=set)
    fixed: Masks = field(default_factory=dict)

    def after(self, masks: Masks, reached: float) -> Masks | None:
        """The next structure to measure after one that took ``reached`` times the target, or None.

        Layers are fast at some widths, so that one neuron may change the time by more than the tolerance.
        Where the target lies in such a step, the layers that cause it keep their width; others are pruned.
        """
        self.tried.append((self.predict(widths(masks)), reached, masks))
        self.seen.add(tuple(widths(masks).values()))
        following = self._new()
        if following is not None:
            return following
        slow, fast = _nearest(self.tried)
        if slow is None and fast is not None:  # the next slower one is more than a proportion away
            aims = (fast[0] * 1.05**step for step in range(1, 20))
            return next((other for aim in aims if (other := self._new(aim)) is not None), None)
        if slow is None or fast is None:
            return None
        before, after = widths(slow[2]), widths(fast[2])
        self.fixed |= {name: slow[2][name] for name in before if before[name] > after[name]}
        self.tried = [slow]
        return self._new()

    def _new(self, aim: float | None = None) -> Masks | None:
        aim = next_aim([one[:2] for one in self.tried]) if aim is None else aim
        masks = self.within(aim, self.fixed)
        return None if tuple(widths(masks).values()) in self.seen else masks


def _nearest(tried: Sequence[T]) -> tuple[T | None, T | None]:
    """The fastest of those that are too slow, and the slowest of those that are not, as predicted."""
    slow, fast = [one for one in tried if one[1] > 1], [one for one in tried if one[1] <= 1]
    return min(slow, key=itemgetter(0), default=None), max(fast, key=itemgetter(0), default=None)


def next_aim(tried: Sequence[tuple[float, float]]) -> float:
    """The next time to aim at, in predicted milliseconds.

    Networks of odd widths are slower or faster than their neighbors, and clocks are noisy, so proportional
    steps may oscillate: once there are a network that is too slow and a smaller one that is too fast, the
    next is between them.

    Args:
        tried: predicted milliseconds of what was measured, and measured / target; at least one.

    Examples:
        >>> next_aim([(10.0, 1.25)]), next_aim([(10.0, 1.25), (8.0, 0.5)])
        (8.0, 9.0)
    """
    predicted, reached = tried[-1]
    aim = predicted / reached
    slow, fast = _nearest(tried)
    if slow is None or fast is None:
        return aim
    if fast[0] < slow[0]:
        return aim if fast[0] < aim < slow[0] else (fast[0] + slow[0]) / 2
    estimates = [math.log(p / r) for p, r in tried]  # they contradict each other
    return math.exp(sum(estimates) / len(estimates))


def aim_after(tried: Sequence[tuple[float, float]]) -> float:
    """The next aim by interpolation between the nearest network that is too slow and the nearest that is not.

    Where there are not both, or they contradict each other, as `next_aim`, which has the argument. A factor
    alone does not describe the error of predictions: whole networks convert layouts and fuse steps.

    Examples:
        >>> aim_after([(10.0, 1.5), (6.0, 0.5)])
        8.0
    """
    slow, fast = _nearest(tried)
    if slow is None or fast is None or fast[0] >= slow[0]:
        return next_aim(tried)
    share = (1 - fast[1]) / (slow[1] - fast[1])
    return fast[0] + min(max(share, 0.1), 0.9) * (slow[0] - fast[0])
