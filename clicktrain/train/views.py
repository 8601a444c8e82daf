"""Test-time augmentation: the mean of a network's outputs over several views of each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Views = Literal["none", "flip", "shift"]
"""Which views: the image alone; also its mirror image; also both shifted by a pixel."""

_SHIFT = 1
"""Pixels."""


def mean_logits(network: Callable[[Tensor], Tensor], x: Tensor, views: Views = "none") -> Tensor:
    """Logits [B, K] in fp32 of images [B, C, H, W], averaged over views (Jordan 2024, section 2.1).

    ``flip`` is the mean over an image and its mirror image. ``shift`` gives that half of the weight, the
    other half goes to the same two of the image moved down and right by a pixel and of the image moved up and
    left; what moves in at the edges is reflected.
    """
    if views == "none":
        return network(x).float()
    logits = _both(network, x)
    if views == "flip":
        return logits
    height, width = x.shape[2:]
    padded = F.pad(x, (_SHIFT,) * 4, mode="reflect")
    corners = (0, 2 * _SHIFT)
    moved = [padded[:, :, at : at + height, at : at + width] for at in corners]
    return (logits + torch.stack([_both(network, image) for image in moved]).mean(dim=0)) / 2


def _both(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (network(x).float() + network(x.flip(-1)).float()) / 2
