"""Importance criteria: how much a weight, a pattern or a kernel matters.

A criterion maps (weight, gradient) to one score per weight, 0 or more, larger = keep. Patterns, kernels and
channels are scored by summing the scores of their weights, so every criterion serves every granularity.
A new one is one function::

    @CRITERIA.register("signed")
    def signed_importance(weight, grad):
        return (-weight * grad).clamp_min(0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from clicktrain.sparsity.guard import guard_of, score_problem
from clicktrain.sparsity.registry import Registry, smallest

Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(weight, gradient), both float32 of the layer's own shape -> scores of that shape. With an attribute
``reads_gradient = False`` it is called without waiting for gradients."""


def reads_gradient(criterion: Callable[..., object]) -> bool:
    """Whether a criterion needs gradients; True unless it says otherwise."""
    return bool(getattr(getattr(criterion, "__wrapped__", criterion), "reads_gradient", True))


def _criterion_problem(values: Tensor, weight: Tensor, grad: Tensor) -> str | None:
    wrong = score_problem(values, weight.shape, lowest=0)
    # A run that diverges gives every criterion gradients that are not finite.
    return wrong if wrong is None or bool((weight.isfinite() & grad.isfinite()).all()) else None


def checked_criterion(name: str, criterion: Criterion) -> Criterion:
    """A user's criterion, with a `UserError` where it fails or returns something else than scores."""
    guarded: Criterion = _GUARD(name, criterion)

    @functools.wraps(criterion)
    def scores(weight: Tensor, grad: Tensor) -> Tensor:
        values = guarded(weight, grad)
        # In place on what it was given would change the weights themselves.
        return values.detach().clone() if values is weight or values is grad else values.detach()

    return scores


_GUARD = guard_of(
    "criterion",
    "a function (weight, gradient) -> one floating-point score per weight, finite, 0 or more, larger = keep",
    _criterion_problem,
    keeps=(0, 1),
)


def _try(criterion: Criterion, layers: Sequence[Any]) -> None:
    weight = smallest(layers).weight.detach().float()
    criterion(weight, torch.ones_like(weight))


def taylor_importance(weight: Tensor, grad: Tensor) -> Tensor:
    """``(g * w)^2`` per weight: the first-order Taylor estimate of ClickTrain section 4.1, Eq. (1)."""
    return (weight * grad).square_()


def magnitude_importance(weight: Tensor, grad: Tensor) -> Tensor:
    """``w^2`` per weight: what pruning after training uses (ClickTrain section 4.1)."""
    del grad
    return weight.square()


magnitude_importance.reads_gradient = False  # type: ignore[attr-defined]


def mixed_importance(weight: Tensor, grad: Tensor) -> Tensor:
    """``|g| * w^2`` per weight: the geometric mean of the Taylor and the magnitude criterion.

    Not in the paper; a middle way between the two for gradients that are noisy.
    """
    return weight.square().mul_(grad.abs())


CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    {"taylor": taylor_importance, "magnitude": magnitude_importance, "mixed": mixed_importance},
    group="clicktrain.criteria",
    guard=checked_criterion,
    trial=_try,
)
CriterionChoice: TypeAlias = Annotated[str | Criterion, CRITERIA]
"""The type of a setting ``criterion``."""


def pattern_scores(importance: Tensor, pool_masks: Tensor) -> Tensor:
    """Score a pool's patterns for every kernel: [F, C, R, S], [P, R, S] -> [F, C, P] (ClickTrain Eq. (1)).

    The sums of the scores at the kept positions. Compare within one kernel only.
    """
    f, c, r, s = importance.shape
    table = pool_masks.reshape(-1, r * s).to(device=importance.device, dtype=importance.dtype)
    return (importance.reshape(f * c, r * s) @ table.T).view(f, c, len(table))


def kernel_scores(importance: Tensor) -> Tensor:
    """Score every kernel over all its positions: ClickTrain Eq. (2). [F, C, R, S] -> [F, C]."""
    return importance.sum(dim=(2, 3))


def group_sum(importance: Tensor, group: int) -> Tensor:
    """Sum scores [F, ...] over ``group`` neighboring filters that share their decisions: [F / group, ...]."""
    if group == 1:
        return importance
    return importance.reshape(-1, group, *importance.shape[1:]).sum(dim=1)
