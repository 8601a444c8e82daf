"""Mean and standard deviation per channel, from exact integer sums."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CHUNK = 256


def channel_sums(images: Tensor) -> Tensor:
    """Sum the pixels and their squares, per image and channel: uint8 [N, C, H, W] to int64 [N, C, 2].

    Exact, so that the statistics of any subset of the images follow from them.
    """
    sums = torch.empty(images.shape[0], images.shape[1], 2, dtype=torch.int64)
    for start in range(0, len(images), _CHUNK):
        # int32 holds a square (at most 65025); the sums are accumulated in int64
        pixels = images[start : start + _CHUNK].flatten(2).to(torch.int32)
        sums[start : start + _CHUNK, :, 0] = pixels.sum(-1)
        sums[start : start + _CHUNK, :, 1] = pixels.square_().sum(-1)
    return sums


def mean_and_std(sums: Tensor, pixels_per_image: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Turn `channel_sums` into mean and (population) standard deviation of pixels in [0, 1], per channel.

    The latter is 1 for a channel that never changes, so that dividing by it does no harm.
    """
    total = sums.sum(0).to(torch.float64) / (len(sums) * pixels_per_image)
    mean = total[:, 0] / 255
    variance = total[:, 1] / 255**2 - mean.square()
    std = variance.clamp(min=0).sqrt()
    std = torch.where(std < 1e-6, torch.ones_like(std), std)
    return tuple(mean.tolist()), tuple(std.tolist())
