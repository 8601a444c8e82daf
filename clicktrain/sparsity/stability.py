"""The early pruning indicator: is the structure of what would be kept stable? When to Prune?, section 3.3.

A structure says how many neurons (or kernels) of each layer belong to the best of the network. Filters that
can only go together count as one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Structure: TypeAlias = Sequence[int]
"""Kept neurons per layer, always in the same order of layers."""

GRADIENT_THRESHOLD = 0.944
"""tau for the gradient criterion, all networks and ratios (section 4.2)."""
MAGNITUDE_THRESHOLD = 0.983
"""tau for the magnitude criterion."""
NOT_LOWER_THAN = 5
"""EPI must not be lower than in this many epochs before (Algorithm 2, line 9)."""


def layer_distance(first: int, second: int) -> float:
    """``|n1 - n2| / (n1 + n2)``, from 0 to 1: Eq. (4). A layer that is empty in both has not changed: 0."""
    return abs(first - second) / (first + second) if first or second else 0.0


def structure_similarity(first: Structure, second: Structure) -> float:
    """``1 - mean over layers of the distance``, from 0 to 1: Eq. (5).

    Example:
        >>> structure_similarity([4, 4], [6, 2])
        0.7333333333333334
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"structures of {len(first)} and {len(second)} layers cannot be compared")
    distances = [layer_distance(a, b) for a, b in zip(first, second, strict=True)]
    return 1 - sum(distances) / len(distances)


def early_pruning_indicator(structures: Sequence[Structure], window: int) -> float | None:
    """Mean similarity of the last structure to those of the r epochs before, ``window``: Eq. (6).

    None while there are fewer.
    """
    if len(structures) <= window:
        return None
    now, before = structures[-1], structures[-1 - window : -1]
    return sum(structure_similarity(now, past) for past in before) / window


def kept_kernels(scores: Mapping[str, Tensor], share: float) -> list[int]:
    """The structure of a network of kernels: how many of each layer are among this share of the best of all.

    Scores compare over layers, larger = keep; ties go to the first.
    """
    flat = torch.cat([score.detach().float().flatten() for score in scores.values()])
    owner = torch.cat(
        [torch.full((score.numel(),), number) for number, score in enumerate(scores.values())]
    ).to(flat.device)
    best = torch.sort(flat, descending=True, stable=True).indices[: max(1, round(share * flat.numel()))]
    counts: list[int] = torch.bincount(owner[best], minlength=len(scores)).tolist()
    return counts
