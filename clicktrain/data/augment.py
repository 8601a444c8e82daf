"""Augmentation of whole batches on their device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.data.draws import Draws, seeded_generator
from clicktrain.data.erasing import cutout, random_erasing
from clicktrain.errors import UserError

# Share of the image, and width over height, of a random resized crop (the ImageNet recipe).
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
_ATTEMPTS = 10


class Policy(Protocol):
    """Random changes of color and shape, drawn for each image of a batch (`clicktrain.data.policies`)."""

    def __call__(self, images: Tensor, fill: Tensor, draws: Draws) -> Tensor:
        """Change images, uint8 [B, C, H, W]; ``fill``, uint8 [C], is what comes into them from outside."""

    def describe(self) -> str:
        """What is done, in a clause."""


@dataclass(frozen=True)
class Augment:
    """The augmentation of training images, in this order; nothing by default.

    Raises:
        UserError: a negative size, an unknown padding, or both kinds of crop at once.
    """

    crop_padding: int = 0
    """Pad by this many pixels on each side and crop the original size at a random place (0: off)."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    alternating: bool = False
    """Mirror each image in every other epoch instead, half of the images in the first (Jordan 2024, 3.6)."""
    cutout: int = 0
    """Set a square of this side around a random center to the mean color (0: off; DeVries & Taylor 2017)."""
    resized_crop: bool = False
    """Crop 8% to 100% of the area at an aspect of 3/4 to 4/3 and resize it to the original size."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """What ``crop_padding`` pads with: black, or the image mirrored at its edge."""
    policy: Policy | None = None
    """Changes of color and shape, after crop and flip."""
    erasing: float = 0.0
    """Probability that a box of an image is erased (0: off; Zhong et al. 2020)."""
    erasing_fill: Literal["random", "mean"] = "random"
    """What an erased box is filled with: a random value for each pixel and channel, or the mean color."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise UserError(f"augment {name}={getattr(self, name)} is negative; 0 turns it off")
        if not 0 <= self.erasing <= 1:
            raise UserError(f"augment erasing={self.erasing:g} is no probability; 0 turns it off")
        if self.padding not in ("zeros", "reflect"):
            raise UserError(f"augment padding={self.padding!r} is unknown; 'zeros' and 'reflect' exist")
        if self.flip and self.alternating:
            raise UserError("augment flip and alternating are two ways of mirroring; choose one of them")
        if self.crop_padding and self.resized_crop:
            raise UserError("augment crop_padding and resized_crop are two kinds of crop; choose one of them")

    @classmethod
    def preset(cls, name: str) -> Augment:
        """Return a usual recipe; UserError unless it is none, cifar, cifarnet, imagenet or digits."""
        if name not in _PRESETS:
            raise UserError(f"augment {name!r} is unknown; {', '.join(_PRESETS)} exist")
        return _PRESETS[name]

    def describe(self) -> str:
        """All of it in a few words, in the order in which it is done."""
        mirrored = "mirrored in every other epoch" if self.alternating else "mirrored at random"
        parts = (
            (self.crop_padding, f"shifted by up to {self.crop_padding} pixels"),
            (self.resized_crop, "cropped and resized at random"),
            (self.flip or self.alternating, mirrored),
            (self.policy is not None, "" if self.policy is None else self.policy.describe()),
            (self.cutout, f"cutout of {self.cutout} pixels"),
            (self.erasing, f"{100 * self.erasing:g}% with a box erased ({self.erasing_fill})"),
        )
        return ", ".join(words for on, words in parts if on) or "as they are"

    def check(self, height: int, width: int) -> None:
        """Raise UserError for padding or cutout too large for the images."""
        if self.padding == "reflect" and self.crop_padding >= min(height, width):
            raise UserError(
                f"augment crop_padding={self.crop_padding} cannot mirror images of {height}x{width}; "
                f"at most {min(height, width) - 1} is possible"
            )
        if self.cutout > max(height, width):
            raise UserError(
                f"augment cutout={self.cutout} is larger than the images, {height}x{width}; "
                f"at most {max(height, width)} makes sense"
            )


_PRESETS = {
    "none": Augment(),
    "cifar": Augment(crop_padding=4, flip=True),
    "cifarnet": Augment(crop_padding=2, padding="reflect", alternating=True),
    "imagenet": Augment(resized_crop=True, flip=True),
    "digits": Augment(crop_padding=1),  # a mirrored 2 is no 2
}


def augment_and_normalize(
    images: Tensor,
    augment: Augment,
    mean: Tensor,
    std: Tensor,
    draws: Draws,
    mirrored: Tensor | None = None,
) -> Tensor:
    """Augment a batch, uint8 [B, C, H, W] on any device, and normalize it to float32.

    ``mean`` and ``std``, float32 [C] on that device, are of pixels in [0, 1]. ``mirrored``, bool [B], are the
    images that alternating flips mirror this time.
    """
    if augment.crop_padding:
        images = random_crop(images, augment.crop_padding, augment.padding, draws)
    if augment.flip:
        images = random_flip(images, draws)
    elif augment.alternating and mirrored is not None:
        images = _flip(images, mirrored)
    x = random_resized_crop(images, draws) if augment.resized_crop else images
    if augment.policy is not None:
        pixels = x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).to(torch.uint8)
        x = augment.policy(pixels, (mean * 255).round().to(torch.uint8), draws)
    x = x.to(torch.float32, copy=x is images)
    x = x.sub_((mean * 255).view(-1, 1, 1)).mul_((1 / (std * 255)).view(-1, 1, 1))
    if augment.cutout:
        x = cutout(x, augment.cutout, draws)
    if augment.erasing:
        x = random_erasing(x, augment.erasing, augment.erasing_fill, mean, std, draws)
    return x


