"""The batch-blocked layout ``[N/V, C, H, W, V]``: V images side by side in the innermost dimension.

A batch that is no multiple of V has padding lanes. What they hold in activations is never read; in gradients
they are zero, so that sums over images need no case of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 64
"""Bytes. Callers in a training step test it themselves before they call `vectors`."""


def block(x: Tensor, lanes: int) -> Tensor:
    """[N, C, H, W] -> [ceil(N / lanes), C, H, W, lanes], padded with zeros; any memory format."""
    n, c, h, w = x.shape
    blocks = -(-n // lanes)
    if n % lanes:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, blocks * lanes - n))
    return x.reshape(blocks, lanes, c, h, w).permute(0, 2, 3, 4, 1).contiguous()


def unblock(x: Tensor, n: int) -> Tensor:
    """Inverse of `block`: [ceil(n / V), C, H, W, V] -> [n, C, H, W], contiguous."""
    blocks, c, h, w, lanes = x.shape
    return x.permute(0, 4, 1, 2, 3).reshape(blocks * lanes, c, h, w)[:n].contiguous()


def vectors(x: Tensor) -> Tensor:
    """Return the tensor itself, or a copy that is contiguous and aligned to a SIMD vector."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)
