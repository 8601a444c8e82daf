"""Adaptive finalization of patterns and kernels: ClickTrain section 4.3."""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.sparsity.importance import pattern_scores


def best_patterns(importance: Tensor, pool_masks: Tensor) -> Tensor:
    """The best pattern of a pool for each kernel (section 4.1): [F, C, R, S], [P, R, S] -> int64 [F, C].

    Ties go to the lowest index.
    """
    return pattern_scores(importance, pool_masks).argmax(dim=-1)


def add_pattern_votes_(counts: Tensor, importance: Tensor, pool_masks: Tensor, weight: Tensor) -> None:
    """Count one occurrence of each kernel's highest-scoring pattern (ClickTrain section 4.3).

    Args:
        counts: int32 [F, C, P], changed in place.
        importance: [F, C, R, S] of this batch.
        pool_masks: [P, R, S].
        weight: 0-dim tensor, 1 if the batch counts and 0 if the loss margin rejects it; a tensor, so that
            no device has to wait for the loss.
    """
    best = best_patterns(importance, pool_masks)
    counts.scatter_add_(-1, best[..., None], weight.to(counts.dtype).expand(*best.shape, 1))


def batch_counts(previous: Tensor | None, current: Tensor, margin: float, rule: str) -> Tensor:
    """Whether a batch may vote: the training-loss margin of ClickTrain section 4.3.

    The paper's sentence, "if the loss in the previous batch divided by the value in the current batch is
    smaller than 0.0018, we will not count", taken literally (rule ``"ratio"``) rejects a batch only when the
    loss has grown 556-fold. Its purpose, "to avoid selecting patterns in the batches where the loss is
    obviously increasing", is met by the other reading (rule ``"increase"``): rejected when the loss is more
    than ``margin`` above the previous one, relatively.

    Returns:
        0-dim float tensor, 1 = counts, 0 = rejected. The first batch counts.
    """
    if previous is None:
        return torch.ones_like(current)
    if rule == "ratio":
        return 1 - (previous / current < margin).to(current.dtype)
    if rule == "increase":
        return 1 - (current > previous * (1 + margin)).to(current.dtype)
    raise ValueError(f"loss margin rule must be 'ratio' or 'increase', got {rule!r}")


def keep_kernels(scores: Tensor, kernels: int) -> Tensor:
    """Keep in every filter the same number of kernels, the best: scores [F, C] -> bool [F, C].

    Ties go to the lowest channel. Equal numbers per filter are the load balance that ClickTrain section 5.2
    asks of the algorithm.
    """
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kernels]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def keep_kernels_alike(scores: Tensor, kernels: int, group: int, similar: bool) -> Tensor:
    """As `keep_kernels`, the same channels in each ``group`` of filters: those with the largest sums.

    Groups are of neighbors, or of filters that want ``similar`` channels; F is a multiple of ``group``.
    """
    neighbors = torch.arange(len(scores), device=scores.device)
    order = similar_filters(scores, kernels, group) if similar else neighbors
    sums = scores[order].view(-1, group, scores.shape[1]).sum(1)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[order] = keep_kernels(sums, kernels).repeat_interleave(group, 0)
    return kept


def similar_filters(scores: Tensor, kernels: int, group: int) -> Tensor:
    """An order of the filters, int64 [F], in which each ``group`` in a row wants similar channels.

    A filter wants the channels that it would keep alone, ``kernels`` of them, by their scores [F, C]. The one
    with the largest sum of scores that is left begins a group, and those go with it whose wishes have the
    largest cosine with its own; ties go to the lowest number. On the CPU, so that all processes agree.
    """
    own = scores.detach().double().cpu()
    wants = torch.where(keep_kernels(own, kernels), own, 0.0)
    wants = wants / wants.norm(dim=1, keepdim=True).clamp_min(1e-300)
    alike = wants @ wants.T
    first = torch.sort(own.sum(1), descending=True, stable=True).indices.tolist()
    left = torch.ones(len(own), dtype=torch.bool)
    order: list[int] = []
    for begins in first:
        if left[begins]:
            left[begins] = False
            near = torch.where(left, alike[begins], -1.0)
            others = torch.sort(near, descending=True, stable=True).indices[: group - 1]
            left[others] = False
            order += [begins, *others.tolist()]
    return torch.tensor(order, device=scores.device)


def chosen_scores(importance: Tensor, pool_masks: Tensor, pattern_id: Tensor) -> Tensor:
    """Score of each kernel inside its chosen pattern: [F, C]."""
    return pattern_scores(importance, pool_masks).gather(-1, pattern_id[..., None]).squeeze(-1)


def pattern_mask(pattern_id: Tensor, kept: Tensor, pool_masks: Tensor, group: int = 1) -> Tensor:
    """Expand patterns and kept kernels to a mask: bool [F, C, R, S], True = kept.

    ``pattern_id`` and ``kept`` are [F / group, C], as ``group`` filters share a row; the pool is [P, R, S].
    """
    mask = pool_masks.to(kept.device)[pattern_id] & kept[..., None, None]
    return mask.repeat_interleave(group, dim=0) if group > 1 else mask