def random_crop(images: Tensor, padding: int, mode: Literal["zeros", "reflect"], draws: Draws) -> Tensor:
    """Pad each image of [B, C, H, W] and crop its original size at a place of its own, all equally likely."""
    batch, channels, height, width = images.shape
    if mode == "zeros":
        padded = F.pad(images, (padding,) * 4)
    else:
        padded = images[:, :, _mirrored(height, padding, images.device)]
        padded = padded[:, :, :, _mirrored(width, padding, images.device)]
    offsets = draws.randint(2 * padding + 1, 2, batch, dim=1).to(images.device)
    padded_height, padded_width = padded.shape[2:]
    # Each row of the result is a run of `width` pixels of the flat batch, and all such runs are the rows of
    # an overlapping view: one row gather, several times faster on a CPU than gathering pixels.
    runs = padded.reshape(-1).unfold(0, width, 1)
    planes = torch.arange(batch * channels, device=images.device).view(batch, channels, 1)
    rows = torch.arange(height, device=images.device) + offsets[0].view(batch, 1, 1)
    first = (planes * padded_height + rows) * padded_width + offsets[1].view(batch, 1, 1)
    return runs.index_select(0, first.flatten()).view(batch, channels, height, width)


def _mirrored(size: int, padding: int, device: torch.device) -> Tensor:
    """Indices that reflect a row at its ends, without repeating the edge: 2 1 0 1 2 1 0."""
    index = torch.arange(-padding, size + padding, device=device).abs()
    return size - 1 - (size - 1 - index).abs()


def random_flip(images: Tensor, draws: Draws) -> Tensor:
    """Mirror each image of [B, C, H, W] left and right with probability 1/2."""
    return _flip(images, draws.rand(len(images)) < 0.5)


def _flip(images: Tensor, mirrored: Tensor) -> Tensor:
    chosen = mirrored.nonzero().flatten().to(images.device)
    return images.index_copy(0, chosen, images.index_select(0, chosen).flip(-1))


def mirrored_in_epoch(num_images: int, seed: int, epoch: int) -> Tensor:
    """Which images alternating flips mirror in an epoch, bool [num_images] (Jordan 2024, section 3.6).

    Half of them, drawn by ``seed``, in the first epoch; then the others, and so on in turns.
    """
    first = torch.rand(num_images, generator=seeded_generator("alternating flip", seed)) < 0.5
    return first ^ bool(epoch % 2)


def random_boxes(count: int, height: int, width: int, draws: Draws) -> Tensor:
    """Draw the boxes of random resized crops (Szegedy et al. 2015, the ImageNet recipe).

    The area is uniform in 8% to 100% of the image, the logarithm of the aspect uniform in 3/4 to 4/3. The
    first of ten draws that fits is used, or else the largest central box of an allowed aspect.

    Returns:
        int64 [count, 4]: top, left, height, width in pixels.
    """
    drawn = draws.rand(4, count, _ATTEMPTS, dim=1, dtype=torch.float64)
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * drawn[0])
    low, high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    aspect = (low + (high - low) * drawn[1]).exp()
    box_width = (area * aspect).sqrt().round()
    box_height = (area / aspect).sqrt().round()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    top = (drawn[2] * (height - box_height + 1)).floor()
    left = (drawn[3] * (width - box_width + 1)).floor()
    boxes = torch.stack((top, left, box_height, box_width), dim=-1).long()
    first = fits.to(torch.uint8).argmax(dim=1)  # the first maximum
    chosen = boxes[torch.arange(count), first]
    largest_width = min(width, round(height * _ASPECT[1]))
    largest_height = min(height, round(width / _ASPECT[0]))
    central = ((height - largest_height) // 2, (width - largest_width) // 2, largest_height, largest_width)
    return torch.where(fits.any(dim=1, keepdim=True), chosen, torch.tensor(central))


def random_resized_crop(images: Tensor, draws: Draws) -> Tensor:
    """Crop a random box of each image and resize it, bilinearly, to the size of the image.

    From uint8 [B, C, H, W] to float32, 0 to 255.
    """
    batch, _, height, width = images.shape
    top, left, box_height, box_width = random_boxes(batch, height, width, draws).to(torch.float32).unbind(1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = box_width / width
    theta[:, 0, 2] = (2 * left + box_width) / width - 1
    theta[:, 1, 1] = box_height / height
    theta[:, 1, 2] = (2 * top + box_height) / height - 1
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.to(torch.float32), grid, padding_mode="border", align_corners=False)
