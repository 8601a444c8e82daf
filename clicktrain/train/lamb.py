"""LAMB, an optimizer for large batches (You et al. 2020, arXiv:1904.00962, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from clicktrain.errors import UserError


class Lamb(Optimizer):
    """Adam whose step on each parameter is scaled to the parameter's norm.

    With ``r = m / (sqrt(v) + eps)`` of bias-corrected averages of the gradient and its square, a step is
    ``x -= lr * |x| / |r + weight_decay x| * (r + weight_decay x)``, with Euclidean norms of whole parameters
    and a factor of 1 where one of them is zero. The norms of packed values and of masked weights are the
    same. In a group with ``adapt`` off the factor is 1: for batch norm parameters and biases, which begin
    at zero or one and would hardly move, as Wightman et al. 2021 trained.

    Nothing bounds the norm of the gradient here (`torch.nn.utils.clip_grad_norm_` does).
    """

    copies_of_weights: ClassVar[int] = 2
    """Tensors of a parameter's size in its state, which estimates of memory count."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
    ) -> None:
        """Take parameters or groups of them; UserError for a setting out of range."""
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} of LAMB is {value}: must be at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"betas of LAMB are {betas}: must be at least 0 and below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; ``closure`` computes loss and gradients again, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                self._step(group, trained)
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        states = [self._state_of(p) for p in params]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        steps = [float(state["step"]) for state in states]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(scale, group["eps"])
        update = torch._foreach_div(means, [1 - beta1**step for step in steps])
        torch._foreach_div_(update, scale)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
        if group["adapt"]:
            _foreach_scale_(update, torch._foreach_norm(params), torch._foreach_norm(update))
        torch._foreach_add_(params, update, alpha=-group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # on the CPU: reading it waits for nobody
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _foreach_scale_(updates: Iterable[Tensor], norms: Iterable[Tensor], own: Iterable[Tensor]) -> None:
    """Multiply each update by the parameter's norm over its own, where neither is zero."""
    for update, norm, length in zip(updates, norms, own, strict=True):
        update.mul_(torch.where((norm > 0) & (length > 0), norm / length, 1.0))
