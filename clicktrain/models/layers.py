"""Shared parts of the networks: stems, widths, convolutions and initial weights."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

Stem = Literal["imagenet", "cifar"]
"""First layers: ``imagenet`` shrinks a large image early, ``cifar`` keeps the resolution of a small one."""


def scaled_channels(channels: int, width: float) -> int:
    """Channels of a layer in a network of the given width.

    ``channels`` itself at width 1; otherwise ``channels * width`` rounded to the nearest multiple of 8
    (halves up), at least 8, so that filters still divide into groups and SIMD lanes.

    Examples:
        >>> [scaled_channels(c, 0.25) for c in (16, 32, 64, 100)]
        [8, 8, 16, 24]
    """
    if width == 1:
        return channels
    return max(8, 8 * math.floor(channels * width / 8 + 0.5))


def conv(in_channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias (batch norm follows) that keeps the size of the image at stride 1."""
    padding = kernel // 2
    return nn.Conv2d(in_channels, filters, kernel, stride, padding, groups=groups, bias=False)


def initialize_(model: nn.Module) -> None:
    """Initialize convolutions and batch norms: He et al., ICCV 2015 (arXiv:1502.01852), section 2.2.

    Convolution weights are normal with variance ``2 / (F / groups * R * S)``, the backward form ("fan out"),
    which counts the filters that one input channel feeds; biases are 0. Batch norm starts as the identity.
    Linear layers keep PyTorch's own initialization.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
