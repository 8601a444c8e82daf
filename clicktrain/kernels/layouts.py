"""Layouts of activations beside PyTorch's own, and what can run in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clicktrain.kernels import innermost_layout as innermost
from clicktrain.kernels.batch_norm2d import activation_blocked, batch_norm_blocked
from clicktrain.kernels.batch_norm2d import launch as batch_norm
from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
from clicktrain.kernels.blocked_layout import ops as conversion
from clicktrain.kernels.max_pool2d import max_pool_blocked
from clicktrain.kernels.max_pool2d import ops as max_pool
from clicktrain.kernels.native import needed_toolchain, toolchain


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to store activations, with the operations that keep them in it.

    Elementwise operations run in every layout. What a layout has no function for runs in PyTorch's own.

    Attributes:
        name: key in `LAYOUTS`, and in plans.
        enter: dtype of the activations -> function from [N, C, H, W] of that dtype to the layout.
        leave: (x, n) -> [n, C, H, W] of the same dtype.
        images: x -> [N, C, H, W] of the same dtype, all images that are computed, padding lanes too; None
            where there is no such view: the model's own code then computes gradients of all weights.
        half: whether activations may be kept in bfloat16 while parameters are float32.
        batch_norm: (x, layer, n, residual or None, activation, statistics or None, pooling or None) ->
            result, as `batch_norm_blocked`.
        activation: (x, n, activation, bias or None) -> like ``x``, as `activation_blocked`.
        max_pool: (x, pooling) -> maxima, as `max_pool_blocked`.
        image_mean: (x, n, keepdim, dtype) -> [n, C, 1, 1] or [n, C].
        view: other pooling: (layout -> a view that PyTorch pools, back: (pooled, x) -> layout).
        channels_second: whether channels are dimension 1, so that ``torch.cat`` joins them.
        sources: C texts of its passes by dtype and number of the activation at their end: ``layout`` for
            conversions, ``batch_norm`` (also for activations alone), ``pooled_norm``, ``max_pool``.
        filled: images of a batch -> images that are computed.
    """

    name: str
    enter: Callable[[torch.dtype], Callable[[Tensor], Tensor]]
    leave: Callable[[Tensor, int], Tensor]
    images: Callable[[Tensor], Tensor] | None = None
    half: bool = False
    batch_norm: Callable[..., Tensor] | None = None
    activation: Callable[..., Tensor] | None = None
    max_pool: Callable[..., Tensor] | None = None
    image_mean: Callable[[Tensor, int, bool, torch.dtype], Tensor] | None = None
    view: tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] | None = None
    channels_second: bool = False
    sources: Mapping[str, Callable[[torch.dtype, int], str]] = field(default_factory=dict)
    filled: Callable[[int], int] = int


LAYOUTS: dict[str, Layout] = {}
"""By name, in the order in which equal costs are decided. `register_layout` adds to it."""


def register_layout(layout: Layout) -> None:
    """Add a layout; one of the same name is replaced."""
    LAYOUTS[layout.name] = layout


# ---------------------------------------------------------------- [N/V, C, H, W, V]


def _enter_blocks(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    lanes = needed_toolchain().lanes(dtype)
    return lambda x: block_batch(x, lanes)


def as_images(x: Tensor) -> Tensor:
    """A view that PyTorch's pooling knows: [B, C, H, W, V] -> [B*C, V, H, W], which is channels last."""
    b, c, h, w, v = x.shape
    return x.view(b * c, h, w, v).permute(0, 3, 1, 2)


def as_blocks(y: Tensor, like: Tensor) -> Tensor:
    """Back from `as_images`: [B*C, V, H', W'] -> [B, C, H', W', V]; ``like`` has B and C."""
    _, v, h, w = y.shape
    return y.permute(0, 2, 3, 1).contiguous().view(like.shape[0], like.shape[1], h, w, v)


def image_mean(x: Tensor, n: int, keepdim: bool, dtype: torch.dtype) -> Tensor:
    """Average each image: [B, C, H, W, V] -> [n, C, 1, 1] or [n, C]; padding lanes are dropped."""
    b, c, _, _, v = x.shape
    # In rows, as the model has them: a dropout behind would draw for other places.
    means = x.mean((2, 3), dtype=dtype).permute(0, 2, 1).reshape(b * v, c)[:n].contiguous()
    return means[:, :, None, None] if keepdim else means


def _filled_blocks(images: int) -> int:
    tools = toolchain()
    lanes = tools.lanes(torch.float32) if tools else 1
    return -(-images // lanes) * lanes


def _text(source: Callable[[torch.dtype, int], str]) -> Callable[[torch.dtype, int], str]:
    return lambda dtype, activation: source(dtype, needed_toolchain().lanes(dtype))


def _norm_text(pooled: bool) -> Callable[[torch.dtype, int], str]:
    def text(dtype: torch.dtype, activation: int) -> str:
        return batch_norm.source(activation, pooled)(dtype, needed_toolchain().lanes(dtype))

    return text


BLOCKED = Layout(
    "blocked",
    _enter_blocks,
    unblock_batch,
    lambda x: unblock_batch(x, x.shape[0] * x.shape[4]),
    half=True,
    batch_norm=batch_norm_blocked,
    activation=activation_blocked,
    max_pool=max_pool_blocked,
    image_mean=image_mean,
    view=(as_images, as_blocks),
    channels_second=True,
    sources={
        "layout": _text(conversion.source),
        "batch_norm": _norm_text(False),
        "pooled_norm": _norm_text(True),
        "max_pool": _text(max_pool.source),
    },
    filled=_filled_blocks,
)
"""The batch-blocked layout: V images side by side in the innermost dimension, V the SIMD lanes."""
register_layout(BLOCKED)


# ---------------------------------------------------------------- [C, H, W, N]

BATCH_INNERMOST = Layout(
    "batch_innermost",
    innermost.enter,
    innermost.leave,
    innermost.images_of,
    half=True,
    batch_norm=innermost.batch_norm_innermost,
    activation=innermost.activation_innermost,
    max_pool=innermost.max_pool_innermost,
    image_mean=innermost.image_mean,
    view=(innermost.as_images, innermost.as_innermost),
)
"""All images side by side in the innermost dimension: what GPUs read in one piece."""
register_layout(BATCH_INNERMOST)
