"""MobileNetV3, small and large.

Howard et al.: Searching for MobileNetV3, ICCV 2019 (arXiv:1905.02244), tables 1 and 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clicktrain.models.layers import Stem, conv, initialize_, scaled_channels

STEM_FILTERS = 16
_DROPOUT = 0.2


class Row(NamedTuple):
    """One inverted residual block, a row of table 1 or 2."""

    kernel: int
    expanded: int
    filters: int
    squeeze: bool
    hardswish: bool
    stride: int


MOBILENETS_V3: dict[str, tuple[tuple[Row, ...], int]] = {
    "mobilenet_v3_small": (
        (
            Row(3, 16, 16, True, False, 2),
            Row(3, 72, 24, False, False, 2),
            Row(3, 88, 24, False, False, 1),
            Row(5, 96, 40, True, True, 2),
            Row(5, 240, 40, True, True, 1),
            Row(5, 240, 40, True, True, 1),
            Row(5, 120, 48, True, True, 1),
            Row(5, 144, 48, True, True, 1),
            Row(5, 288, 96, True, True, 2),
            Row(5, 576, 96, True, True, 1),
            Row(5, 576, 96, True, True, 1),
        ),
        1024,
    ),
    "mobilenet_v3_large": (
        (
            Row(3, 16, 16, False, False, 1),
            Row(3, 64, 24, False, False, 2),
            Row(3, 72, 24, False, False, 1),
            Row(5, 72, 40, True, False, 2),
            Row(5, 120, 40, True, False, 1),
            Row(5, 120, 40, True, False, 1),
            Row(3, 240, 80, False, True, 2),
            Row(3, 200, 80, False, True, 1),
            Row(3, 184, 80, False, True, 1),
            Row(3, 184, 80, False, True, 1),
            Row(3, 480, 112, True, True, 1),
            Row(3, 672, 112, True, True, 1),
            Row(5, 672, 160, True, True, 2),
            Row(5, 960, 160, True, True, 1),
            Row(5, 960, 160, True, True, 1),
        ),
        1280,
    ),
}
"""Blocks, and units of the hidden linear layer."""


def squeeze_channels(channels: int) -> int:
    """Channels between the two layers of squeeze-and-excitation: a quarter, in multiples of 8 (section 5.3).

    The nearest multiple, or the next one where that is less than 90% of the quarter, as in torchvision.

    Examples:
        >>> [squeeze_channels(c) for c in (16, 72, 120, 960)]
        [8, 24, 32, 240]
    """
    quarter = channels // 4
    nearest = max(8, 8 * math.floor(quarter / 8 + 0.5))
    return nearest if nearest >= 0.9 * quarter else nearest + 8


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm and, unless the block ends here, an activation: ``0``, ``1``, ``2``."""

    def __init__(
        self,
        in_channels: int,
        filters: int,
        kernel: int,
        activation: type[nn.Module] | None,
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(
            conv(in_channels, filters, kernel, stride, groups),
            nn.BatchNorm2d(filters, eps=0.001, momentum=0.01),
        )
        if activation is not None:
            self.append(activation())


class SqueezeExcitation(nn.Module):
    """Channels scaled by what two 1x1 convolutions make of their means (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = squeeze_channels(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        y: Tensor = self.scale_activation(scale) * x
        return y


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection (section 5, figure 4).

    The expansion is left out where it would not expand. The input is added where it has the output's shape.
    """

    def __init__(self, in_channels: int, expanded: int, filters: int, row: Row) -> None:
        super().__init__()
        activation = nn.Hardswish if row.hardswish else nn.ReLU
        self.block = nn.Sequential()
        if expanded != in_channels:
            self.block.append(ConvNormActivation(in_channels, expanded, 1, activation))
        self.block.append(
            ConvNormActivation(expanded, expanded, row.kernel, activation, stride=row.stride, groups=expanded)
        )
        if row.squeeze:
            self.block.append(SqueezeExcitation(expanded))
        self.block.append(ConvNormActivation(expanded, filters, 1, None))
        self.residual = row.stride == 1 and in_channels == filters

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, filters, ceil(H / stride), ceil(W / stride)]."""
        y: Tensor = self.block(x)
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """A 3x3 convolution, inverted residual blocks, a 1x1 convolution, average pooling and two linear layers.

    Modules are named as in torchvision: ``features.0`` to ``features.N``, ``classifier.0`` and
    ``classifier.3``; initial weights and batch norm settings are its own too. Activations are never in place.

    Args:
        blocks: rows of the paper's table.
        hidden: units of ``classifier.0``.
        width: factor on all channels and hidden units, see ``scaled_channels``. A block whose expansion then
            does not expand has none, as in torchvision.
        stem: ``imagenet`` = the first convolution has stride 2; ``cifar`` = stride 1.
    """

    def __init__(
        self,
        blocks: tuple[Row, ...],
        hidden: int,
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        stem: Stem = "imagenet",
    ) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        channels = scaled_channels(STEM_FILTERS, width)
        self.features = nn.Sequential(
            ConvNormActivation(in_channels, channels, 3, nn.Hardswish, stride=2 if imagenet else 1)
        )
        for row in blocks:
            expanded, filters = scaled_channels(row.expanded, width), scaled_channels(row.filters, width)
            self.features.append(InvertedResidual(channels, expanded, filters, row))
            channels = filters
        self.features.append(ConvNormActivation(channels, 6 * channels, 1, nn.Hardswish))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        units = scaled_channels(hidden, width)
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, units),
            nn.Hardswish(),
            nn.Dropout(_DROPOUT),
            nn.Linear(units, num_classes),
        )
        initialize_(self)
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] of any size -> logits [N, num_classes]."""
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def mobilenet_v3(name: str, *, num_classes: int, in_channels: int, width: float, stem: Stem) -> MobileNetV3:
    """A network of ``MOBILENETS_V3`` by name."""
    blocks, hidden = MOBILENETS_V3[name]
    return MobileNetV3(
        blocks, hidden, num_classes=num_classes, in_channels=in_channels, width=width, stem=stem
    )
