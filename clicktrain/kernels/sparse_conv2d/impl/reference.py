"""The slow, obvious operator: unpack, then convolve densely. The oracle for every other implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.formats.packed import Structure, unpack_values
from clicktrain.kernels.impls import ConvProblem, Impl, Kernels, Phase


def prepare(structure: Structure, problem: ConvProblem, tilings: Mapping[Phase, Any]) -> Kernels:
    """Bind the operator to a layer; there is nothing to tune."""
    options = problem.stride, problem.padding, problem.dilation, problem.groups

    def convolve(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_conv2d(x, values, structure, bias, *options)

    return Kernels(convolve)


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
    """Convolve with the unpacked weight; arguments as in `Impl.run`, any device and dtype.

    Autograd gives the gradient of the values as the gather of the dense weight's gradient. Costs the time of
    the dense operator and, until the backward pass, the memory of the dense weight.
    """
    weight = unpack_values(structure, values)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


IMPL = Impl(
    "reference",
    lambda problem: [],
    prepare,
    sparse_conv2d,
    {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2},
    devices=(),
    oracle=True,
)
