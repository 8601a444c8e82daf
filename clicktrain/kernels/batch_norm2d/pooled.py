"""Max pooling, batch norm, residual and activation as one operator; conventions as in `batch_norm2d.ops`.

Memory sees what is as large as the images once in each direction, and of what is kept for the backward pass
nothing is larger than the maxima.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clicktrain.kernels.batch_norm2d import launch
from clicktrain.kernels.batch_norm2d.ops import Four, declared, residual_gradient, saved_beside
from clicktrain.kernels.direct import differentiable, plain
from clicktrain.kernels.max_pool2d.ops import tap_type

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("clicktrain::max_pool2d_batch_norm2d_blocked", mutates_args=())
def max_pool2d_batch_norm2d_blocked_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    ceil: bool,
    n: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`batch_norm2d_blocked` of ``max_pool2d_blocked(x, window, ceil)``.

    Returns:
        The result [B, C, H', W', V]; the maxima and their taps, mean and biased variance of the maxima, all
        without gradient.
    """
    return launch.pooled_forward(x, weight, bias, residual, window, ceil, n, eps, activation)


@max_pool2d_batch_norm2d_blocked_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    ceil: bool,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = launch.pooled_shape(x, window, ceil)
    taps = x.new_empty(shape, dtype=tap_type(shape[4]))
    return x.new_empty(shape), x.new_empty(shape), taps, launch.per_channel(x), launch.per_channel(x)


@torch.library.custom_op("clicktrain::max_pool2d_batch_norm2d_blocked_given", mutates_args=())
def max_pool2d_batch_norm2d_blocked_given_op(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    ceil: bool,
    n: int,
    eps: float,
    activation: str,
) -> Tensor:
    """The same with statistics that are known: for evaluation, without gradients."""
    return launch.pooled_given(x, mean, var, weight, bias, residual, window, ceil, n, eps, activation)


@max_pool2d_batch_norm2d_blocked_given_op.register_fake
def _(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    ceil: bool,
    *_: object,
) -> Tensor:
    return x.new_empty(launch.pooled_shape(x, window, ceil))


def _run_backward(
    gy: Tensor,
    maxima: Tensor,
    taps: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    n: int,
    eps: float,
    activation: str,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input [B, C, *size, V], weight, bias and residual, the last as of batch norm."""
    blocked = gy, maxima, taps, y, residual
    parameters = weight, bias, mean, var
    return launch.pooled_backward(*blocked, *parameters, size, window, n, eps, activation, need_residual)


max_pool2d_batch_norm2d_blocked_backward_op = torch.library.custom_op(
    "clicktrain::max_pool2d_batch_norm2d_blocked_backward", _run_backward, mutates_args=()
)
_backward_of = plain(max_pool2d_batch_norm2d_blocked_backward_op, _run_backward)


@max_pool2d_batch_norm2d_blocked_backward_op.register_fake
def _(gy: Tensor, *rest: Any) -> Four:
    size, activation, need_residual = rest[8], rest[-2], rest[-1]
    gx = gy.new_empty((*gy.shape[:2], *size, gy.shape[4]))
    return gx, *declared(gy, activation, False, need_residual)[1:]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    x, weight, bias, residual, ctx.window, _, ctx.n, ctx.eps, ctx.activation = inputs
    y, maxima, taps, mean, var = output
    ctx.mark_non_differentiable(maxima, taps, mean, var)
    ctx.size = list(x.shape[2:4])
    beside = saved_beside(ctx.activation, y, residual)
    ctx.save_for_backward(maxima, taps, *beside, weight, bias, mean, var)


def _backward(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    rest = ctx.size, ctx.window, ctx.n, ctx.eps, ctx.activation, need_residual
    gx, gweight, gbias, gr = _backward_of(gy, *ctx.saved_tensors, *rest)
    residual = residual_gradient(ctx.activation, gy, gr) if need_residual else None
    gradients = gx if need_x else None, gweight if need_weight else None, gbias if need_bias else None
    return *gradients, residual, None, None, None, None, None


max_pool2d_batch_norm2d_blocked_op.register_autograd(_backward, setup_context=_save)
max_pool2d_batch_norm2d_blocked = differentiable(
    max_pool2d_batch_norm2d_blocked_op, launch.pooled_forward, _save, _backward
)
max_pool2d_batch_norm2d_blocked_given = plain(max_pool2d_batch_norm2d_blocked_given_op, launch.pooled_given)
