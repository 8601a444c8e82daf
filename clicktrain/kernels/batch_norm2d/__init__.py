"""Pooling, batch norm, residual and activation in one pass over activations in the batch-blocked layout."""

from clicktrain.kernels.batch_norm2d.layer import (
    activation_blocked,
    batch_norm_blocked,
    uses_batch_statistics,
)
from clicktrain.kernels.batch_norm2d.ops import (
    affine_blocked,
    batch_norm2d_blocked,
    batch_norm2d_blocked_given,
)
from clicktrain.kernels.batch_norm2d.pooled import max_pool2d_batch_norm2d_blocked

__all__ = [
    "activation_blocked",
    "affine_blocked",
    "batch_norm2d_blocked",
    "batch_norm2d_blocked_given",
    "batch_norm_blocked",
    "max_pool2d_batch_norm2d_blocked",
    "uses_batch_statistics",
]
