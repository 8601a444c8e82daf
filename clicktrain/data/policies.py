"""Which operations change which image by how much, for whole batches: RandAugment and TrivialAugment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clicktrain.data import image_operations as ops
from clicktrain.data.draws import Draws
from clicktrain.errors import UserError

OPERATIONS = (
    "identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize", "contrast",
    "brightness", "sharpness", "shear x", "shear y", "translate x", "translate y",
)  # fmt: skip
"""In the order of RandAugment, section 3 and Figure 2; TrivialAugment has the same."""

_SIGNED = frozenset(OPERATIONS) - {"identity", "autocontrast", "equalize", "solarize", "posterize"}
_MAGNITUDES = 31
"""Strengths of TrivialAugment, from none to full."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far each operation goes at full strength.

    Attributes:
        rotate: degrees.
        shear: pixels a row is shifted by per row.
        translate: share of the side.
        pixels: upper limit of that, in pixels.
        enhance: of color, contrast, brightness and sharpness, whose factor is 1 +- that.
        posterize: bits that are lost.
    """

    rotate: float
    shear: float
    translate: float
    pixels: float
    enhance: float
    posterize: int

    def levels(self, kinds: Tensor, share: Tensor, negative: Tensor, height: int, width: int) -> Tensor:
        """The amounts of the operations ``kinds`` [B] at strengths in [0, 1], float64 [B]."""
        sides = {"x": width, "y": height}
        reach = {
            "rotate": self.rotate,
            "solarize": 256.0,
            "posterize": float(self.posterize),
            **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), self.enhance),
            **{f"shear {axis}": self.shear for axis in sides},
            **{f"translate {axis}": min(self.translate * side, self.pixels) for axis, side in sides.items()},
        }
        most = torch.tensor([reach.get(name, 0.0) for name in OPERATIONS], dtype=torch.float64)
        signed = torch.tensor([name in _SIGNED for name in OPERATIONS])
        level = most[kinds] * share
        return torch.where(signed[kinds] & negative, -level, level)


STANDARD = Reach(rotate=30, shear=0.3, translate=150 / 331, pixels=float("inf"), enhance=0.9, posterize=4)
"""The ranges of AutoAugment (Cubuk et al. 2019, appendix), where translations are 150 of 331 pixels."""
WIDE = Reach(rotate=135, shear=0.99, translate=1.0, pixels=32, enhance=0.99, posterize=6)
"""The wide ranges of TrivialAugment."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A fixed number of operations, all equally likely, at one strength (Cubuk et al. 2020, section 3).

    Strength 0 changes nothing and more changes more in every operation, with either sign where there is one,
    as in later implementations; the paper's code has some operations that weaken with it. With a
    ``deviation`` each image and operation has a normally distributed strength; with a ``probability`` an
    operation is left out at times (both as Wightman et al. 2021 trained).

    Raises:
        UserError: a value out of range.
    """

    operations: int = 2
    """Operations, one after the other."""
    magnitude: float = 9.0
    """Strength, 0 to 10."""
    deviation: float = 0.0
    """Standard deviation of the strength."""
    probability: float = 1.0
    """That of each of the operations to be carried out."""

    def __post_init__(self) -> None:
        for name, low, high in (("operations", 1, 100), ("magnitude", 0, 10), ("deviation", 0, 10)):
            if not low <= (value := getattr(self, name)) <= high:
                raise UserError(f"randaugment_{name} is {value:g}: must be between {low} and {high}")
        if not 0 < self.probability <= 1:
            raise UserError(f"randaugment_probability is {self.probability:g}: must be above 0 and at most 1")

    def __call__(self, images: Tensor, fill: Tensor, draws: Draws) -> Tensor:
        """Change images, uint8 [B, C, H, W]; ``fill``, uint8 [C], is what comes into them from outside."""
        batch, _, height, width = images.shape
        for _ in range(self.operations):
            kinds, negative = _drawn(batch, draws)
            share = torch.full((batch,), self.magnitude / 10, dtype=torch.float64)
            if self.deviation:
                share = share + self.deviation / 10 * draws.randn(batch, dtype=torch.float64)
            if self.probability < 1:
                kinds = torch.where(draws.rand(batch) < self.probability, kinds, 0)
            levels = STANDARD.levels(kinds, share.clamp(0, 1), negative, height, width)
            images = apply(images, kinds, levels, fill)
        return images

    def describe(self) -> str:
        """What is done, in a clause."""
        strength = f"{self.magnitude:g}" + (f" +- {self.deviation:g}" if self.deviation else "")
        often = f", each with probability {self.probability:g}" if self.probability < 1 else ""
        return f"RandAugment ({self.operations} of strength {strength} of 10{often})"


@dataclass(frozen=True)
class TrivialAugment:
    """One operation at a strength drawn for each image, in wide ranges (Müller & Hutter 2021, section 3)."""

    def __call__(self, images: Tensor, fill: Tensor, draws: Draws) -> Tensor:
        """Change images: see `RandAugment.__call__`."""
        batch, _, height, width = images.shape
        kinds, negative = _drawn(batch, draws)
        share = draws.randint(_MAGNITUDES, batch).double() / (_MAGNITUDES - 1)
        return apply(images, kinds, WIDE.levels(kinds, share, negative, height, width), fill)

    def describe(self) -> str:
        """What is done, in a clause."""
        return "TrivialAugment"


def _drawn(batch: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Numbers of operations, and whether their sign is negative."""
    return draws.randint(len(OPERATIONS), batch), draws.rand(batch) < 0.5


_ENHANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": ops.color, "contrast": ops.contrast, "brightness": ops.brightness, "sharpness": ops.sharpness,
}  # fmt: skip


def apply(images: Tensor, kinds: Tensor, levels: Tensor, fill: Tensor) -> Tensor:
    """Carry out one operation on each image.

    Args:
        images: uint8 [B, C, H, W].
        kinds: numbers in `OPERATIONS`, int64 [B] on the CPU.
        levels: amounts in the operations' own units, see `Reach.levels`, float64 [B] on the CPU.
        fill: uint8 [C], on the images' device.
    """
    changed = images.clone()
    moved = torch.zeros(len(images), dtype=torch.bool)
    for number, name in enumerate(OPERATIONS[1:], start=1):
        chosen = kinds == number
        if name in _MATRICES:
            moved |= chosen
        elif chosen.any():
            rows, amount = chosen.nonzero().flatten().to(images.device), levels[chosen]
            own = images.index_select(0, rows)
            if name in _ENHANCE:
                own = _ENHANCE[name](own, 1 + amount)
            elif name == "posterize":
                own = ops.posterize(own, 8 - amount.round())
            elif name == "solarize":
                own = ops.solarize(own, 256 - amount)
            else:
                own = {"autocontrast": ops.autocontrast, "equalize": ops.equalize}[name](own)
            changed.index_copy_(0, rows, own)
    if moved.any():
        rows = moved.nonzero().flatten().to(images.device)
        height, width = images.shape[2:]
        matrices = torch.zeros(len(images), 2, 3, dtype=torch.float64)
        for name, made in _MATRICES.items():
            chosen = kinds == OPERATIONS.index(name)
            matrices[chosen] = made(levels[chosen], height, width)
        changed.index_copy_(0, rows, ops.transform(images.index_select(0, rows), matrices[moved], fill))
    return changed


def _sheared(along_x: bool) -> Callable[[Tensor, int, int], Tensor]:
    def matrices(level: Tensor, height: int, width: int) -> Tensor:
        zero = torch.zeros_like(level)
        return ops.shear(level, zero) if along_x else ops.shear(zero, level)

    return matrices


def _translated(along_x: bool) -> Callable[[Tensor, int, int], Tensor]:
    def matrices(level: Tensor, height: int, width: int) -> Tensor:
        zero, pixels = torch.zeros_like(level), level.round()
        return ops.translation(pixels, zero) if along_x else ops.translation(zero, pixels)

    return matrices


_MATRICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "rotate": ops.rotation,
    "shear x": _sheared(True),
    "shear y": _sheared(False),
    "translate x": _translated(True),
    "translate y": _translated(False),
}
"""The operations that move pixels: matrices for `image_operations.transform`, of levels [B]."""
