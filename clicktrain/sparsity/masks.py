"""Masks that are fixed: writing the zeros and keeping them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

KeptWeights: TypeAlias = tuple[int, int | None]
"""Nonzero weights of a layer, and of each of its filters (None if filters differ)."""


def hard_prune_(weight: Tensor, mask: Tensor) -> None:
    """Write the zeros: ClickTrain Figure 4, "hard pruning"."""
    weight.masked_fill_(~mask, 0.0)


def mask_optimizer_state_(optimizer: Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Zero the pruned positions in whatever the optimizer keeps per element (momentum, moments).

    With weight, gradient and state at zero no first-order optimizer moves a pruned weight again.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(~mask, 0.0)


def conv_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of convolutions: those with kernels of one dimension or more, [F, C, ...]."""
    return {name: mask for name, mask in masks.items() if mask.dim() > 2}


def kept_weights(mask: Tensor) -> KeptWeights:
    """Count what a mask, bool [F, ...], keeps."""
    counts = mask.flatten(1).sum(dim=1)
    per_filter = int(counts[0]) if len(counts) and bool((counts == counts[0]).all()) else None
    return int(counts.sum()), per_filter


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Share of the weights of some layers that is masked."""
    weights = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / max(weights, 1)


def energy_outside(weight: Tensor, mask: Tensor) -> tuple[float, float]:
    """Squared norm outside the mask, and in all: what a hard prune would destroy."""
    squares = weight.detach().square()
    return float(squares.masked_fill(mask, 0.0).sum(dtype=torch.float64)), float(
        squares.sum(dtype=torch.float64)
    )
