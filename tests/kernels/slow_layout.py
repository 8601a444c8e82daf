"""The batch-blocked layout ``[N/V, C, H, W, V]`` as PyTorch converts it: slow and obvious."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
