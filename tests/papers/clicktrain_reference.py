"""ClickTrain, sections 4.1-4.4, one kernel at a time: the oracle for the vectorised library.

Written from the paper's text alone, with loops and lists, and importing nothing of the library. A kernel is
a list of rows of numbers; a layer is ``layer[f][c][r][s]``. A pattern is an integer whose bit ``r * S + s``
is set where position (r, s) is kept. The paper leaves ties open; here they go to the lowest position
(row-major), the lowest pattern bits, the lowest pool index or the lowest channel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch

Kernel = Sequence[Sequence[float]]
Layer = Sequence[Sequence[Kernel]]
Position = tuple[int, int]

HORIZONTAL_VERTICAL = ((-1, 0), (0, -1), (0, 1), (1, 0))
DIAGONAL = ((-1, -1), (-1, 1), (1, -1), (1, 1))


# ---------------------------------------------------------------- patterns and the criterion (4.1)


def positions_of(kernel: Kernel) -> list[Position]:
    return [(r, s) for r in range(len(kernel)) for s in range(len(kernel[0]))]


def bits_of(positions: Iterable[Position], width: int) -> int:
    return sum(1 << (r * width + s) for r, s in positions)


def is_kept(bits: int, r: int, s: int, width: int) -> bool:
    return (bits >> (r * width + s)) & 1 == 1


def every_pattern(entries: int, height: int, width: int) -> list[int]:
    """All patterns with this many kept positions: C(9, 4) = 126 for 3x3."""
    places = [(r, s) for r in range(height) for s in range(width)]
    return sorted(bits_of(chosen, width) for chosen in itertools.combinations(places, entries))


def weight_importance(weight: Layer, grad: Layer) -> list[list[list[list[float]]]]:
    """(g_m w_m)^2 for each weight."""
    result = []
    for f in range(len(weight)):
        kernels = []
        for c in range(len(weight[f])):
            kernel = weight[f][c]
            kernels.append(
                [
                    [(grad[f][c][r][s] * kernel[r][s]) ** 2 for s in range(len(kernel[0]))]
                    for r in range(len(kernel))
                ]
            )
        result.append(kernels)
    return result


def pattern_importance(importance: Kernel, bits: int) -> float:
    """Eq. (1): the sum of the importance of the kept positions."""
    width = len(importance[0])
    return sum(importance[r][s] for r, s in positions_of(importance) if is_kept(bits, r, s, width))


def kernel_importance(importance: Kernel) -> float:
    """Eq. (2): the sum of the importance of all positions."""
    return sum(importance[r][s] for r, s in positions_of(importance))


def group_filters(importance: Layer, group: int) -> list[list[list[list[float]]]]:
    """A layer of F / group filters: the importance of neighbouring filters is added by position."""
    assert len(importance) % group == 0
    grouped = []
    for start in range(0, len(importance), group):
        members = importance[start : start + group]
        grouped.append(
            [
                [
                    [sum(member[c][r][s] for member in members) for s in range(len(members[0][c][0]))]
                    for r in range(len(members[0][c]))
                ]
                for c in range(len(members[0]))
            ]
        )
    return grouped


def epochs_until_the_loss_settles(
    epochs: Sequence[Sequence[float]], threshold: float, over: int, mean: bool = False
) -> int | None:
    """Finished epochs when the derivative of the loss on epochs is less than a threshold for the first time.

    ``epochs[t][i]`` is the loss of batch i. E(W, D), the loss on the data set, is the sum over its batches,
    or with ``mean`` their mean. The derivative is taken over ``over`` epochs, and is positive where E falls.
    """
    of_epoch: list[float] = []
    for done, batches in enumerate(epochs, start=1):
        total = 0.0
        for loss in batches:
            total += loss
        of_epoch.append(total / len(batches) if mean else total)
        if done > over:
            fall = of_epoch[done - 1 - over] - of_epoch[done - 1]
            if fall / over < threshold:
                return done
    return None


# ---------------------------------------------------------------- dynamic pattern pool generation (4.2)


def neighbours(position: Position, kernel: Kernel, offsets: Iterable[Position]) -> list[Position]:
    r, s = position
    inside = set(positions_of(kernel))
    return sorted((r + dr, s + ds) for dr, ds in offsets if (r + dr, s + ds) in inside)


def most_important(importance: Kernel, places: Sequence[Position]) -> Position:
    """The first, in row-major order, of the places with the highest importance."""
    best = None
    for r, s in sorted(places):
        if best is None or importance[r][s] > importance[best[0]][best[1]]:
            best = (r, s)
    assert best is not None
    return best


def candidate_pattern(importance: Kernel, entries: int) -> int:
    """Steps 1 to 4 of DPPG for one kernel.

    A kernel that has no more than ``entries`` positions is kept whole. Where the first two positions have too
    few neighbours (larger ``entries``, kernels of one row), all are taken and the search goes on from there.
    """
    width = len(importance[0])
    # Step 1: the position with the highest importance.
    first = most_important(importance, positions_of(importance))
    chosen = [first]
    # Step 2: the best of its horizontal, vertical and diagonal neighbours.
    around = neighbours(first, importance, HORIZONTAL_VERTICAL + DIAGONAL)
    if entries >= 2 and around:
        chosen.append(most_important(importance, around))
    while len(chosen) < entries:
        # Step 3: horizontal and vertical neighbours of what is chosen.
        candidates = sorted(
            {n for place in chosen for n in neighbours(place, importance, HORIZONTAL_VERTICAL)} - set(chosen)
        )
        if not candidates:
            break
        missing = entries - len(chosen)
        if len(candidates) <= missing:
            chosen += candidates
            continue
        # Step 4: every combination forms a candidate pattern; the highest pattern importance wins.
        best_bits, best_score = None, -math.inf
        patterns = [bits_of([*chosen, *some], width) for some in itertools.combinations(candidates, missing)]
        for bits in sorted(patterns):
            score = pattern_importance(importance, bits)
            if score > best_score:
                best_bits, best_score = bits, score
        assert best_bits is not None
        return best_bits
    return bits_of(chosen, width)


def settled_positions(importance: Kernel, entries: int) -> list[list[bool]]:
    """The crosses of Figure 6: positions that no candidate pattern of a kernel keeps.

    Steps 1 to 3 as in `candidate_pattern`; then every combination of step 4 is a candidate pattern.
    """
    width = len(importance[0])
    first = most_important(importance, positions_of(importance))
    chosen = [first]
    around = neighbours(first, importance, HORIZONTAL_VERTICAL + DIAGONAL)
    if entries >= 2 and around:
        chosen.append(most_important(importance, around))
    patterns = [bits_of(chosen, width)]
    while len(chosen) < entries:
        candidates = sorted(
            {n for place in chosen for n in neighbours(place, importance, HORIZONTAL_VERTICAL)} - set(chosen)
        )
        missing = entries - len(chosen)
        if len(candidates) > missing:
            patterns = [bits_of([*chosen, *s], width) for s in itertools.combinations(candidates, missing)]
            break
        if not candidates:
            break
        chosen += candidates
        patterns = [bits_of(chosen, width)]
    return [
        [not any(is_kept(bits, r, s, width) for bits in patterns) for s in range(width)]
        for r in range(len(importance))
    ]


def competitive_scores(batches: Iterable[Sequence[Layer]], entries: int) -> dict[int, int]:
    """Step 5: how many (batch, layer, kernel) proposed each pattern. A batch is a list of layers."""
    scores: dict[int, int] = {}
    for layers in batches:
        for layer in layers:
            for kernels in layer:
                for kernel in kernels:
                    bits = candidate_pattern(kernel, entries)
                    if bits in scores:
                        scores[bits] += 1
                    else:
                        scores[bits] = 1
    return scores


def select_pool(scores: dict[int, int], num_patterns: int) -> list[int]:
    """Step 6: the patterns with the highest competitive scores."""
    return sorted(scores, key=lambda bits: (-scores[bits], bits))[:num_patterns]


# ---------------------------------------------------------------- adaptive finalization (4.3)


def best_pattern(importance: Kernel, pool: Sequence[int]) -> int:
    """Index in the pool of the pattern with the highest importance in this kernel."""
    best = 0
    for index in range(1, len(pool)):
        if pattern_importance(importance, pool[index]) > pattern_importance(importance, pool[best]):
            best = index
    return best


def counted_literal(previous: float | None, current: float, margin: float) -> bool:
    """The paper's sentence: not counted if previous loss / current loss is under the margin (0.0018)."""
    return previous is None or not previous / current < margin


