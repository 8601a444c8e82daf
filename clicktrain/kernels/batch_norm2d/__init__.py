"""Batch norm, residual and ReLU in one pass over activations in the batch-blocked layout."""

from clicktrain.kernels.batch_norm2d.api import batch_norm_blocked
from clicktrain.kernels.batch_norm2d.ops import affine_relu_blocked, batch_norm2d_blocked

__all__ = ["affine_relu_blocked", "batch_norm2d_blocked", "batch_norm_blocked"]
