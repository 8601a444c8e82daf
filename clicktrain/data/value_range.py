"""Pixel values beyond 8 bits: which range of them becomes 0 to 255."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clicktrain.errors import UserError


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
