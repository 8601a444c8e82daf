"""Batches in which images and labels are mixed in pairs: mixup and CutMix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How the batches of a run are mixed; not at all by default.

    With both, half of the mixed batches are mixed up and the other half cut, as in Wightman et al. 2021.
    """

    mixup: float = 0.0
    """Parameter alpha of mixup's Beta distribution (0: off)."""
    cutmix: float = 0.0
    """Parameter alpha of CutMix's Beta distribution (0: off)."""
    probability: float = 1.0
    """Share of the batches that are mixed."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            _check(name, getattr(self, name))

    def __bool__(self) -> bool:
        """Whether any batch is mixed."""
        return bool(self.mixup or self.cutmix)

    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch: from images [B, C, H, W] and int64 [B] to images and soft targets [B, K]."""
        if self.probability < 1 and not torch.rand((), generator=generator) < self.probability:
            return mixup(x, y, num_classes, 0.0, generator)
        if self.mixup and self.cutmix:
            cut = bool(torch.rand((), generator=generator) < 0.5)
        else:
            cut = bool(self.cutmix)
        if cut:
            return cutmix(x, y, num_classes, self.cutmix, generator)
        return mixup(x, y, num_classes, self.mixup, generator)

    def describe(self) -> str:
        """What is done, in a clause; empty if nothing is."""
        kinds = [
            f"{name} (alpha {value:g})" for name in ("mixup", "cutmix") if (value := getattr(self, name))
        ]
        share = f" in {100 * self.probability:g}% of the batches" if self.probability < 1 else ""
        return f"{' or '.join(kinds)}{share}" if kinds else ""


def mixup(
    x: Tensor, y: Tensor, num_classes: int, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Blend each image and its label with another of the batch (Zhang et al. 2018, section 2).

    ``x = l x_i + (1 - l) x_j`` and likewise the labels, with one ``l ~ Beta(alpha, alpha)`` per batch and a
    random permutation as ``j``; an alpha of 0 blends nothing, one below is a UserError. From images
    [B, C, H, W] and int64 [B] to images and soft targets [B, K], both of the images' dtype.
    """
    _check("mixup", alpha)
    targets = F.one_hot(y, num_classes).to(x.dtype)
    if alpha == 0:
        return x, targets
    share = _beta_draw(alpha, generator)
    other = torch.randperm(len(x), generator=generator).to(x.device)
    return torch.lerp(x[other], x, share), torch.lerp(targets[other], targets, share)


def cutmix(
    x: Tensor, y: Tensor, num_classes: int, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace a box of each image by that of another, and the label by its area (Yun et al. 2019).

    Section 3.1: the box has ``sqrt(1 - l)`` of height and width, with one ``l ~ Beta(alpha, alpha)`` per
    batch, and a center anywhere in the image; what lies outside is cut off, and the labels are blended by
    the area that is left of it. The other images are a random permutation. An alpha of 0 replaces nothing,
    one below is a UserError. Shapes and dtypes as in `mixup`.
    """
    _check("cutmix", alpha)
    targets = F.one_hot(y, num_classes).to(x.dtype)
    if alpha == 0:
        return x, targets
    height, width = x.shape[2:]
    side = math.sqrt(1 - _beta_draw(alpha, generator))
    (top, bottom), (left, right) = (_span(size, side, generator) for size in (height, width))
    other = torch.randperm(len(x), generator=generator).to(x.device)
    mixed = x.clone()  # with its memory order
    mixed[:, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, torch.lerp(targets[other], targets, share)


def _span(size: int, share: float, generator: torch.Generator) -> tuple[int, int]:
    """The part inside of ``size`` pixels of a run of that share of them, around any pixel."""
    length = int(size * share)
    first = int(torch.randint(size, (), generator=generator)) - length // 2
    return max(first, 0), min(first + length, size)


def _check(name: str, alpha: float) -> None:
    if alpha < 0:
        usual = {"mixup": 0.2, "cutmix": 1}[name]
        raise UserError(f"{name}={alpha} is negative; 0 turns it off, {usual} is usual")


def _beta_draw(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha)."""
    return torch.sigmoid(_log_gamma_draw(alpha, generator) - _log_gamma_draw(alpha, generator)).item()


def _log_gamma_draw(alpha: float, generator: torch.Generator) -> Tensor:
    """Draw the logarithm of a Gamma(alpha) variable (Marsaglia & Tsang 2000).

    Two of them make a Beta draw. Done by hand because torch's public Beta and Gamma take no generator; in
    logarithms because a small ``alpha`` underflows.
    """
    shape = alpha + 1 if alpha < 1 else alpha
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        v = (1 + c * normal) ** 3
        u = torch.rand((), generator=generator, dtype=torch.float64)
        if v > 0 and u.log() < 0.5 * normal**2 + d - d * v + d * v.log():
            break
    log_draw = math.log(d) + v.log()
    if alpha < 1:  # Gamma(a) = Gamma(a + 1) U^(1/a)
        log_draw = log_draw + torch.rand((), generator=generator, dtype=torch.float64).log() / alpha
    return log_draw
