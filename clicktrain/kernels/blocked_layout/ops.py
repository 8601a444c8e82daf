"""The conversions as PyTorch operators; each is the gradient of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clicktrain.kernels.blocked_layout import launch
from clicktrain.kernels.direct import differentiable


@torch.library.custom_op("clicktrain::block_batch", mutates_args=())
def block_batch_op(x: Tensor, lanes: int) -> Tensor:
    """Put ``lanes`` images side by side: [N, C, H, W] -> [ceil(N / lanes), C, H, W, lanes].

    Args:
        x: float32, float64 or bfloat16; contiguous or channels last is read as it lies.
        lanes: V, a power of two: ``toolchain().lanes(x.dtype)``.

    Returns:
        Contiguous, padded with zeros.
    """
    return launch.block(x, lanes)


@block_batch_op.register_fake
def _(x: Tensor, lanes: int) -> Tensor:
    return x.new_empty(launch.blocked_shape(x, lanes))


@torch.library.custom_op("clicktrain::unblock_batch", mutates_args=())
def unblock_batch_op(x: Tensor, n: int) -> Tensor:
    """Inverse of `block_batch`: [ceil(n / V), C, H, W, V] -> [n, C, H, W], contiguous."""
    return launch.unblock(x, n)


@unblock_batch_op.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return x.new_empty(n, *x.shape[1:4])


def _save_images(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.n = inputs[0].shape[0]


def _save_lanes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.lanes = inputs[0].shape[4]


def _block_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return unblock_batch(g, ctx.n), None


def _unblock_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return block_batch(g, ctx.lanes), None


block_batch_op.register_autograd(_block_backward, setup_context=_save_images)
unblock_batch_op.register_autograd(_unblock_backward, setup_context=_save_lanes)

block_batch = differentiable(block_batch_op, launch.block, _save_images, _block_backward)
unblock_batch = differentiable(unblock_batch_op, launch.unblock, _save_lanes, _unblock_backward)
