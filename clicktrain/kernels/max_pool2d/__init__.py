"""Max pooling of activations in the batch-blocked layout."""

from clicktrain.kernels.max_pool2d.api import Pooling, max_pool_blocked
from clicktrain.kernels.max_pool2d.launch import MOST_TAPS

__all__ = ["MOST_TAPS", "Pooling", "max_pool_blocked"]
