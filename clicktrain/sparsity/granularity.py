"""Granularities of a convolution's sparsity: inside kernels, whole kernels, both (Campfire section 2.1.1).

A granularity first decides how much goes (a `Cut`: counts, from shape and threshold alone) and then what goes
(a mask, from scores). Scores are those of any criterion, [F, C, R, S], larger = keep: Campfire ranks by
magnitude, and any number that grows with it gives the same masks.

How Algorithms 1 and 3 are read. Sorted ascending, the score at index
``n = max(size * threshold, size - max_non_zero - 1)``, counted from 0, is the cutoff, and what is strictly
above it stays: n + 1 are pruned, and what ties with the cutoff goes too. ("n-th largest", as printed, would
keep more at higher thresholds; counted from 1, ``max_non_zero + 1`` would stay.) With max_non_zero = 2 this
gives the "true sparsity" of window pruning in Table 1: 7 of 9 at thresholds 0.2 to 0.6 and 8 of 9 at 0.8 in
the 3x3 kernels, which hold 48% of ResNet-50's convolution weights, and CK in the others make 0.48, 0.58,
0.69 and 0.84, as printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from clicktrain.sparsity.finalize import best_patterns
from clicktrain.sparsity.guard import guard_of, returned
from clicktrain.sparsity.patterns import MAX_POSITIONS
from clicktrain.sparsity.registry import Registry

Within = Literal["channel", "filter"]
"""Whose kernels compete in CK pruning. ``channel``: the F kernels that read one input channel, as Algorithm 1
has it; filters end with unequal numbers of kernels and may lose all. ``filter``: the C kernels of one filter,
so that all filters keep equally many."""

Shape = tuple[int, int, int, int]

_NOISE = 1e-9
"""Shares closer than this are equal: 0.7 * 10 must not become 6."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a layer goes.

    ``positions`` of every kernel and ``kernels`` of every line, a line being the kernels that compete
    (`Within`). Ties may take more.
    """

    positions: int
    kernels: int

    def sparsity(self, shape: Shape, within: Within = "channel") -> float:
        """Share of the layer's weights that goes; no kernel count depends on which weights go inside."""
        kept = (1 - self.positions / _size(shape)) * (1 - self.kernels / _line(shape, within))
        return 1 - kept


def num_pruned(size: int, threshold: float, max_non_zero: int | None = None) -> int:
    """How many of ``size`` weights of a kernel, or kernels of a line, go: n + 1 of Algorithms 1 and 3.

    0 at threshold 0, where Algorithm 2 does not prune yet. At least one always stays (the algorithms would
    take a 3x3 kernel whole from a threshold of 8/9 on), and ``max_non_zero`` at the most.
    """
    if threshold <= 0:
        return 0
    index = math.floor(size * threshold + _NOISE)
    if max_non_zero is not None:
        index = max(index, size - max_non_zero - 1)
    return min(index + 1, size - 1)


def above_cutoff(scores: Tensor, pruned: int, dim: int = -1) -> Tensor:
    """Keep what is strictly above the ``pruned`` smallest scores along a dimension: bool of the same shape.

    What ties with the largest pruned score is pruned too; 0 keeps everything.
    """
    if pruned == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.shape[dim] <= MAX_POSITIONS and scores.numel() > scores.shape[dim] ** 2:
        return scores > _kth_of_few(scores.movedim(dim, 0), pruned).unsqueeze(dim)
    return scores > scores.kthvalue(pruned, dim=dim, keepdim=True).values


