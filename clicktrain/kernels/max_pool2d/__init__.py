"""Max pooling of activations in the batch-blocked layout."""

from clicktrain.kernels.max_pool2d.ops import MOST_TAPS, Pooling, max_pool_blocked

__all__ = ["MOST_TAPS", "Pooling", "max_pool_blocked"]
