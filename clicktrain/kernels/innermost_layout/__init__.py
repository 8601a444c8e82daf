"""Activations with the batch innermost, ``[C, H, W, N]``: conversions, and layers beside convolutions."""

from clicktrain.kernels.innermost_layout.layer import (
    activation_innermost,
    as_images,
    as_innermost,
    batch_norm_innermost,
    enter,
    image_mean,
    images_of,
    leave,
    max_pool_innermost,
)

__all__ = [
    "activation_innermost",
    "as_images",
    "as_innermost",
    "batch_norm_innermost",
    "enter",
    "image_mean",
    "images_of",
    "leave",
    "max_pool_innermost",
]
