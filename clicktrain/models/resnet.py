"""Residual networks, for ImageNet and for CIFAR.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv:1512.03385): table 1 has
the ImageNet networks, section 4.2 the ``6n + 2`` networks for CIFAR. Two more go by these names in other
papers. ``resnet50_cifar`` is PruneTrain's ResNet-50 for CIFAR: three stages of 8 bottlenecks, that is n of
``6n + 2`` for 50 with blocks of three layers, 74 in all. ``resnet32_wide`` is ClickTrain's published code for
ResNet-32: ResNet-34 without one block of its third stage.

ReLU is never in place, so that backward hooks can sit on any layer; it costs no time and no memory that lasts
beyond the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clicktrain.models.layers import Stem, conv, initialize_, scaled_channels

Block = Literal["basic", "bottleneck", "bottleneck_v1"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, filters, 3, stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(filters, filters, 3)
        self.bn2 = nn.BatchNorm2d(filters)
        self.downsample = projection(in_channels, filters, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, filters, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        y: Tensor = self.relu2(x + shortcut)
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut (He et al. 2016, figure 5 right), 4 * filters wide.

    ``stride_in_3x3`` puts the stride into the 3x3 convolution (called v1.5; torchvision's networks); without
    it, it lies in the first 1x1 convolution, as published (v1).
    """

    expansion = 4

    def __init__(self, in_channels: int, filters: int, stride: int, *, stride_in_3x3: bool) -> None:
        super().__init__()
        out_channels = filters * self.expansion
        self.conv1 = conv(in_channels, filters, 1, 1 if stride_in_3x3 else stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(filters, filters, 3, stride if stride_in_3x3 else 1)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu2 = nn.ReLU()
        self.conv3 = conv(filters, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = projection(in_channels, out_channels, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4 * filters, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        y: Tensor = self.relu3(x + shortcut)
        return y


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling and one linear layer.

    Modules are named as in torchvision: ``conv1``, ``bn1``, ``layer1`` .. ``layer4`` (``layer3`` with three
    stages), ``fc``; inside a block ``conv1`` .. ``bn3`` and ``downsample.0`` / ``.1``. The stem changes
    strides and the shape of ``conv1`` only, never a name.

    Args:
        block: kind of all blocks; ``bottleneck_v1`` strides in the first 1x1 convolution.
        blocks: number of blocks in each stage; every stage but the first halves the image.
        filters: filters of the first stage before ``width``; each stage has twice those of the one before.
        width: factor on all channels, see ``scaled_channels``.
        stem: ``imagenet`` = 7x7 convolution with stride 2 and 3x3 max pooling with stride 2; ``cifar`` = 3x3
            convolution with stride 1 and no pooling.
        zero_init_residual: start the last batch norm of every block at gamma = 0, so that each block starts
            as its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
    """

    def __init__(
        self,
        block: Block,
        blocks: Sequence[int],
        *,
        filters: int,
        num_classes: int,
        in_channels: int = 3,
        width: float = 1.0,
        stem: Stem = "imagenet",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        channels = scaled_channels(filters, width)
        imagenet = stem == "imagenet"
        self.conv1 = conv(in_channels, channels, 7, 2) if imagenet else conv(in_channels, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else None
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(blocks)))
        for i, (name, count) in enumerate(zip(self.stage_names, blocks, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage_filters = scaled_channels(filters << i, width)
                module = make_block(block, channels, stage_filters, stride)
                stage.append(module)
                channels = stage_filters * module.expansion
            self.add_module(name, stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialize_(self)
        if zero_init_residual:
            for part in self.modules():
                if isinstance(part, BasicBlock | Bottleneck):
                    last = part.bn2 if isinstance(part, BasicBlock) else part.bn3
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] of any size -> logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut of a block that changes shape: a 1x1 convolution with batch norm; else None.

    This is option B of He et al. 2016 (section 3.3), for the CIFAR networks too, where the authors took the
    parameter-free option A (every second pixel, missing channels zero). A projection is a layer that can be
    pruned and accounted for like any other, and channel removal need not follow slices and paddings; it adds
    2,752 parameters to a CIFAR network (ResNet-20: 272,474 instead of 269,722).
    """
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def make_block(block: Block, in_channels: int, filters: int, stride: int) -> BasicBlock | Bottleneck:
    """One residual block of the given kind."""
    if block == "basic":
        return BasicBlock(in_channels, filters, stride)
    return Bottleneck(in_channels, filters, stride, stride_in_3x3=block == "bottleneck")


@dataclass(frozen=True, slots=True)
class ResNetSpec:
    """The architecture of a residual network; ``stem`` is the one it was published with."""

    block: Block
    blocks: tuple[int, ...]
    filters: int
    stem: Stem


def cifar_spec(depth: int) -> ResNetSpec:
    """The CIFAR network of ``depth = 6n + 2`` layers: three stages of n basic blocks, 16, 32 and 64 filters.

    He et al. 2016, section 4.2. Raises ValueError for other depths.
    """
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"CIFAR residual networks have 6n + 2 layers, got {depth}")
    return ResNetSpec("basic", (n, n, n), 16, "cifar")


RESNETS: dict[str, ResNetSpec] = {
    "resnet18": ResNetSpec("basic", (2, 2, 2, 2), 64, "imagenet"),
    "resnet34": ResNetSpec("basic", (3, 4, 6, 3), 64, "imagenet"),
    "resnet50": ResNetSpec("bottleneck", (3, 4, 6, 3), 64, "imagenet"),
    "resnet101": ResNetSpec("bottleneck", (3, 4, 23, 3), 64, "imagenet"),
    "resnet50_v1": ResNetSpec("bottleneck_v1", (3, 4, 6, 3), 64, "imagenet"),
    "resnet101_v1": ResNetSpec("bottleneck_v1", (3, 4, 23, 3), 64, "imagenet"),
    # PruneTrain's and ClickTrain's networks for CIFAR of these names, see docs/inputs.md.
    "resnet50_cifar": ResNetSpec("bottleneck", (8, 8, 8), 16, "cifar"),
    "resnet32_wide": ResNetSpec("basic", (3, 4, 5, 3), 64, "cifar"),
    # Of the 6n + 2 depths, not 26, 50 and 152: these are known as other networks.
    **{f"resnet{depth}": cifar_spec(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
}


def resnet(name: str, *, stem: Stem | None = None, **options: Any) -> ResNet:
    """A residual network of ``RESNETS`` by name; ``stem`` None means the one it was published with."""
    spec = RESNETS[name]
    return ResNet(spec.block, spec.blocks, filters=spec.filters, stem=stem or spec.stem, **options)
