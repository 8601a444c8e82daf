"""PruneTrain section 4.1 once more, in plain loops over channels, written from the text alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def penalty(convs: list[Tensor], head: Tensor) -> Tensor:
    """Eq. (2) without lambda for a chain of convolutions and one linear layer behind a global pooling.

    "We do not apply group lasso to the input channels of the first convolution layer and the output neurons
    of the last fully-connected layer."
    """
    total = torch.zeros((), dtype=head.dtype)
    for number, weight in enumerate(convs):
        for filter_ in range(weight.shape[0]):
            total = total + weight[filter_].norm()
        if number > 0:
            for channel in range(weight.shape[1]):
                total = total + weight[:, channel].norm()
    for channel in range(head.shape[1]):
        total = total + head[:, channel].norm()
    return total


def ratio(coefficient: float, loss: float, sum_of_norms: float) -> float:
    """Eq. (3)."""
    return coefficient * sum_of_norms / (loss + coefficient * sum_of_norms)


def zeroed(weight: Tensor, threshold: float, *, inputs: bool) -> Tensor:
    """ "We use a small threshold of 1e-4 to zero out these weights", channel by channel."""
    result = weight.clone()
    for filter_ in range(weight.shape[0]):
        if weight[filter_].abs().max() <= threshold:
            result[filter_] = 0.0
    if inputs:
        for channel in range(weight.shape[1]):
            if weight[:, channel].abs().max() <= threshold:
                result[:, channel] = 0.0
    return result


class Chain(nn.Module):
    """Three convolutions without batch norm, so that a step can be worked out, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, stride=2), nn.Conv2d(5, 4, (1, 3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        y: Tensor = self.head(x.mean(dim=(2, 3)))
        return y

    def convs(self) -> list[Tensor]:
        return [self.a.weight, self.b.weight, self.c.weight]
