"""Between ``[N, C, H, W]`` and the batch-blocked layout ``[B, C, H, W, V]``: V images side by side."""

from clicktrain.kernels.blocked_layout.ops import block_batch, unblock_batch

__all__ = ["block_batch", "unblock_batch"]
