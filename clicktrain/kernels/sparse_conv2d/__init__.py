"""Convolution with packed weights."""

from clicktrain.kernels.sparse_conv2d.api import IMPLS, Padding, sparse_conv2d
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d, refusal

__all__ = ["IMPLS", "PackedConv2d", "Padding", "refusal", "sparse_conv2d"]
