"""Axes of ClickTrain: how kernels are allocated over layers, and the penalty of stage 4.

A new choice is a function here, or a small frozen class, and one entry in its table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.methods.patterns.selection import PatternLayer
from clicktrain.sparsity.allocation import kernel_gains
from clicktrain.sparsity.distributions import erdos_renyi_scale
from clicktrain.sparsity.group_lasso import add_lasso_gradient_, shrink_groups_
from clicktrain.sparsity.guard import guard_of, returned, score_problem
from clicktrain.sparsity.registry import Registry, smallest


@dataclass(frozen=True, slots=True)
class Allocation:
    """How kernels are allocated over layers.

    Attributes:
        gains: (layer, scores [F/G, C]) -> [C], worth of the 1st, 2nd, ... kernel of every filter, for
            `clicktrain.sparsity.allocation.allocate`; None: equal densities.
        by_time: whether gains are bought with milliseconds where a latency is the target; else with weights.
    """

    gains: Callable[[PatternLayer, Tensor], Tensor] | None
    by_time: bool = True


def importance_gains(layer: PatternLayer, scores: Tensor) -> Tensor:
    """The measured scores: a first-order Taylor estimate compares over layers."""
    del layer
    return kernel_gains(scores)


def relative_gains(layer: PatternLayer, scores: Tensor) -> Tensor:
    """The scores over their layer's mean."""
    # Scores of a group are sums over its filters; relative to their mean they are not any more.
    return kernel_gains(scores, normalize=True) * layer.group


def share_gains(layer: PatternLayer, scores: Tensor) -> Tensor:
    """The scores over their layer's sum, so that every layer is worth the same as a whole."""
    del layer
    return kernel_gains(scores, normalize=True) / scores.numel()


def erk_gains(layer: PatternLayer, scores: Tensor) -> Tensor:
    """Densities in proportion to (F + C + R + S) / (F C R S) (Evci et al. 2020, RigL, section 3)."""
    del scores
    _, c, r, s = layer.shape
    kernels = torch.arange(1, c + 1, dtype=torch.float64) - 0.5
    density = kernels * layer.entries / (c * r * s)
    return -density / erdos_renyi_scale(layer.shape) * layer.budget.price


_GAINS = guard_of(
    "allocation",
    "a function (PatternLayer, scores [filters, channels]) -> worth of the 1st, 2nd, ... kernel [channels]",
    lambda value, layer, scores: score_problem(value, scores.shape[1:]),
    keeps=(1,),
)


def _own_allocation(name: str, own: Any) -> Allocation:
    allocation = own if isinstance(own, Allocation) else Allocation(own)
    return (
        allocation if allocation.gains is None else replace(allocation, gains=_GAINS(name, allocation.gains))
    )


def _try_allocation(allocation: Allocation, layers: Sequence[Any]) -> None:
    f, c, r, s = (layer := smallest(layers)).view_shape
    if allocation.gains is not None:
        allocation.gains(
            PatternLayer(layer, max(r * s // 2, 1), 1), torch.ones(f, c, device=layer.weight.device)
        )


ALLOCATIONS: Registry[Allocation] = Registry("allocation", {
    "uniform": Allocation(None, by_time=False),
    "importance": Allocation(importance_gains),
    "relative": Allocation(relative_gains),
    "share": Allocation(share_gains),
    "erk": Allocation(erk_gains, by_time=False),
}, group="clicktrain.allocations",
   guard=_own_allocation, fits=lambda own: callable(own) or isinstance(own, Allocation),
   trial=_try_allocation)  # fmt: skip
"""A user's own is a function like `share_gains`."""
AllocationChoice: TypeAlias = Annotated[str | Callable[..., Any], ALLOCATIONS]


def allocation_gains(
    layers: Sequence[PatternLayer], scores: Mapping[str, Tensor], allocation: Allocation
) -> dict[str, Tensor] | None:
    """Gains of every layer; None: equal densities."""
    if allocation.gains is None:
        return None
    return {layer.name: allocation.gains(layer, scores[layer.name]) for layer in layers}


@dataclass(frozen=True, slots=True)
class Penalty:
    """What pushes weights outside the masks towards zero before the hard prune; tensors are [F, C, R, S].

    Attributes:
        gradient: (gradient, weight, mask, coefficient): adds to the gradient, before the optimizer's step.
        step: (weight, mask, steps left): changes the weight, after the optimizer's step.
    """

    gradient: Callable[[Tensor, Tensor, Tensor, float | Tensor], None] | None = None
    step: Callable[[Tensor, Tensor, int], None] | None = None


def _push_problem(value: object, *given: Any) -> str | None:
    """A function that works in place returns nothing, or what it has changed."""
    return None if value is None or value is given[0] else returned(value)


_GRADIENT = guard_of(
    "penalty",
    "a function (gradient, weight, mask, coefficient) that adds to the gradient [F, C, R, S] in place",
    _push_problem,
    keeps=(1, 2),
)
_STEP = guard_of(
    "penalty",
    "a function (weight, mask, steps left) that changes the weight [F, C, R, S] in place",
    _push_problem,
    keeps=(1,),
)


def _own_penalty(name: str, own: Any) -> Penalty:
    penalty = own if isinstance(own, Penalty) else Penalty(own)
    return Penalty(
        penalty.gradient and _GRADIENT(name, penalty.gradient), penalty.step and _STEP(name, penalty.step)
    )


def _try_penalty(penalty: Penalty, layers: Sequence[Any]) -> None:
    """UserError where a push is not finite."""
    layer = smallest(layers)
    weight = torch.ones_like(layer.view(layer.weight.detach()), dtype=torch.float32)
    mask, pushed = torch.zeros_like(weight, dtype=torch.bool), torch.zeros_like(weight)
    if penalty.gradient is not None:
        penalty.gradient(pushed, weight, mask, 0.1)
    if penalty.step is not None:
        penalty.step(weight, mask, 2)
    if not bool((pushed + weight).isfinite().all()):
        raise UserError("the penalty makes gradients or weights NaN or infinite")


PENALTIES: Registry[Penalty] = Registry("penalty", {
    "lasso": Penalty(gradient=add_lasso_gradient_),
    "shrink": Penalty(step=shrink_groups_),
    "none": Penalty(),
}, group="clicktrain.penalties",
   guard=_own_penalty, fits=lambda own: callable(own) or isinstance(own, Penalty),
   trial=_try_penalty)  # fmt: skip
"""A user's own is a function like `clicktrain.sparsity.group_lasso.add_lasso_gradient_`."""
PenaltyChoice: TypeAlias = Annotated[str | Callable[..., Any], PENALTIES]
