"""Max pooling of batch-blocked activations: calls of ``max_pool2d.c``, and the operators on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_library import check_blocked, library_for, vectors
from clicktrain.kernels.direct import differentiable, plain
from clicktrain.kernels.native import static_source
from clicktrain.kernels.native.library import call

WHAT = "blocked pooling"
"""In messages."""
MOST_TAPS = 128
"""Positions of a window that a signed byte can distinguish."""
source = functools.partial(
    static_source, "kernels/max_pool2d/max_pool2d.c", "Max pooling of batch-blocked activations."
)
"""(dtype of the activations, lanes) -> C source."""


def tap_type(lanes: int) -> torch.dtype:
    """Dtype of a result's tap: ``tap_t`` of the C source, the narrowest that fills 128 bits."""
    size = max(16 // int(lanes), 1)
    return {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64)


def output_size(size: Sequence[int], window: Sequence[int], ceil: bool) -> tuple[int, int]:
    """Rows and columns of the result, as PyTorch counts them; ``ceil`` counts windows that begin inside."""
    sizes = []
    for axis in (0, 1):
        kernel, stride, padding, dilation = window[axis::2]
        free = size[axis] + 2 * padding - dilation * (kernel - 1) - 1
        count = (free + (stride - 1 if ceil else 0)) // stride + 1
        if ceil and (count - 1) * stride >= size[axis] + padding:
            count -= 1  # a last window would lie in the padding
        sizes.append(count)
    return sizes[0], sizes[1]


def check_window(window: Sequence[int]) -> None:
    """Refuse what is no window: eight numbers, paddings of at most half a kernel, `MOST_TAPS` taps."""
    if len(window) != 8 or min(*window[:4], *window[6:]) < 1 or min(window[4:6]) < 0:
        raise UserError(
            f"a window is kernel, stride, padding and dilation, two numbers each, not {list(window)}"
        )
    if any(2 * padding > kernel for kernel, padding in zip(window[:2], window[4:6], strict=True)):
        raise UserError(f"padding is at most half the kernel, not {window[4:6]} for {window[:2]}")
    if window[0] * window[1] > MOST_TAPS:
        raise UserError(f"windows have at most {MOST_TAPS} positions here, not {window[0]}x{window[1]}")


def forward(x: Tensor, window: Sequence[int], ceil: bool) -> tuple[Tensor, Tensor]:
    """[B, C, H, W, V] -> the largest of each window [B, C, H', W', V], and which of its taps that is."""
    check_blocked(x.shape, x.dtype, x.device, WHAT)
    check_window(window)
    size = output_size(x.shape[2:4], window, ceil)
    if min(size) < 1:
        raise UserError(f"a window of {window[:2]} does not fit images of {list(x.shape[2:4])}")
    shape = (*x.shape[:2], *size, x.shape[4])
    y, taps = x.new_empty(shape), x.new_empty(shape, dtype=tap_type(shape[4]))
    sizes = *x.shape[2:4], *size, *window, *_amount(x)
    call(library_for(source, x.dtype).forward, vectors(x), y, taps, *sizes)
    return y, taps


def backward(gy: Tensor, taps: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Gradient w.r.t. the input [B, C, H, W, V] from that of the result, and its taps; ``size`` is (H, W)."""
    check_blocked(gy.shape, gy.dtype, gy.device, WHAT)
    wanted = tap_type(gy.shape[4])
    if taps.shape != gy.shape or taps.dtype is not wanted:
        raise UserError(f"taps are {list(gy.shape)} of {wanted}, not {list(taps.shape)} of {taps.dtype}")
    gx = gy.new_empty((*gy.shape[:2], *size, gy.shape[4]))
    sizes = *size, *gy.shape[2:4], *window, *_amount(gy)
    call(library_for(source, gy.dtype).backward, vectors(gy), vectors(taps), gx, *sizes)
    return gx


def _amount(x: Tensor) -> tuple[int, int]:
    return x.shape[0] * x.shape[1], torch.get_num_threads()


@torch.library.custom_op("clicktrain::max_pool2d_blocked", mutates_args=())
def max_pool2d_blocked_op(x: Tensor, window: Sequence[int], ceil: bool) -> tuple[Tensor, Tensor]:
    """Max pooling of x [B, C, H, W, V]; ``window`` is kernel, stride, padding and dilation, two numbers each.

    Returns:
        The largest number of each window [B, C, H', W', V], and which of the window's positions it comes
        from: integers (`tap_type`) without gradient.
    """
    return forward(x, window, ceil)


@max_pool2d_blocked_op.register_fake
def _(x: Tensor, window: Sequence[int], ceil: bool) -> tuple[Tensor, Tensor]:
    check_window(window)
    shape = (*x.shape[:2], *output_size(x.shape[2:4], window, ceil), x.shape[4])
    return x.new_empty(shape), x.new_empty(shape, dtype=tap_type(shape[4]))


max_pool2d_blocked_backward_op = torch.library.custom_op(
    "clicktrain::max_pool2d_blocked_backward", backward, mutates_args=()
)
max_pool2d_blocked_backward = plain(max_pool2d_blocked_backward_op, backward)


@max_pool2d_blocked_backward_op.register_fake
def _(gy: Tensor, taps: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    return gy.new_empty((*gy.shape[:2], *size, gy.shape[4]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, window, _ = inputs
    taps = output[1]
    ctx.mark_non_differentiable(taps)
    ctx.size, ctx.window = x.shape[2:4], window
    ctx.save_for_backward(taps)


def _gradients(ctx: Any, gy: Tensor, _: Any) -> tuple[Any, ...]:
    (taps,) = ctx.saved_tensors
    return max_pool2d_blocked_backward(gy, taps, ctx.size, ctx.window), None, None


max_pool2d_blocked_op.register_autograd(_gradients, setup_context=_save)
max_pool2d_blocked = differentiable(max_pool2d_blocked_op, forward, _save, _gradients)


Pair = int | tuple[int, ...] | list[int]


@dataclass(frozen=True, slots=True)
class Pooling:
    """Arguments of ``F.max_pool2d``: a number, or one for rows and one for columns.

    Without a stride it is the kernel's size.
    """

    kernel_size: Pair
    stride: Pair | None = None
    padding: Pair = 0
    dilation: Pair = 1
    ceil_mode: bool = False

    def window(self) -> list[int]:
        """Kernel, stride, padding and dilation, rows and columns of each."""
        stride = self.kernel_size if self.stride is None or self.stride in ([], ()) else self.stride
        window = []
        for one in (self.kernel_size, stride, self.padding, self.dilation):
            pair = (one,) if isinstance(one, int) else tuple(one)
            window += [pair[0], pair[-1]]
        return window

    def fits(self) -> bool:
        """Whether there is a kernel for it: windows of up to `MOST_TAPS` positions."""
        rows, columns = self.window()[:2]
        return rows * columns <= MOST_TAPS


def max_pool_blocked(x: Tensor, pooling: Pooling) -> Tensor:
    """[B, C, H, W, V] -> [B, C, H', W', V]; ties and NaN as ``F.max_pool2d`` has them.

    There has to be a compiler. A UserError for another dtype or shape, or a window that is none or too large.
    """
    y: Tensor = max_pool2d_blocked(x, pooling.window(), pooling.ceil_mode)[0]
    return y
