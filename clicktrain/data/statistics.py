"""Statistics of pixel values: mean and deviation per channel, and the range of values beyond 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clicktrain.errors import UserError

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


@dataclass(frozen=True)
class ValueRange:
    """The values that become 0 and 255; those outside are clipped, those between scaled linearly.

    It belongs to a data set, not to an image: all images of a data set are scaled alike, so that a darker
    image stays darker. `EIGHT_BIT` is the range of ordinary images, whose pixels are taken as they are.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise UserError(f"pixel values from {self.low} to {self.high} are no range: low, high is needed")

    def including(self, other: ValueRange | None) -> ValueRange:
        """The smallest range that holds both."""
        if other is None:
            return self
        return ValueRange(min(self.low, other.low), max(self.high, other.high))

    def tensor(self) -> Tensor:
        """Both, float64 [2]."""
        return torch.tensor([self.low, self.high], dtype=torch.float64)

    def to_8_bit(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Scale values of any numeric dtype to uint8, rounded.

        A range of a single value has no scale; such values stay constant (floats from 0 to 1 times 255,
        others clipped to 0 to 255).
        """
        wide = values.astype(np.float64)
        if self.high > self.low:
            wide = (wide - self.low) * (255 / (self.high - self.low))
        elif values.dtype.kind == "f" and 0 <= self.low <= 1:
            wide *= 255
        rounded: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(wide).clip(0, 255).astype(np.uint8)
        return rounded

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


EIGHT_BIT = ValueRange(0, 255)


def range_of(values: np.ndarray[Any, Any], name: str) -> ValueRange:
    """Smallest and largest value of an image.

    Raises:
        UserError: NaN or infinite values; names the image.
    """
    low, high = float(values.min()), float(values.max())  # a NaN anywhere makes both NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name} has pixels that are NaN or infinite; replace them with numbers")
    return ValueRange(low, high)
