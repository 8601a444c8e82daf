"""A small network for 32x32 images that says something within minutes.

Jordan: 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024 (arXiv:2404.00498), section 3 and appendix A.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.models.layers import scaled_channels

STAGE_FILTERS = (64, 256, 256)
WHITENED = 2
"""Side of the patches that the first convolution whitens."""
MIN_IMAGE = 9
"""Smallest images that still have a pixel after the three poolings."""
_LOGIT_SCALE = 1 / 9
_NORM: dict[str, Any] = {"eps": 1e-12, "momentum": 0.4}


class CifarNet(nn.Module):
    """A 2x2 convolution without padding, three stages of two 3x3 convolutions each, and one linear layer.

    A stage is convolution, 2x2 max pooling, batch norm, GELU, convolution, batch norm, GELU. Batch norms have
    a shift and no scale: their weight is 1 and not trained. Convolutions other than ``whiten`` have no bias
    and begin as the identity on as many channels as there are (section 3.1); logits are divided by 9.

    ``whiten`` has a positive and a negative filter for each principal component of the patches, 24 of them
    for RGB images at any width. Its weights are random until `clicktrain.models.whitening.whiten_` has seen
    images. Of two stems only ``cifar`` exists: it is ignored.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int = 3, width: float = 1.0, stem: str | None = None
    ) -> None:
        del stem
        super().__init__()
        channels = 2 * in_channels * WHITENED**2
        self.whiten = nn.Conv2d(in_channels, channels, WHITENED)
        self.activation = nn.GELU()
        self.stages = nn.Sequential()
        for filters in STAGE_FILTERS:
            out_channels = scaled_channels(filters, width)
            self.stages.append(_stage(channels, out_channels))
            channels = out_channels
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(channels, num_classes, bias=False)
        assert self.whiten.bias is not None
        nn.init.zeros_(self.whiten.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = self.stages(self.activation(self.whiten(x)))
        logits: Tensor = self.head(torch.flatten(self.pool(x), 1)) * _LOGIT_SCALE
        return logits


def _stage(in_channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(
        _identity_conv(in_channels, filters),
        nn.MaxPool2d(2),
        _shift_norm(filters),
        nn.GELU(),
        _identity_conv(filters, filters),
        _shift_norm(filters),
        nn.GELU(),
    )


def _identity_conv(in_channels: int, filters: int) -> nn.Conv2d:
    """A 3x3 convolution whose first filters begin as the identity; the rest begins as PyTorch has it."""
    layer = nn.Conv2d(in_channels, filters, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:in_channels])
    return layer


def _shift_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **_NORM)
    norm.weight.requires_grad_(False)
    return norm
