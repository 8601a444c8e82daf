"""The operators that PyTorch sees: batch norm and scaling by channel, each with residual and ReLU.

Shapes and gradients are declared, so that they work under autograd, ``torch.compile`` and ``torch.export``.
Activations are ``[B, C, H, W, V]`` with B = ceil(n / V). The padding lanes of the last block may hold
anything in ``x``, ``residual`` and results; gradients have zeros there.

Activations and their gradients have one dtype; numbers per channel and their gradients have the computed one:
float32 for bfloat16 activations, else the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.batch_norm2d import launch
from clicktrain.kernels.direct import differentiable, plain


@torch.library.custom_op("clicktrain::batch_norm2d_blocked", mutates_args=())
def batch_norm2d_blocked_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training mode: ``relu?((x - mean) / sqrt(var + eps) * weight + bias + residual)``.

    Args:
        x: [B, C, H, W, V], float32, float64 or bfloat16, V the vector lanes of that type.
        weight, bias: [C], or None for ones and zeros.
        residual: like ``x``, or None.
        n: images in the batch.
        eps: what is added to the variance.
        relu: whether negative results become zero.

    Returns:
        The result like ``x``; mean and biased variance [C] over n x H x W numbers, both without gradient.
    """
    return launch.forward(x, weight, bias, residual, n, eps, relu)


@batch_norm2d_blocked_op.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), launch.per_channel(x), launch.per_channel(x)


@torch.library.custom_op("clicktrain::batch_norm2d_blocked_given", mutates_args=())
def batch_norm2d_blocked_given_op(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    relu: bool,
) -> Tensor:
    """`batch_norm2d_blocked` of an ``x`` whose mean and biased variance [C] are known already.

    They are a function of ``x``, and gradients are those of the whole: what ``x`` changes in them counts in
    its gradient, and they have none themselves. Statistics that do not depend on ``x`` are a scaling by
    channel: `affine_relu_blocked`.
    """
    return launch.given(x, mean, var, weight, bias, residual, n, eps, relu)


