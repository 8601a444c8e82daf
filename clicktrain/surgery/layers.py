"""The few layers that surgery puts into a model: what is left of a removed branch, and channel gating.

They are plain modules of standard operations, with parameters under the names that the replaced layers had,
and export with ``torch.export`` and ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RemovedConv2d(nn.Module):
    """What stays of a 2-D convolution whose weights are all zero: the size of its output, and its bias.

    Args:
        kernel_size, stride, padding, dilation: of the convolution; padding in pixels per axis.
        bias: of the convolution, [F]; None = there is none, or it does not reach the addition.
        writable: give the output memory of its own, because a later operation writes into it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        bias: nn.Parameter | None = None,
        *,
        writable: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.writable = writable
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, F, H', W'] with a bias (a view of it), [N, 1, H', W'] of zeros without."""
        height, width = (
            (x.shape[2 + i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )
        if self.bias is None:
            return x.new_zeros(x.shape[0], 1, height, width)
        return _spread(self.bias.view(1, -1, 1, 1), (x.shape[0], height, width), self.writable)


class ConstantBatchNorm2d(nn.Module):
    """The batch norm behind a convolution whose weights are all zero: it adds one number per channel.

    It computes that number as the layer did on a constant input: beta while training (and the running
    statistics go on as they did), ``beta - gamma * mean / sqrt(var + eps)`` in evaluation. Training goes on
    exactly as with the zero weights in place: beta gets the same gradient, gamma none. What is left is one
    addition with a broadcast view.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: nn.Module, *, writable: bool = False) -> None:
        super().__init__()
        source: Any = norm
        self.num_features: int = source.num_features
        self.eps: float = source.eps
        self.momentum: float | None = source.momentum
        self.writable = writable
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.training = norm.training

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1 or C, H, W], the same for all images and pixels -> [N, C, H, W], likewise."""
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        # Two pixels, because a statistic of one value is an error in PyTorch.
        pixels = x[:1, :, :1, :1].expand(1, self.num_features, 1, 2)
        y = F.batch_norm(
            pixels, self.running_mean, self.running_var, self.weight, self.bias, by_batch, factor, self.eps
        )
        return _spread(y[..., :1], (x.shape[0], x.shape[2], x.shape[3]), self.writable)


def _spread(value: Tensor, size: tuple[int, int, int], writable: bool) -> Tensor:
    """[1, C, 1, 1] -> [N, C, H, W]: a view that takes no memory, or a copy."""
    y = value.expand(size[0], -1, size[1], size[2])
    return y.clone(memory_format=torch.contiguous_format) if writable else y


class ChannelSelect(nn.Module):
    """Channel gating, before a branch (PruneTrain 4.2, figure 5b): only the channels that the branch reads.

    Args:
        channels: indices of them, ascending.
    """

    channels: Tensor

    def __init__(self, channels: Sequence[int], size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("channels", torch.tensor(list(channels), dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[N, size, H, W] -> [N, K, H, W]."""
        return x.index_select(1, self.channels)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.channels.numel()} of {self.size}"


class ChannelScatter(ChannelSelect):
    """Channel gating, after a branch: the branch's channels at their places, zeros elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, K, H, W] -> [N, size, H, W]."""
        y = x.new_zeros(x.shape[0], self.size, x.shape[2], x.shape[3])
        return y.index_copy(1, self.channels, x)


SURGERY_LAYERS = (RemovedConv2d, ConstantBatchNorm2d, ChannelSelect)
