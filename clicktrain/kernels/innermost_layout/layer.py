"""Conversions, and layers on activations ``[C, H, W, N]``, on any device by PyTorch's own operators.

Batch norm, an addition and ReLU run in Triton's kernels where these can (`norm_launch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.kernels.activations import Activation
from clicktrain.kernels.activations.in_torch import in_torch
from clicktrain.kernels.batch_norm2d import uses_batch_statistics
from clicktrain.kernels.batch_norm2d.layer import update_running_stats
from clicktrain.kernels.innermost_layout import norm_launch
from clicktrain.kernels.innermost_layout.norm_launch import has_kernels
from clicktrain.kernels.max_pool2d import Pooling


def enter(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function from images [N, C, H, W] of a dtype to [C, H, W, N], contiguous."""
    del dtype  # one layout for all
    return lambda x: x.permute(1, 2, 3, 0).contiguous()


def leave(x: Tensor, n: int) -> Tensor:
    """Back: [C, H, W, n] -> [n, C, H, W], contiguous. There are no images beside the ``n``."""
    del n
    return x.permute(3, 0, 1, 2).contiguous()


def images_of(x: Tensor) -> Tensor:
    """The images [N, C, H, W], as a view."""
    return x.permute(3, 0, 1, 2)


def as_images(x: Tensor) -> Tensor:
    """A view that PyTorch's pooling knows: [C, H, W, N] -> [C, N, H, W], which is channels last."""
    return x.permute(0, 3, 1, 2)


def as_innermost(y: Tensor, like: Tensor) -> Tensor:
    """Back from `as_images`: [C, N, H', W'] -> [C, H', W', N]."""
    del like
    return y.permute(0, 2, 3, 1).contiguous()


def max_pool_innermost(x: Tensor, pooling: Pooling) -> Tensor:
    """[C, H, W, N] -> [C, H', W', N], as ``F.max_pool2d``."""
    kernel, stride, padding, dilation = (tuple(pooling.window()[at : at + 2]) for at in range(0, 8, 2))
    images: Tensor = F.max_pool2d(as_images(x), kernel, stride, padding, dilation, pooling.ceil_mode)
    return as_innermost(images, x)


def image_mean(x: Tensor, n: int, keepdim: bool, dtype: torch.dtype) -> Tensor:
    """Average each image: [C, H, W, n] -> [n, C, 1, 1] or [n, C]."""
    del n
    means = x.mean((1, 2), dtype=dtype).t().contiguous()
    return means[:, :, None, None] if keepdim else means


def activation_innermost(x: Tensor, n: int, activation: str, bias: Tensor | None = None) -> Tensor:
    """``act(x + bias)`` of [C, H, W, N]; a bias [C] is what the convolution before left to this pass."""
    del n
    if bias is not None:
        x = (x + bias[:, None, None, None]).to(x.dtype)
    return in_torch(Activation.read(activation))(x)


def batch_norm_innermost(
    x: Tensor,
    bn: nn.BatchNorm2d,
    n: int,
    residual: Tensor | None = None,
    activation: str = "none",
    statistics: tuple[Tensor, Tensor] | None = None,
    pooling: Pooling | None = None,
) -> Tensor:
    """``act(bn(max_pool(x)) + residual)`` with the parameters, statistics and mode of ``bn``.

    Args:
        x: [C, H, W, n].
        bn: its parameters and statistics have the computed dtype, float32 beside ``x`` of 16 bits.
        residual: like the result, or None.
        activation: what the sum goes through, the text of a `clicktrain.kernels.activations.Activation`.
        statistics: mean and biased variance [C] of ``x``, if known; for a layer that `uses_batch_statistics`
            and has no pooling before it.
        pooling: windows whose maxima are normalized instead of ``x``.

    Raises:
        ValueError: one number per channel in training mode.
    """
    if pooling is not None:
        x = max_pool_innermost(x, pooling)
    if has_kernels(x, activation):
        y = _by_kernels(x, bn, residual, activation == "relu", statistics)
        if y is not None:
            return y
    if statistics is None or not uses_batch_statistics(bn):
        # One image of H*W rows and N columns is normalized as N images of H rows and W columns are.
        y = nn.BatchNorm2d.forward(bn, x.view(1, x.shape[0], -1, n)).view_as(x)
    else:
        mean, variance = statistics
        y = _Normalized.apply(x, bn.weight, bn.bias, mean, variance, bn.eps)  # type: ignore[no-untyped-call]
        if bn.training and bn.track_running_stats:
            update_running_stats(bn, mean, variance, x[0].numel())
    if residual is not None:
        y = y + residual
    return in_torch(Activation.read(activation))(y)


def _by_kernels(
    x: Tensor,
    bn: nn.BatchNorm2d,
    residual: Tensor | None,
    relu: bool,
    statistics: tuple[Tensor, Tensor] | None,
) -> Tensor | None:
    """The same by Triton's kernels; None for known statistics with gradients, and one number."""
    count = x[0].numel()
    if uses_batch_statistics(bn):
        if count == 1:
            return None
        x = x.contiguous()
        mean, variance = norm_launch.statistics(x.detach()) if statistics is None else statistics
        y: Tensor = norm_launch.FusedNorm.apply(  # type: ignore[no-untyped-call]
            x, bn.weight, bn.bias, residual, mean, variance, bn.eps, relu
        )
        if bn.training and bn.track_running_stats:
            update_running_stats(bn, mean, variance, count)
        return y
    if torch.is_grad_enabled():
        return None
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = torch.rsqrt(bn.running_var + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight
    shift = torch.zeros_like(scale) if bn.bias is None else bn.bias
    return norm_launch.normalized(x, bn.running_mean, scale, shift, residual, relu)


class _Normalized(torch.autograd.Function):
    """Batch norm by statistics that are known already; its gradient is that of the whole batch norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        rstd = torch.rsqrt(var + eps)
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return (x * _by_channel(scale) + _by_channel(shift)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad
        flat, flat_g = (one.reshape(1, len(one), -1) for one in (x, gy.to(x.dtype)))
        gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
            flat_g, flat, weight, None, None, mean, rstd, True, ctx.eps, [True, True, True]
        )
        return (
            gx.view_as(x) if need[0] else None,
            gw if need[1] else None,
            gb if need[2] else None,
            None,
            None,
            None,
        )


def _by_channel(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]