def _kth_of_few(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest along the first, short dimension: [size, ...] -> [...].

    Passes of pairwise minima and maxima over whole rows, from the nearer end: ``kthvalue`` selects in every
    kernel by itself, which is slow for nine positions.
    """
    rows = list(torch.stack(scores.unbind(0)).unbind(0))  # contiguous() would copy element by element
    pick, leave, passes = torch.minimum, torch.maximum, k
    if len(rows) - k + 1 < k:
        pick, leave, passes = torch.maximum, torch.minimum, len(rows) - k + 1
    best = rows[0]
    for _ in range(passes):
        best, *others = rows
        rows = []
        for other in others:
            rows.append(leave(best, other))
            best = pick(best, other)
    return best


# ---- how much: one cut per granularity ------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CutRule:
    """What a granularity may read beside shape and threshold; settings as in Campfire.

    Attributes:
        within: whose kernels compete.
        share: of the threshold that combined pruning takes inside kernels.
        most: weights of a kernel that may stay.
        ck_threshold: see `inter_epoch_cut`.
    """

    within: Within = "channel"
    share: float = 0.8
    most: int | None = None
    ck_threshold: float = 1.0


Granularity: TypeAlias = Callable[[Shape, float, CutRule], Cut]
"""(shape of a convolution's view, threshold, rule) -> how much goes."""


def window_cut(shape: Shape, threshold: float, rule: CutRule) -> Cut:
    """Window pruning (Algorithm 3): the smallest of each R x S kernel."""
    return Cut(num_pruned(_size(shape), threshold, rule.most), 0)


def ck_cut(shape: Shape, threshold: float, rule: CutRule) -> Cut:
    """CK pruning (Algorithm 1): whole kernels by their largest score."""
    return Cut(0, num_pruned(_line(shape, rule.within), threshold))


def combined_cut(shape: Shape, threshold: float, rule: CutRule) -> Cut:
    """Combined pruning: window at a share of the threshold, then CK for the rest (section 2.1.1).

    "The remaining fraction" is read as what brings the layer to the threshold, given what the window takes:
    CK at ``(1 - share) * threshold`` would leave a final sparsity of 80% at 72%. (Algorithm 4 prints the full
    threshold and CK for both masks.)
    """
    positions = num_pruned(_size(shape), rule.share * threshold, rule.most)
    rest = remaining(threshold, positions / _size(shape))
    return Cut(positions, ck_cut(shape, rest, rule).kernels)


def inter_epoch_cut(shape: Shape, threshold: float, rule: CutRule) -> Cut:
    """Inter-epoch pruning (appendix A): an era split into a CK phase and a window phase.

    The paper says no more. Here CK follows the schedule up to ``ck_threshold``, its value at the middle of
    the era; from there on the number of kernels stays and the window takes the rest.
    """
    kernels = ck_cut(shape, min(threshold, rule.ck_threshold), rule).kernels
    if threshold <= rule.ck_threshold:
        return Cut(0, kernels)
    rest = remaining(threshold, kernels / _line(shape, rule.within))
    return Cut(num_pruned(_size(shape), rest), kernels)


def pattern_cut(shape: Shape, threshold: float, rule: CutRule) -> Cut:
    """As combined pruning, but what stays inside a kernel is a pattern."""
    return combined_cut(shape, threshold, rule)


pattern_cut.in_patterns = True  # type: ignore[attr-defined]


def _problem(value: Any, shape: Shape, threshold: float, rule: CutRule) -> str | None:
    del threshold
    if not isinstance(value, Cut) or not all(isinstance(n, int) for n in (value.positions, value.kernels)):
        return returned(value)
    size, line = _size(shape), _line(shape, rule.within)
    fits = 0 <= value.positions < size and 0 <= value.kernels < line
    return None if fits else f"{returned(value)} for kernels of {size} positions, {line} in a line"


def _try(cut: Granularity, layers: Sequence[Any]) -> None:
    """Kernels of one position fall under CK whatever the granularity."""
    if shapes := [layer.view_shape for layer in layers if _size(layer.view_shape) > 1]:
        cut(min(shapes, key=math.prod), 0.5, CutRule())


GRANULARITIES: Registry[Granularity] = Registry(
    "granularity",
    {
        "window": window_cut,
        "ck": ck_cut,
        "combined": combined_cut,
        "inter_epoch": inter_epoch_cut,
        "pattern": pattern_cut,
    },
    guard=guard_of(
        "granularity",
        "a function (shape [F, C, R, S], threshold, CutRule) -> Cut(positions, kernels)",
        _problem,
    ),
    trial=_try,
)
"""What goes inside of convolutions. With an attribute ``in_patterns`` what stays of a kernel is a pattern."""
GranularityChoice: TypeAlias = Annotated[str | Granularity, GRANULARITIES]


def cut_of(granularity: str | Granularity, shape: Shape, threshold: float, rule: CutRule) -> Cut:
    """How much of a convolution goes; kernels of one position fall under CK (section 2.1)."""
    choice = ck_cut if _size(shape) == 1 else GRANULARITIES.resolve(granularity)
    return choice(shape, threshold, rule)


def remaining(threshold: float, done: float) -> float:
    """Share of what is left that has to go, so that ``threshold`` of the whole is gone."""
    rest = 1 - (1 - threshold) / (1 - done)
    return rest if rest > _NOISE else 0.0


# ---- what: masks ----------------------------------------------------------------------------


def cut_mask(
    scores: Tensor, cut: Cut, within: Within = "channel", pool_masks: Tensor | None = None
) -> Tensor:
    """Apply a cut to scores: [F, C, R, S] -> bool, True = kept.

    A kernel is ranked by the largest of its scores (Algorithm 1), so pruning inside it changes no rank. With
    ``pool_masks``, bool [P, R, S] of ``R * S - cut.positions`` positions, what stays inside a kernel has the
    shape of its best pattern (ClickTrain section 4.1) instead of being its largest scores.
    """
    if pool_masks is None:
        mask = above_cutoff(scores.flatten(2), cut.positions).view(scores.shape)
    else:
        mask = pool_masks.to(scores.device)[best_patterns(scores, pool_masks)]
    if cut.kernels == 0:
        return mask
    kernels = above_cutoff(scores.amax(dim=(2, 3)), cut.kernels, dim=0 if within == "channel" else 1)
    return mask & kernels[:, :, None, None]


def _size(shape: Shape) -> int:
    """Positions of a kernel."""
    return shape[2] * shape[3]


def _line(shape: Shape, within: Within) -> int:
    """Kernels that compete in CK pruning."""
    return shape[0] if within == "channel" else shape[1]
