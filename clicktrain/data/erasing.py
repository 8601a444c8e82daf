"""Boxes of images that are erased or blanked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clicktrain.data.draws import Draws

# Share of the image, and height over width, of an erased box (Zhong et al. 2020, its experiments).
_AREA, _ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)
_ATTEMPTS = 10


def inside(top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Pixels of each image of ``x`` that lie in its box; bounds [B, 1], bool [B, 1, H, W]."""
    rows, columns = torch.arange(x.shape[2]), torch.arange(x.shape[3])
    in_rows = ((rows >= top) & (rows < bottom)).to(x.device)
    in_columns = ((columns >= left) & (columns < right)).to(x.device)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def erased_boxes(count: int, height: int, width: int, draws: Draws) -> Tensor:
    """Draw the boxes that are erased (Zhong et al. 2020, Algorithm 1).

    The area is uniform in 2% to 40% of the image, the height over the width uniform in 0.3 to 1 / 0.3. The
    first of ten sizes that fits into the image is used, at any place where it fits (the algorithm draws
    place and size until both fit); if none does, the box is empty.

    Returns:
        int64 [count, 4]: top, left, height, width in pixels.
    """
    drawn = draws.rand(2, count, _ATTEMPTS, dim=1, dtype=torch.float64)
    place = draws.rand(2, count, dim=1, dtype=torch.float64)
    (small, large), (low, high) = _AREA, _ASPECT
    area = height * width * (small + (large - small) * drawn[0])
    aspect = low + (high - low) * drawn[1]
    sizes = torch.stack(((area * aspect).sqrt().round(), (area / aspect).sqrt().round()))
    fits = (sizes[0] <= height) & (sizes[1] <= width)
    first = fits.to(torch.uint8).argmax(dim=1)  # the first maximum
    box_height, box_width = sizes[:, torch.arange(count), first] * fits.any(dim=1)
    top = (place[0] * (height - box_height + 1)).floor()
    left = (place[1] * (width - box_width + 1)).floor()
    return torch.stack((top, left, box_height, box_width), dim=-1).long()


def random_erasing(
    x: Tensor,
    probability: float,
    fill: Literal["random", "mean"],
    mean: Tensor,
    std: Tensor,
    draws: Draws,
) -> Tensor:
    """Erase a box of each normalized image with that probability (Zhong et al. 2020, section 3).

    Args:
        x: float32 [B, C, H, W].
        probability: of each image to lose a box, see `erased_boxes`.
        fill: ``random``: uniform in 0 to 255 for each pixel and channel, before normalization (the paper's
            best); ``mean``: the mean color.
        mean, std: float32 [C], of pixels in [0, 1].
        draws: of the batch.
    """
    batch, channels, height, width = x.shape
    boxes = erased_boxes(batch, height, width, draws)
    boxes[:, 2:] *= (draws.rand(batch) < probability)[:, None]
    seeds = draws.randint(2**62, batch).tolist()
    top, left, rows, columns = boxes[:, :, None].unbind(dim=1)
    mask = inside(top, left, top + rows, left + columns, x)
    if fill == "mean":
        return x.masked_fill(mask, 0.0)
    noise, stream = [], torch.Generator()
    for seed, pixels in zip(seeds, (boxes[:, 2] * boxes[:, 3]).tolist(), strict=True):
        if pixels:  # a stream of its own, so that only as many bytes are drawn as pixels are erased
            stream.manual_seed(seed)
            noise.append(torch.randint(0, 256, (channels, pixels), dtype=torch.uint8, generator=stream))
    if not noise:
        return x
    owner = torch.arange(channels).view(-1, 1)
    channel = torch.cat([owner.expand_as(values).flatten() for values in noise]).to(x.device)
    values = torch.cat([values.flatten() for values in noise]).to(x.device)
    x = x.clone()
    x[mask.expand_as(x)] = ((values / 255 - mean[channel]) / std[channel]).to(x.dtype)
    return x


def cutout(x: Tensor, size: int, draws: Draws) -> Tensor:
    """Set a square of each normalized image to 0, the mean color (DeVries & Taylor 2017, section 3.2).

    The center is any pixel, so that part of the square may lie outside the image, as in the paper.
    """
    batch, _, height, width = x.shape
    top = draws.randint(height, batch, 1) - size // 2
    left = draws.randint(width, batch, 1) - size // 2
    return x.masked_fill(inside(top, left, top + size, left + size, x), 0.0)
