"""Importance of whole channels (neurons), and their ranking over a network: When to Prune?, section 3.1.

Filters that can only go together, such as those of one residual stage, are one neuron. An equation is then
taken over the union of their weights: the norm of Eq. (2) divides by the number of all of them (a mean, so
that neurons of different size stay comparable, which is what its root is for), and the sum of Eq. (3) runs
over all of them (a sum, because it estimates what the loss does when all of them go). With one filter both
are the paper's equations.

Scores of a batch are accumulated as they are, absolute values and not squares: section 3.1 finds L1 slightly
better than the L2 of its reference [29]. Larger = keep.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def filter_magnitude(filters: Sequence[Tensor]) -> Tensor:
    """``||W_n||_2 / sqrt(P)``: When to Prune?, Eq. (2).

    From [n, P_l] per coupled layer, whose row n holds the weights of neuron n there, to [n]; P sums all P_l.
    """
    squares = [weights.square().sum(dim=1) for weights in filters]
    return (torch.stack(squares).sum(dim=0) / sum(weights.shape[1] for weights in filters)).sqrt()


def filter_taylor(filters: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """``|sum over w in W_n of g_w * w|``, [n, P_l] per coupled layer -> [n]: When to Prune?, Eq. (3).

    In front of a batch norm this is about zero, because the loss does not depend on the size of such a
    filter: use `batch_norm_taylor` there, as the paper does.
    """
    return _signed_change(filters, grads).abs_()


def batch_norm_taylor(
    scales: Sequence[Tensor], scale_grads: Sequence[Tensor], shifts: Sequence[Tensor],
    shift_grads: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """``|g_gamma * gamma + g_beta * beta|``: section 3.1, after its reference [29].

    From scales, shifts and gradients [n, k] per coupled batch norm (k = 1 as a rule) to [n].
    """
    return _signed_change([*scales, *shifts], [*scale_grads, *shift_grads]).abs_()


def _signed_change(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    products = [(w * g).sum(dim=1) for w, g in zip(weights, grads, strict=True)]
    return torch.stack(products).sum(dim=0)


def prunable_channels(
    sizes: Mapping[str, int], min_channels: int = 1, weights: Mapping[str, int] | None = None
) -> int:
    """How many neurons can go at the most if every group keeps ``min_channels`` of its ``sizes``.

    With ``weights`` a neuron counts as often as its group says, once for each of its filters.
    """
    return sum(
        max(size - min_channels, 0) * (1 if weights is None else weights[name])
        for name, size in sizes.items()
    )


def count_gone(masks: Mapping[str, Tensor], weights: Mapping[str, int] | None = None) -> int:
    """Neurons that masks, True = kept, prune; with ``weights`` as in `prunable_channels`."""
    return sum(int((~mask).sum()) * (1 if weights is None else weights[name]) for name, mask in masks.items())


def rank_channels(
    scores: Mapping[str, Tensor],
    num_pruned: int,
    min_channels: int = 1,
    kept: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Prune the bottom-ranked neurons of a network, whatever layer they are in: section 3.1, Algorithm 1.

    Ties go in the order of groups and channels, the first is pruned first. A neuron whose group is down to
    ``min_channels`` is passed over.

    Args:
        scores: group -> [n], larger = keep.
        num_pruned: neurons that are pruned afterwards, those of ``kept`` included.
        min_channels: neurons that every group keeps.
        kept: group -> bool [n]; what is False has been pruned before and stays so.
        weights: group -> how many filters a neuron is; ``num_pruned`` then counts filters.

    Returns:
        group -> bool [n] on the CPU, True = kept; exactly ``num_pruned`` are False, or with weights the
        first that are at least ``num_pruned`` filters.

    Raises:
        ValueError: that many cannot be pruned, or fewer than there are already.

    Examples:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 1.0, 0.5])}
        >>> {name: mask.tolist() for name, mask in rank_channels(scores, 2).items()}
        {'a': [True, False], 'b': [True, True, False]}
    """
    ranked = pruning_order(scores, min_channels, kept)
    pruned = [0]
    for name, _ in ranked:
        pruned.append(pruned[-1] + (1 if weights is None else weights[name]))
    gone = count_gone(kept or {}, weights)
    if not gone <= num_pruned <= pruned[-1]:
        raise ValueError(f"{num_pruned} neurons cannot be pruned: {gone} are, {pruned[-1]} can be")
    first = ranked[: bisect.bisect_left(pruned, num_pruned)]
    return masks_after(first, {name: len(score) for name, score in scores.items()})


def pruning_order(
    scores: Mapping[str, Tensor], min_channels: int = 1, kept: Mapping[str, Tensor] | None = None
) -> list[tuple[str, int]]:
    """All neurons that may go, (group, channel), in the order in which `rank_channels` prunes them."""
    order: list[tuple[float, int, int]] = []
    names = list(scores)
    for number, name in enumerate(names):
        values = scores[name].detach().double().cpu()
        if kept is not None:
            values = values.masked_fill(~kept[name].cpu(), -torch.inf)
        rising = torch.sort(values, stable=True).indices.tolist()
        flat = values.tolist()
        order += [(flat[i], number, i) for i in rising[: max(len(rising) - min_channels, 0)]]
    return [(names[number], channel) for _, number, channel in sorted(order)]


def masks_after(pruned: Iterable[tuple[str, int]], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Masks of groups of these sizes once some neurons, (group, channel), are pruned; True = kept."""
    masks = {name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}
    for name, channel in pruned:
        masks[name][channel] = False
    return masks


def round_widths(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], multiple: int
) -> dict[str, Tensor]:
    """The nearest widths that are multiples, by pruning or keeping the neurons that are next in rank.

    Masks, bool, and scores are [n] per group. Groups of no more than ``multiple`` neurons stay whole.
    """
    rounded = {}
    for name, mask in masks.items():
        size, kept = len(mask), int(mask.sum())
        wanted = max(multiple, (kept + multiple // 2) // multiple * multiple)
        if multiple == 1 or kept == size:
            rounded[name] = mask
            continue
        values, stays = scores[name].detach().double().cpu().tolist(), mask.tolist()
        order = sorted(range(size), key=lambda i: (stays[i], values[i], i))
        rounded[name] = torch.ones_like(mask)
        rounded[name][order[: max(size - wanted, 0)]] = False
    return rounded
