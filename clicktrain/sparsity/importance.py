"""Importance criteria: how much a weight, a pattern or a kernel matters.

A criterion maps (weight, gradient) to one score per weight, larger = keep. Patterns and kernels are scored
by summing weights' scores, so every criterion serves every granularity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def taylor_importance(weight: Tensor, grad: Tensor) -> Tensor:
    """``(g * w)^2`` per weight: the first-order Taylor estimate of ClickTrain section 4.1, Eq. (1).

    Args:
        weight: [F, C, R, S].
        grad: [F, C, R, S], gradient of the loss, already averaged over ranks.
    """
    return (weight * grad).square_()


def magnitude_importance(weight: Tensor, grad: Tensor) -> Tensor:
    """``w^2`` per weight: what pruning after training uses (ClickTrain section 4.1)."""
    del grad
    return weight.square()


def mixed_importance(weight: Tensor, grad: Tensor) -> Tensor:
    """``|g| * w^2`` per weight: the geometric mean of the Taylor and the magnitude criterion.

    Not in the paper; a middle way between the two for gradients that are noisy.
    """
    return weight.square().mul_(grad.abs())


CRITERIA: dict[str, Criterion] = {
    "taylor": taylor_importance,
    "magnitude": magnitude_importance,
    "mixed": mixed_importance,
}


def pattern_scores(importance: Tensor, pool_masks: Tensor) -> Tensor:
    """Score every pattern of a pool for every kernel: ClickTrain Eq. (1).

    Args:
        importance: [F, C, R, S], one score per weight.
        pool_masks: [P, R, S], bool or float.

    Returns:
        [F, C, P]: the sum of the scores at the kept positions. Compare within one kernel only.
    """
    f, c, r, s = importance.shape
    table = pool_masks.reshape(-1, r * s).to(device=importance.device, dtype=importance.dtype)
    return (importance.reshape(f * c, r * s) @ table.T).view(f, c, -1)


def kernel_scores(importance: Tensor) -> Tensor:
    """Score every kernel over all its positions: ClickTrain Eq. (2). [F, C, R, S] -> [F, C]."""
    return importance.sum(dim=(2, 3))


def group_sum(importance: Tensor, group: int) -> Tensor:
    """Sum scores over groups of neighbouring filters that share their decisions.

    Args:
        importance: [F, ...].
        group: filters per group; must divide F. 1 leaves the tensor as it is (the paper's case).

    Returns:
        [F / group, ...].
    """
    if group == 1:
        return importance
    return importance.reshape(-1, group, *importance.shape[1:]).sum(dim=1)
