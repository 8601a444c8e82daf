"""Batch norm, residual and ReLU in one pass over activations in the batch-blocked layout."""

from clicktrain.kernels.batch_norm2d.ops import (
    affine_relu_blocked,
    batch_norm2d_blocked,
    batch_norm2d_blocked_given,
    batch_norm_blocked,
    uses_batch_statistics,
)

__all__ = [
    "affine_relu_blocked",
    "batch_norm2d_blocked",
    "batch_norm2d_blocked_given",
    "batch_norm_blocked",
    "uses_batch_statistics",
]
