"""Calls of ``max_pool2d.c``: checks what pointers do not say, and allocates results."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_library import check_blocked, library_for
from clicktrain.kernels.native import static_source
from clicktrain.kernels.native.library import call
from clicktrain.kernels.sparse_conv2d.blocked.layout import vectors

WHAT = "blocked pooling"
"""In messages."""
MOST_TAPS = 128
"""Positions of a window that a signed byte can tell apart."""
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
    call(
        library_for(source, x.dtype).forward, vectors(x), y, taps, *x.shape[2:4], *size, *window, *_amount(x)
    )
    return y, taps


def backward(gy: Tensor, taps: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """Gradient w.r.t. the input [B, C, H, W, V] from that of the result, and its taps; ``size`` is (H, W)."""
    check_blocked(gy.shape, gy.dtype, gy.device, WHAT)
    wanted = tap_type(gy.shape[4])
    if taps.shape != gy.shape or taps.dtype is not wanted:
        raise UserError(f"taps are {list(gy.shape)} of {wanted}, not {list(taps.shape)} of {taps.dtype}")
    gx = gy.new_empty((*gy.shape[:2], *size, gy.shape[4]))
    call(
        library_for(source, gy.dtype).backward,
        vectors(gy),
        vectors(taps),
        gx,
        *size,
        *gy.shape[2:4],
        *window,
        *_amount(gy),
    )
    return gx


def _amount(x: Tensor) -> tuple[int, int]:
    return x.shape[0] * x.shape[1], torch.get_num_threads()