def _run_backward(
    gy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    n: int,
    eps: float,
    relu: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias, residual; the last is empty unless ``relu`` and ``need_residual``."""
    return launch.backward(gy, x, y if relu else None, weight, (mean, var, eps), n, need_residual)


batch_norm2d_blocked_backward_op = torch.library.custom_op(
    "clicktrain::batch_norm2d_blocked_backward", _run_backward, mutates_args=()
)
batch_norm2d_blocked_backward = plain(batch_norm2d_blocked_backward_op, _run_backward)


@torch.library.custom_op("clicktrain::affine_relu_blocked", mutates_args=())
def affine_relu_blocked_op(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, n: int, relu: bool
) -> Tensor:
    """Batch norm with given statistics: ``relu?(x * scale + shift + residual)``, scale and shift [C].

    Activations are as of `batch_norm2d_blocked`; only gradients depend on the ``n`` images.
    """
    return launch.affine(x, scale, shift, residual, n, relu)


@batch_norm2d_blocked_given_op.register_fake
@affine_relu_blocked_op.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _run_affine_backward(
    gy: Tensor, x: Tensor | None, y: Tensor | None, scale: Tensor, n: int, relu: bool, need_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, scale (zeros without ``x``), shift and residual (as of batch norm)."""
    return launch.backward(gy, x, y if relu else None, scale, None, n, need_residual)


affine_relu_blocked_backward_op = torch.library.custom_op(
    "clicktrain::affine_relu_blocked_backward", _run_affine_backward, mutates_args=()
)
affine_relu_blocked_backward = plain(affine_relu_blocked_backward_op, _run_affine_backward)


@batch_norm2d_blocked_backward_op.register_fake
@affine_relu_blocked_backward_op.register_fake
def _(gy: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    relu, need_residual = rest[-2:]
    gr = gy.new_empty(gy.shape if relu and need_residual else (0,))
    return gy.new_empty(gy.shape), launch.per_channel(gy), launch.per_channel(gy), gr


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _, ctx.n, ctx.eps, ctx.relu = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    # The signs of y are the mask of the ReLU: nothing of the size of the activations is kept besides.
    ctx.save_for_backward(x, y if ctx.relu else None, weight, mean, var)


def _backward(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, gy, ctx.needs_input_grad[1:4]), None, None, None


def _gradients(ctx: Any, gy: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    x, y, weight, mean, var = ctx.saved_tensors
    need_weight, need_bias, need_residual = need
    gx, gweight, gbias, gr = batch_norm2d_blocked_backward(
        gy, x, y, weight, mean, var, ctx.n, ctx.eps, ctx.relu, need_residual
    )
    residual = (gr if ctx.relu else gy) if need_residual else None
    return gx, gweight if need_weight else None, gbias if need_bias else None, residual


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, _, _, ctx.n, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(x, output if ctx.relu else None, weight, mean, var)


def _given_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    need_x, _, _, *need = ctx.needs_input_grad[:6]
    gx, *gradients = _gradients(ctx, gy, need)
    return gx if need_x else None, None, None, *gradients, None, None, None


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, _, ctx.n, ctx.relu = inputs
    need_x = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if need_x else None, output if ctx.relu else None, scale)


def _affine_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, y, scale = ctx.saved_tensors
    _, need_scale, need_shift, need_residual = ctx.needs_input_grad[:4]
    gx, gscale, gshift, gr = affine_relu_blocked_backward(gy, x, y, scale, ctx.n, ctx.relu, need_residual)
    residual = (gr if ctx.relu else gy) if need_residual else None
    return gx, gscale if need_scale else None, gshift if need_shift else None, residual, None, None


batch_norm2d_blocked_op.register_autograd(_backward, setup_context=_save)
batch_norm2d_blocked_given_op.register_autograd(_given_backward, setup_context=_save_given)
affine_relu_blocked_op.register_autograd(_affine_backward, setup_context=_save_affine)

batch_norm2d_blocked = differentiable(batch_norm2d_blocked_op, launch.forward, _save, _backward)
batch_norm2d_blocked_given = differentiable(
    batch_norm2d_blocked_given_op, launch.given, _save_given, _given_backward
)
affine_relu_blocked = differentiable(affine_relu_blocked_op, launch.affine, _save_affine, _affine_backward)


def batch_norm_blocked(
    x: Tensor,
    bn: nn.BatchNorm2d,
    n: int,
    residual: Tensor | None = None,
    relu: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``relu?(bn(x) + residual)`` with the parameters, statistics and mode of ``bn``.

    As ``bn`` itself would, this updates its running statistics in training mode. There has to be a compiler:
    callers ask `clicktrain.kernels.native.toolchain` before they choose this layout.

    Args:
        x: [B, C, H, W, V], float32, float64 or bfloat16, V the vector lanes of that type; B = ceil(n / V).
        bn: its parameters and statistics have the computed dtype, float32 for bfloat16 ``x``.
        n: images in the batch; what else the last block holds is not counted.
        residual: like ``x``, or None.
        relu: whether negative results become zero.
        statistics: mean and biased variance [C] of ``x``, if known; for a layer that `uses_batch_statistics`.

    Raises:
        UserError: another dtype or shape, or one number per channel in training mode.
    """
    y: Tensor
    mean, var = bn.running_mean, bn.running_var
    if bn.training or mean is None or var is None:  # as `uses_batch_statistics`
        count = n * x.shape[2] * x.shape[3]
        if count == 1:
            raise UserError("batch norm in training mode needs more than one number per channel")
        if statistics is None:
            y, batch_mean, batch_var = batch_norm2d_blocked(x, bn.weight, bn.bias, residual, n, bn.eps, relu)
        else:
            batch_mean, batch_var = statistics
            y = batch_norm2d_blocked_given(x, *statistics, bn.weight, bn.bias, residual, n, bn.eps, relu)
        if bn.training and bn.track_running_stats:
            update_running_stats(bn, batch_mean, batch_var, count)
        return y
    if not torch.is_grad_enabled():
        # What they depend on matters to gradients only, and one pass needs no tensors of its own.
        y = batch_norm2d_blocked_given(x, mean, var, bn.weight, bn.bias, residual, n, bn.eps, relu)
        return y
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    y = affine_relu_blocked(x, scale, shift, residual, n, relu)
    return y


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether the layer, in its mode, takes mean and variance of the batch and not the running ones."""
    return bn.training or bn.running_mean is None or bn.running_var is None


@torch.no_grad()
def update_running_stats(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """One step of the running mean, variance and number of batches, as ``nn.BatchNorm2d`` makes it.

    ``mean`` and the biased ``var`` [C] are of ``count`` numbers per channel; the unbiased one is kept.
    """
    share: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            # A tensor: to read the number here would break a compiled graph in two.
            share = 1.0 / bn.num_batches_tracked.to(mean.dtype)
    for running, new in ((bn.running_mean, mean), (bn.running_var, var * (count / (count - 1)))):
        if running is not None:
            running.mul_(1 - share).add_(new * share)
