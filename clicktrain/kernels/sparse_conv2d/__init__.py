"""Convolution with packed weights."""

from clicktrain.kernels.sparse_conv2d.api import IMPLS, Padding, sparse_conv2d
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d, PackedLinear
from clicktrain.kernels.sparse_conv2d.packed_layer import PackedLayer, refusal

__all__ = ["IMPLS", "PackedConv2d", "PackedLayer", "PackedLinear", "Padding", "refusal", "sparse_conv2d"]
