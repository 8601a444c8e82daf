"""The slow, obvious operator: unpack, then convolve densely. The oracle for every other implementation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clicktrain.formats.packed import Structure, unpack_values


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    structure: Structure,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Arguments as in `sparse_conv2d` of the package, pairs spelt out; any device and dtype.

    Autograd gives the gradient of the values as the gather of the dense weight's gradient. Costs the time of
    the dense operator and, until the backward pass, the memory of the dense weight.
    """
    weight = unpack_values(structure, values)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
