"""A first convolution that whitens patches of the training images, and stays as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.errors import UserError

IMAGES = 5000
"""Images that the patches are taken from, as in the paper."""
_NOISE = 5e-4
"""Added to each variance, for images of [0, 1] that were normalized."""


@torch.no_grad()
def whiten_(layer: nn.Conv2d, images: Tensor) -> None:
    """Set a convolution's weights to the principal components of image patches, and train them no more.

    Filters 0 to k - 1 are the eigenvectors of the patches' covariance, each divided by the root of its
    variance, the largest first; filters k to 2k - 1 are their negatives, so that an activation after the
    layer loses nothing; others are left as they were. k is C * R * S, or half of the filters if that is less.
    The bias, if there is one, is still trained. Jordan 2024 (arXiv:2404.00498), section 3.2.

    Args:
        layer: with ``groups`` 1.
        images: float [N, C, H, W], normalized as for training; a few thousand.

    Raises:
        UserError: the layer has groups, or images have other channels, or fewer pixels than the kernel.
    """
    channels, (height, width) = layer.in_channels, layer.kernel_size
    if layer.groups != 1:
        raise UserError("whitening needs a first convolution without groups")
    if images.shape[1] != channels or images.shape[2] < height or images.shape[3] < width:
        raise UserError(
            f"whitening a convolution of {channels} channels and {height}x{width} kernels needs such images, "
            f"got {tuple(images.shape)}"
        )
    length = channels * height * width
    # Block by block: all patches of 5,000 images at once are half a gigabyte.
    total, outer, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length, length).double(), 0
    for part in torch.split(images.float().cpu(), 500):
        patches = F.unfold(part, (height, width)).transpose(1, 2).reshape(-1, length).double()
        total += patches.sum(0)
        outer += patches.T @ patches
        count += len(patches)
    mean = total / count
    variances, vectors = torch.linalg.eigh(outer / count - mean[:, None] * mean)
    components = (vectors / (variances + _NOISE).sqrt()).T.flip(0)
    # An eigenvector's sign is the library's choice: make it the same everywhere.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * largest.sign()
    k = min(length, layer.out_channels // 2)
    both = torch.cat([components[:k], -components[:k]]).view(-1, channels, height, width)
    layer.weight[: 2 * k] = both.to(layer.weight)
    layer.weight.requires_grad_(False)
