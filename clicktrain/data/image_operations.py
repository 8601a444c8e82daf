"""Changes of color and shape to uint8 images, each image of a batch by an amount of its own.

What each one does to an image is what Pillow's function of that name does (`ImageEnhance`, `ImageOps`,
`Image.transform`); the tests compare the two. All take and give uint8 [B, C, H, W], on any device; amounts
are [B], on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (19595, 38470, 7471)
"""Weights of red, green and blue in 65,536ths: ITU-R 601, as Pillow rounds them."""
_SMOOTH = ((1, 1, 1), (1, 5, 1), (1, 1, 1))
"""Pillow's filter SMOOTH, whose sum is 13."""
_SHADES = 256


def _column(amount: Tensor, images: Tensor) -> Tensor:
    return amount.to(images.device, torch.float32).view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    """Brightness, int32 [B, 1, H, W]: by the eye for three channels, else their mean."""
    if images.shape[1] != 3:
        return images.to(torch.float32).mean(dim=1, keepdim=True).round_().to(torch.int32)
    parts = [images[:, i : i + 1].to(torch.int32) * weight for i, weight in enumerate(_LUMA)]
    return (parts[0] + parts[1] + parts[2] + 0x8000) >> 16


def _blend(plain: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``plain + factor * (images - plain)``, cut off at 0 and 255 and rounded down, as Pillow does."""
    plain = plain.to(torch.float32)
    mixed = plain + _column(factor, images) * (images.to(torch.float32) - plain)
    return mixed.clamp_(0, _SHADES - 1).to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: 0 is black, 1 the image."""
    return _blend(torch.zeros((), device=images.device), images, factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image without colors."""
    return _blend(_gray(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean brightness of the image."""
    gray = _gray(images)
    mean = gray.sum(dim=(1, 2, 3), dtype=torch.int64).double() / gray[0].numel()
    return _blend((mean + 0.5).floor().view(-1, 1, 1, 1), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the smoothed image, whose edge of one pixel is the image's."""
    batch, channels, height, width = images.shape
    if min(height, width) < 3:
        return images
    kernel = torch.tensor(_SMOOTH, dtype=torch.float32, device=images.device)
    planes = images.reshape(-1, 1, height, width).to(torch.float32)
    inner = F.conv2d(planes, kernel.view(1, 1, 3, 3)).div_(kernel.sum()).add_(0.5).floor_()
    planes[:, :, 1:-1, 1:-1] = inner
    return _blend(planes.view(batch, channels, height, width), images, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits of each value, 1 to 8."""
    masks = (_SHADES - (1 << (8 - bits.long()))).to(torch.uint8)
    return images & masks.to(images.device).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert all values of at least ``threshold``; 256 inverts none."""
    limit = threshold.to(images.device).view(-1, 1, 1, 1)
    return torch.where(images < limit, images, _SHADES - 1 - images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch the values of each channel of each image to 0 to 255; a channel of one value stays."""
    low = images.amin(dim=(2, 3)).double()
    high = images.amax(dim=(2, 3)).double()
    shades = torch.arange(_SHADES, device=images.device, dtype=torch.float64)
    scale = torch.where(high > low, shades[-1].div((high - low).clamp_min(1)), 1.0)
    offset = torch.where(high > low, -low * scale, 0.0)
    table = (shades * scale[:, :, None] + offset[:, :, None]).clamp_(0, _SHADES - 1)
    return _looked_up(images, table.to(torch.uint8))


def equalize(images: Tensor) -> Tensor:
    """Spread the values of each channel of each image so that all are about equally frequent."""
    batch, channels = images.shape[:2]
    rows = torch.arange(batch * channels, device=images.device).view(-1, 1) * _SHADES
    flat = images.reshape(batch * channels, -1).long() + rows
    counts = torch.bincount(flat.flatten(), minlength=batch * channels * _SHADES).view(-1, _SHADES)
    present = counts > 0
    last = _SHADES - 1 - present.flip(1).to(torch.uint8).argmax(dim=1, keepdim=True)
    step = (counts.sum(dim=1, keepdim=True) - counts.gather(1, last)) // (_SHADES - 1)
    below = counts.cumsum(dim=1) - counts
    spread = ((below + step // 2) // step.clamp_min(1)).clamp_(0, _SHADES - 1)
    same = torch.arange(_SHADES, device=images.device).expand_as(spread)
    table = torch.where((step > 0) & (present.sum(dim=1, keepdim=True) > 1), spread, same)
    return _looked_up(images, table.view(batch, channels, _SHADES).to(torch.uint8))


def _looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace each value by that in the table of its image and channel, uint8 [B, C, 256]."""
    return table.gather(2, images.flatten(2).long()).view(images.shape)


def transform(images: Tensor, matrices: Tensor, fill: Tensor) -> Tensor:
    """Move pixels by an affine map, bilinearly; what comes from outside the image is ``fill``.

    Args:
        images: uint8 [B, C, H, W].
        matrices: float [B, 2, 3]: where in the image a pixel (x, y, 1) of the result comes from, in pixels
            from the top left corner; the first pixel's center is at (0.5, 0.5).
        fill: uint8 [C], on the images' device.
    """
    height, width = images.shape[2:]
    m = matrices.to(images.device, torch.float32).view(-1, 6, 1, 1)
    x = torch.arange(width, device=images.device) + 0.5
    y = (torch.arange(height, device=images.device) + 0.5).view(-1, 1)
    from_x = m[:, 0] * x + m[:, 1] * y + m[:, 2]
    from_y = m[:, 3] * x + m[:, 4] * y + m[:, 5]
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack((2 * from_x / width - 1, 2 * from_y / height - 1), dim=-1)
    moved = F.grid_sample(images.to(torch.float32), grid, padding_mode="border", align_corners=False)
    moved = moved.round_().clamp_(0, _SHADES - 1).to(torch.uint8)
    return torch.where(inside[:, None], moved, fill.view(1, -1, 1, 1))


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """Matrices for `transform` that turn images counterclockwise around their centers, float64 [B, 2, 3]."""
    angle = -torch.deg2rad(degrees.double())
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    rows = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def shear(x: Tensor, y: Tensor) -> Tensor:
    """Matrices for `transform` that shift rows by ``x`` times their height, columns by ``y`` times theirs."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack((one, x, zero, y, one, zero), dim=1).view(-1, 2, 3)


def translation(x: Tensor, y: Tensor) -> Tensor:
    """Matrices for `transform` that shift images by whole pixels to the left and upwards."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return torch.stack((one, zero, x, zero, one, y), dim=1).view(-1, 2, 3)
