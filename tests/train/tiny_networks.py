"""Networks of the tests' own, small enough that a whole run takes a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    """Three convolutions, batch norm, and dropout, so that random numbers matter."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, num_classes),
    )


def plain(num_classes: int, in_channels: int) -> nn.Module:
    """No batch norm and no dropout: every image counts by itself."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


class Dropped(nn.Module):
    """A residual branch that is left out of half of all training batches, and notes how often."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.kept = self.left_out = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()).item() < 0.5:
            self.left_out += 1
            return x
        self.kept += self.training
        y: Tensor = x + self.norm(self.conv(x))
        return y


class StochasticDepth(nn.Module):
    """Layer drop inside, ``view`` after a pooling at the end."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.dropped, self.relu = Dropped(), nn.ReLU()
        self.last, self.pool = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.pool(self.relu(self.last(self.relu(self.dropped(x)))))
        y: Tensor = self.head(x.view(x.size(0), -1))
        return y


def stochastic_depth(num_classes: int, in_channels: int) -> nn.Module:
    return StochasticDepth(num_classes, in_channels)


class Breaks(nn.Module):
    """Its loss becomes what is asked for after some batches, until a resumed run has passed that point."""

    def __init__(self, num_classes: int, in_channels: int, after: int, factor: float) -> None:
        super().__init__()
        self.body = plain(num_classes, in_channels)
        self.after, self.factor = after, factor
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        output: Tensor = self.body(x)
        return output * self.factor if self.training and self.batches > self.after else output


def turns_nan(num_classes: int, in_channels: int) -> nn.Module:
    return Breaks(num_classes, in_channels, 15, float("nan"))


def explodes(num_classes: int, in_channels: int) -> nn.Module:
    return Breaks(num_classes, in_channels, 15, 1e8)


def wrong_outputs(num_classes: int, in_channels: int) -> nn.Module:
    return plain(num_classes + 1, in_channels)


def wrong_input(num_classes: int, in_channels: int) -> nn.Module:
    return plain(num_classes, in_channels + 2)


class Auxiliary(nn.Module):
    """Two outputs in training, as networks with an auxiliary classifier have."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = plain(num_classes, in_channels)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y: Tensor = self.body(x)
        return (y, y) if self.training else y


def auxiliary(num_classes: int, in_channels: int) -> nn.Module:
    return Auxiliary(num_classes, in_channels)


def frozen_network(num_classes: int, in_channels: int) -> nn.Module:
    return plain(num_classes, in_channels).requires_grad_(False)


def reflecting(num_classes: int, in_channels: int) -> nn.Module:
    """Its convolutions pad in a way that packed ones cannot."""
    layers = [
        m if not isinstance(m, nn.Conv2d) else _reflecting(m)
        for m in tiny(num_classes, in_channels).children()
    ]
    return nn.Sequential(*layers)


def _reflecting(conv: nn.Conv2d) -> nn.Conv2d:
    return nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, padding_mode="reflect")


def wide(num_classes: int, in_channels: int) -> nn.Module:
    """Convolutions that take most of the time, so that fewer kernels show."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1, bias=False),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.Conv2d(96, 96, 3, padding=1, bias=False),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, num_classes),
    )


def medium(num_classes: int, in_channels: int) -> nn.Module:
    """Weights enough that a file of them is larger than what is beside them."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
