"""Layers on activations in the batch-blocked layout: batch norm with what stands around it, activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.batch_norm2d.ops import (
    affine_blocked,
    batch_norm2d_blocked,
    batch_norm2d_blocked_given,
)
from clicktrain.kernels.batch_norm2d.pooled import (
    max_pool2d_batch_norm2d_blocked,
    max_pool2d_batch_norm2d_blocked_given,
)
from clicktrain.kernels.max_pool2d import Pooling, max_pool_blocked


def batch_norm_blocked(
    x: Tensor,
    bn: nn.BatchNorm2d,
    n: int,
    residual: Tensor | None = None,
    activation: str = "none",
    statistics: tuple[Tensor, Tensor] | None = None,
    pooling: Pooling | None = None,
) -> Tensor:
    """``act(bn(max_pool(x)) + residual)`` with the parameters, statistics and mode of ``bn``.

    As ``bn`` itself would, this updates its running statistics in training mode. There has to be a compiler:
    callers ask `clicktrain.kernels.native.toolchain` before they choose this layout.

    Args:
        x: [B, C, H, W, V], float32, float64 or bfloat16, V the vector lanes of that type; B = ceil(n / V).
        bn: its parameters and statistics have the computed dtype, float32 for bfloat16 ``x``.
        n: images in the batch; what else the last block holds is not counted.
        residual: like the result, or None.
        activation: what the sum goes through, the text of a `clicktrain.kernels.activations.Activation`.
        statistics: mean and biased variance [C] of ``x``, if known; for a layer that `uses_batch_statistics`
            and has no pooling before it.
        pooling: windows whose maxima are normalized instead of ``x``.

    Raises:
        UserError: another dtype or shape, or one number per channel in training mode.
    """
    y: Tensor
    mean, var = bn.running_mean, bn.running_var
    if bn.training or mean is None or var is None:  # as `uses_batch_statistics`
        if statistics is not None:
            batch_mean, batch_var = statistics
            count = _count(n, x)
            y = batch_norm2d_blocked_given(
                x, *statistics, bn.weight, bn.bias, residual, n, bn.eps, activation
            )
        elif pooling is None:
            count = _count(n, x)
            y, batch_mean, batch_var = batch_norm2d_blocked(
                x, bn.weight, bn.bias, residual, n, bn.eps, activation
            )
        else:
            window, ceil = pooling.window(), pooling.ceil_mode
            y, _, _, batch_mean, batch_var = max_pool2d_batch_norm2d_blocked(
                x, bn.weight, bn.bias, residual, window, ceil, n, bn.eps, activation
            )
            count = _count(n, y)
        if bn.training and bn.track_running_stats:
            update_running_stats(bn, batch_mean, batch_var, count)
        return y
    if not torch.is_grad_enabled():
        # What they depend on matters to gradients only, and one pass needs no tensors of its own.
        parameters = mean, var, bn.weight, bn.bias, residual
        if pooling is None:
            y = batch_norm2d_blocked_given(x, *parameters, n, bn.eps, activation)
            return y
        window, ceil = pooling.window(), pooling.ceil_mode
        y = max_pool2d_batch_norm2d_blocked_given(x, *parameters, window, ceil, n, bn.eps, activation)
        return y
    if pooling is not None:
        x = max_pool_blocked(x, pooling)
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias
    y = affine_blocked(x, scale, shift, residual, n, activation)
    return y


def activation_blocked(x: Tensor, n: int, activation: str, bias: Tensor | None = None) -> Tensor:
    """``act(x + bias)`` of [B, C, H, W, V]; a bias [C] is what the convolution before left to this pass."""
    y: Tensor = affine_blocked(x, None, bias, None, n, activation)
    return y


def _count(n: int, x: Tensor) -> int:
    count = n * x.shape[2] * x.shape[3]
    if count == 1:
        raise UserError("batch norm in training mode needs more than one number per channel")
    return count


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
            running.lerp_(new, share)