def counted_increase(previous: float | None, current: float, margin: float) -> bool:
    """The other reading: not counted if the loss grew by more than that share of the previous loss."""
    return previous is None or not current > previous * (1 + margin)


def pattern_votes(
    batches: Sequence[Layer], pool: Sequence[int], counted: Sequence[bool] | None = None
) -> list[list[list[int]]]:
    """``votes[f][c][p]``: in how many counted batches pattern p was the best one of kernel (f, c)."""
    first = batches[0]
    votes = [[[0 for _ in pool] for _ in kernels] for kernels in first]
    for number, layer in enumerate(batches):
        if counted is not None and not counted[number]:
            continue
        for f, kernels in enumerate(layer):
            for c, kernel in enumerate(kernels):
                votes[f][c][best_pattern(kernel, pool)] += 1
    return votes


def which_batches_count(
    losses: Sequence[float], margin: float, rule: Callable[[float | None, float, float], bool]
) -> list[bool]:
    previous: float | None = None
    counted = []
    for loss in losses:
        counted.append(rule(previous, loss, margin))
        previous = loss
    return counted


def final_patterns(votes: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Most frequent highest-scoring pattern per kernel."""
    return [
        [max(range(len(counts)), key=lambda p, counts=counts: (counts[p], -p)) for counts in kernels]
        for kernels in votes
    ]


def accumulated_kernel_importance(
    batches: Sequence[Layer], pattern_of: Sequence[Sequence[int]] | None = None
) -> list[list[float]]:
    """Eq. (2) summed over batches, or Eq. (1) of the kernel's own pattern where ``pattern_of`` is given."""
    totals = [[0.0 for _ in kernels] for kernels in batches[0]]
    for layer in batches:
        for f, kernels in enumerate(layer):
            for c, kernel in enumerate(kernels):
                if pattern_of is None:
                    totals[f][c] += kernel_importance(kernel)
                else:
                    totals[f][c] += pattern_importance(kernel, pattern_of[f][c])
    return totals


def important_kernels(importance: Sequence[Sequence[float]], kept: int) -> list[list[bool]]:
    """Each filter keeps exactly ``kept`` kernels."""
    result = []
    for row in importance:
        ranked = sorted(range(len(row)), key=lambda c: (-row[c], c))
        result.append([c in ranked[:kept] for c in range(len(row))])
    return result


def keep_mask(
    pattern_of: Sequence[Sequence[int]],
    alive: Sequence[Sequence[bool]],
    height: int,
    width: int,
    group: int = 1,
) -> list[list[list[list[bool]]]]:
    """[F][C][R][S]: the pattern of an important kernel, nothing of an unimportant one."""
    mask = []
    for patterns, lives in zip(pattern_of, alive, strict=True):
        one_filter = [
            [[live and is_kept(bits, r, s, width) for s in range(width)] for r in range(height)]
            for bits, live in zip(patterns, lives, strict=True)
        ]
        mask += [one_filter] * group
    return mask


# ---------------------------------------------------------------- modified group lasso (4.4)


def modified_group_lasso(weight: torch.Tensor, keep: torch.Tensor, coefficient: float) -> torch.Tensor:
    """lambda * sum over kernels of the norm of the weights that are not kept; a torch scalar for autograd.

    A norm of exactly zero is left out of the sum: its derivative is not defined and taken as zero.
    """
    penalty = torch.zeros((), dtype=weight.dtype)
    filters, channels, height, width = weight.shape
    for f in range(filters):
        for c in range(channels):
            squares = torch.zeros((), dtype=weight.dtype)
            for r in range(height):
                for s in range(width):
                    if not bool(keep[f, c, r, s]):
                        squares = squares + weight[f, c, r, s] ** 2
            if squares.item() > 0:
                penalty = penalty + torch.sqrt(squares)
    return coefficient * penalty


# ---------------------------------------------------------------- kernels per filter and layer


def greedy_allocation(
    kernel_scores: Sequence[Sequence[Sequence[float]]], entries: Sequence[int], budget: float
) -> list[int]:
    """Kernels that every filter of each layer keeps, when a number of weights may be kept over all layers.

    ``kernel_scores[layer][f][c]``. The k-th kernels of all filters of a layer are bought together, for
    F * entries weights, and bring the sum over filters of the k-th highest score. Each layer gets one kernel
    per filter; then the highest gain per weight goes first (ties: lowest layer) until nothing more fits.
    """
    gains = []
    for layer in kernel_scores:
        ranked = [sorted(row, reverse=True) for row in layer]
        gains.append([sum(row[k] for row in ranked) for k in range(len(layer[0]))])
    kept = [1 for _ in kernel_scores]
    prices = [len(layer) * e for layer, e in zip(kernel_scores, entries, strict=True)]
    left = budget - sum(prices)
    while True:
        best, best_rate = None, -math.inf
        for index, price in enumerate(prices):
            if kept[index] == len(gains[index]) or price > left:
                continue
            rate = gains[index][kept[index]] / price
            if rate > best_rate:
                best, best_rate = index, rate
        if best is None:
            return kept
        kept[best] += 1
        left -= prices[best]
