"""Campfire's algorithms, one weight at a time: the oracle for the vectorised library.

Written from the paper's text (section 2, Algorithms 1 to 4), with loops and lists, importing nothing of the
library. A layer is ``layer[k][c][r][s]`` of magnitudes, K output filters by C input channels as the paper
names them; a mask is the same of booleans, True = kept.

Algorithms 1 and 3 say "cutoff_index = size * sparsity_threshold; n = max(cutoff_index, size - max_non_zero -
1); cutoff_value = n-th largest value; mask = 1 if larger than cutoff_value". Sorted so that small ones come
first and counted from 0 this leaves at most max_non_zero; it takes a whole kernel only where
``size * threshold`` reaches ``size - 1``, which is left out here: something always stays.
"""

from __future__ import annotations

import math

Kernel = list[list[float]]
Layer = list[list[Kernel]]
Mask = list[list[list[list[bool]]]]


def threshold(e_c: float, e_i: float, l_p: float, s_f: float, s_i: float, r: float) -> float:
    """Eq. (1) with the sign that begins at s_i; the paper prints s_i + s_f and has s_i = 0."""
    return s_f - (s_f - s_i) * (1 - (e_c - e_i) / l_p) ** r


def cutoff(values: list[float], sparsity_threshold: float, max_non_zero: int | None) -> float:
    """What is not larger than this is pruned."""
    size = len(values)
    n = math.floor(size * sparsity_threshold + 1e-9)
    if max_non_zero is not None:
        n = max(n, size - max_non_zero - 1)
    n = min(n, size - 2)
    return sorted(values)[n] if n >= 0 and sparsity_threshold > 0 else -math.inf


def window(layer: Layer, sparsity_threshold: float, max_non_zero: int | None = None) -> Mask:
    """Algorithm 3."""
    mask: Mask = []
    for filter_ in layer:
        mask.append([])
        for kernel in filter_:
            limit = cutoff([w for row in kernel for w in row], sparsity_threshold, max_non_zero)
            mask[-1].append([[w > limit for w in row] for row in kernel])
    return mask


def ck(layer: Layer, sparsity_threshold: float, within: str = "channel") -> Mask:
    """Algorithm 1: for all c in C the kernels of all k in K compete; or, not in the paper, the other way."""
    filters, channels = len(layer), len(layer[0])
    kernel_max = [[max(w for row in kernel for w in row) for kernel in filter_] for filter_ in layer]
    kept = [[False] * channels for _ in range(filters)]
    if within == "channel":
        for c in range(channels):
            limit = cutoff([kernel_max[k][c] for k in range(filters)], sparsity_threshold, None)
            for k in range(filters):
                kept[k][c] = kernel_max[k][c] > limit
    else:
        for k in range(filters):
            limit = cutoff(kernel_max[k], sparsity_threshold, None)
            for c in range(channels):
                kept[k][c] = kernel_max[k][c] > limit
    return [
        [[[kept[k][c] for _ in row] for row in layer[k][c]] for c in range(channels)] for k in range(filters)
    ]


def both(first: Mask, second: Mask) -> Mask:
    """Algorithm 4: mask = window_mask and ck_mask."""
    return [
        [
            [[a and b for a, b in zip(x, y, strict=True)] for x, y in zip(kernel, other, strict=True)]
            for kernel, other in zip(filter_, another, strict=True)
        ]
        for filter_, another in zip(first, second, strict=True)
    ]


def pruned_share(size: int, sparsity_threshold: float, max_non_zero: int | None = None) -> float:
    """Share that a line of distinct values loses."""
    values = [float(i) for i in range(size)]
    limit = cutoff(values, sparsity_threshold, max_non_zero)
    return sum(value <= limit for value in values) / size


def rest_of(sparsity_threshold: float, done: float) -> float:
    rest = 1 - (1 - sparsity_threshold) / (1 - done)
    return rest if rest > 1e-9 else 0.0


def combined(
    layer: Layer, sparsity_threshold: float, share: float = 0.8, max_non_zero: int | None = None
) -> Mask:
    """Section 2.1.1: window at a share of the threshold, then CK for what remains of it."""
    size = len(layer[0][0]) * len(layer[0][0][0])
    if size == 1:
        return ck(layer, sparsity_threshold)
    done = pruned_share(size, share * sparsity_threshold, max_non_zero)
    first = window(layer, share * sparsity_threshold, max_non_zero)
    return both(first, ck(layer, rest_of(sparsity_threshold, done)))


def inter_epoch(layer: Layer, sparsity_threshold: float, ck_threshold: float) -> Mask:
    """Appendix A: CK up to a threshold, then windows for the rest."""
    size = len(layer[0][0]) * len(layer[0][0][0])
    if size == 1 or sparsity_threshold <= ck_threshold:
        return ck(layer, sparsity_threshold)
    done = pruned_share(len(layer), ck_threshold)
    return both(ck(layer, ck_threshold), window(layer, rest_of(sparsity_threshold, done)))


# ---------------------------------------------------------------- fully connected (2.1.2)


def fine(matrix: Kernel, sparsity_threshold: float) -> list[list[bool]]:
    """The magnitudes of all weights are compared with each other."""
    limit = cutoff([w for row in matrix for w in row], sparsity_threshold, None)
    return [[w > limit for w in row] for row in matrix]


def block(matrix: Kernel, sparsity_threshold: float, n: int) -> list[list[bool]]:
    """The n x n windows with the smallest sums go; windows at the edge are compared by their mean."""
    outputs, inputs = len(matrix), len(matrix[0])
    means = {}
    for top in range(0, outputs, n):
        for left in range(0, inputs, n):
            inside = [w for row in matrix[top : top + n] for w in row[left : left + n]]
            means[top, left] = sum(inside) / len(inside)
    limit = cutoff(list(means.values()), sparsity_threshold, None)
    return [[means[o // n * n, i // n * n] > limit for i in range(inputs)] for o in range(outputs)]


def linear(matrix: Kernel, sparsity_threshold: float, n: int | None, dead: list[bool]) -> list[list[bool]]:
    """Inputs from zero filters go first; then weights or blocks; each output keeps at least one input."""
    left = [[0.0 if gone else w for w, gone in zip(row, dead, strict=True)] for row in matrix]
    mask = fine(left, sparsity_threshold) if n is None else block(left, sparsity_threshold, n)
    mask = [[keep and not gone for keep, gone in zip(row, dead, strict=True)] for row in mask]
    for row, weights in zip(mask, left, strict=True):
        if not any(row):
            row[weights.index(max(weights))] = True
    return mask
