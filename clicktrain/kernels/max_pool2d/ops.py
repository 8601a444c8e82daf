"""Max pooling as PyTorch operators, with shapes and gradients declared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clicktrain.kernels.direct import differentiable, plain
from clicktrain.kernels.max_pool2d import launch
from clicktrain.kernels.max_pool2d.launch import tap_type


@torch.library.custom_op("clicktrain::max_pool2d_blocked", mutates_args=())
def max_pool2d_blocked_op(x: Tensor, window: Sequence[int], ceil: bool) -> tuple[Tensor, Tensor]:
    """Max pooling.

    Args:
        x: [B, C, H, W, V], float32, float64 or bfloat16, V the vector lanes of that type.
        window: kernel, stride, padding and dilation, rows and columns of each.
        ceil: whether windows that begin inside the image count, wherever they end.

    Returns:
        The largest number of each window [B, C, H', W', V], and which of the window's positions it comes
        from: integers (`launch.tap_type`) without gradient.
    """
    return launch.forward(x, window, ceil)


@max_pool2d_blocked_op.register_fake
def _(x: Tensor, window: Sequence[int], ceil: bool) -> tuple[Tensor, Tensor]:
    launch.check_window(window)
    shape = (*x.shape[:2], *launch.output_size(x.shape[2:4], window, ceil), x.shape[4])
    return x.new_empty(shape), x.new_empty(shape, dtype=tap_type(shape[4]))


max_pool2d_blocked_backward_op = torch.library.custom_op(
    "clicktrain::max_pool2d_blocked_backward", launch.backward, mutates_args=()
)
max_pool2d_blocked_backward = plain(max_pool2d_blocked_backward_op, launch.backward)


@max_pool2d_blocked_backward_op.register_fake
def _(gy: Tensor, taps: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    return gy.new_empty((*gy.shape[:2], *size, gy.shape[4]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, window, _ = inputs
    taps = output[1]
    ctx.mark_non_differentiable(taps)
    ctx.size, ctx.window = x.shape[2:4], window
    ctx.save_for_backward(taps)


def _backward(ctx: Any, gy: Tensor, _: Any) -> tuple[Any, ...]:
    (taps,) = ctx.saved_tensors
    return max_pool2d_blocked_backward(gy, taps, ctx.size, ctx.window), None, None


max_pool2d_blocked_op.register_autograd(_backward, setup_context=_save)
max_pool2d_blocked = differentiable(max_pool2d_blocked_op, launch.forward, _save, _backward)
