"""What ``nn.MaxPool2d`` does, on activations in the batch-blocked layout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clicktrain.kernels.max_pool2d.launch import MOST_TAPS
from clicktrain.kernels.max_pool2d.ops import max_pool2d_blocked

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

    There has to be a compiler: callers ask `clicktrain.kernels.native.toolchain` before they choose this
    layout.

    Raises:
        UserError: another dtype or shape, or a window that is none or too large.
    """
    y: Tensor
    y, _ = max_pool2d_blocked(x, pooling.window(), pooling.ceil_mode)
    return y
