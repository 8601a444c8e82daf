"""MobileNetV1.

Howard et al.: MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications, 2017
(arXiv:1704.04861), table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clicktrain.models.layers import Stem, conv, initialize_, scaled_channels

STEM_FILTERS = 32
# (filters, stride of the depthwise convolution). Table 1 prints stride 2 for the last block too, but its
# input and output sizes there are both 7x7: the stride is 1.
BLOCKS: tuple[tuple[int, int], ...] = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)),
)


class SeparableBlock(nn.Module):
    """3x3 depthwise, then 1x1 convolution, each with batch norm and ReLU (Howard et al. 2017, figure 3)."""

    def __init__(self, in_channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.depthwise = conv(in_channels, in_channels, 3, stride, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.pointwise = conv(in_channels, filters, 1)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, filters, ceil(H / stride), ceil(W / stride)]."""
        x = self.relu1(self.bn1(self.depthwise(x)))
        y: Tensor = self.relu2(self.bn2(self.pointwise(x)))
        return y


class MobileNetV1(nn.Module):
    """A 3x3 convolution, 13 depthwise separable blocks, global average pooling and one linear layer.

    torchvision has no MobileNetV1; its names for residual networks are followed: ``conv1``, ``bn1``,
    ``blocks.0`` .. ``blocks.12`` with ``depthwise``, ``bn1``, ``pointwise``, ``bn2`` inside, and ``fc``.

    ``width`` is a factor on all channels (the paper's alpha, section 3.3), see ``scaled_channels``; ``conv1``
    has stride 2 with the stem ``imagenet`` and 1 with ``cifar``.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int = 3, width: float = 1.0, stem: Stem = "imagenet"
    ) -> None:
        super().__init__()
        channels = scaled_channels(STEM_FILTERS, width)
        self.conv1 = conv(in_channels, channels, 3, 2 if stem == "imagenet" else 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential()
        for filters, stride in BLOCKS:
            out_channels = scaled_channels(filters, width)
            self.blocks.append(SeparableBlock(channels, out_channels, stride))
            channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialize_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] of any size -> logits [N, num_classes]."""
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
