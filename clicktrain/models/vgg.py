"""VGG networks with batch norm.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015
(arXiv:1409.1556), table 1, columns A, B and D; batch norm after each convolution: Ioffe, Szegedy, ICML 2015
(arXiv:1502.03167).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.models.layers import Stem, initialize_, scaled_channels

VGGS: dict[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
}
"""Number of 3x3 convolutions before each of the five max poolings."""

STAGE_FILTERS = (64, 128, 256, 512, 512)
HEAD_UNITS = 4096
HEAD_GRID = 7


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each with batch norm, ReLU and, at the stage's end, 2x2 max pooling.

    Modules are named as in torchvision's ``vgg*_bn``: ``features.N``, counting convolutions (with a bias, as
    there), batch norms, ReLUs and poolings; then ``avgpool`` and ``classifier``. ReLU is never in place, so
    that backward hooks can sit on any layer.

    ``width`` is a factor on all channels and on the units of the hidden linear layers. The stem ``imagenet``
    is the head of the paper, on a 7x7 grid: linear layers ``classifier.0``, ``.3`` and ``.6`` with dropout
    0.5 between; it needs images of at least 32 pixels. ``cifar`` is global average pooling and one linear
    layer, ``classifier``; its poolings round sizes up instead of down, which is the same for 32 pixels and
    lets smaller images through: at 1x1 a pooling does nothing.
    """

    def __init__(
        self,
        convolutions: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        stem: Stem = "imagenet",
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for count, filters in zip(convolutions, STAGE_FILTERS, strict=True):
            for _ in range(count):
                out_channels = scaled_channels(filters, width)
                self.features.append(nn.Conv2d(channels, out_channels, 3, padding=1))
                self.features.append(nn.BatchNorm2d(out_channels))
                self.features.append(nn.ReLU())
                channels = out_channels
            self.features.append(nn.MaxPool2d(2, stride=2, ceil_mode=stem == "cifar"))
        self.avgpool = nn.AdaptiveAvgPool2d(HEAD_GRID if stem == "imagenet" else 1)
        self.classifier: nn.Module
        if stem == "imagenet":
            hidden = scaled_channels(HEAD_UNITS, width)
            self.classifier = imagenet_head(channels * HEAD_GRID**2, hidden, num_classes)
        else:
            self.classifier = nn.Linear(channels, num_classes)
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] -> logits [N, num_classes]."""
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        logits: Tensor = self.classifier(x)
        return logits


def imagenet_head(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """Three linear layers with dropout; weights start as N(0, 0.01^2), biases as 0 (section 3.1)."""
    first, second, last = (
        nn.Linear(features, hidden),
        nn.Linear(hidden, hidden),
        nn.Linear(hidden, num_classes),
    )
    for layer in (first, second, last):
        nn.init.normal_(layer.weight, 0.0, 0.01)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.5), second, nn.ReLU(), nn.Dropout(0.5), last)


def vgg(name: str, *, stem: Stem | None = None, **options: Any) -> VGG:
    """A network of ``VGGS`` by name; ``stem`` None means ``imagenet``."""
    return VGG(VGGS[name], stem=stem or "imagenet", **options)
