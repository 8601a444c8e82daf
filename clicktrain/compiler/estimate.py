"""Times from arithmetic and bytes, where nothing is measured: rough, to compare with each other."""

from __future__ import annotations

import math

import torch

from clicktrain.compiler.units import Unit, conv_of, dtype_of, max_pooling, shape_of
from clicktrain.kernels.layouts import Layout
from clicktrain.kernels.sparse_conv2d import PackedConv2d

GFLOPS_DENSE = 90.0
GFLOPS_SPARSE = 55.0
"""Speed of one core in dense and in sparse convolutions, 10^9 operations a second."""
GB_S = 10.0
"""Memory bandwidth of one core, 10^9 bytes a second."""

# Passes over a tensor of the output's size, forward and backward.
_PASSES = {"elementwise": 5.0, "cat": 4.0, "pool": 5.0, "global_pool": 2.0}
_BATCH_NORM, _ADDITION, _RELU = 8.0, 3.0, 5.0
_FUSED, _FUSED_ADDITION = 8.0, 2.0
_MAX_POOL = 3.0
_CONVERSION = 4.0


def unit_ms(
    unit: Unit, layout: Layout | None = None, gb_s: float | None = None, itemsize: int | None = None
) -> float:
    """Forward and backward of a unit on the example's batch, in milliseconds.

    A layout computes as many images as it fills up. ``gb_s`` is the measured speed of memory, ``itemsize``
    the bytes of an activation where it is not the dtype of the example's.
    """
    shape = shape_of(unit.inputs[0])
    filling = layout.filled(shape[0]) / shape[0] if layout else 1.0
    if unit.kind == "conv":
        return _conv_ms(unit, layout is not None) * filling
    larger = max(math.prod(shape), math.prod(shape_of(unit.output))) * (itemsize or dtype_of(unit).itemsize)
    if unit.kind == "batch_norm":
        added, relu = len(unit.inputs) > 1, unit.relu
        plain = _BATCH_NORM + added * _ADDITION + relu * _RELU
        passes = _FUSED + added * _FUSED_ADDITION if layout else plain
    elif layout and layout.max_pool is not None and max_pooling(unit) is not None:
        passes = _MAX_POOL
    else:
        passes = _PASSES[unit.kind]
    return _moving_ms(passes * larger * filling, gb_s)


def conversion_ms(layout: Layout, shape: tuple[int, ...], itemsize: int, trained: bool) -> float:
    """One value between a layout and the plain one, and its gradient's way back if it has one."""
    if len(shape) != 4:
        return 0.0
    passes = _CONVERSION if trained else _CONVERSION / 2
    return _moving_ms(passes * math.prod(shape[1:]) * layout.filled(shape[0]) * itemsize, None)


def _conv_ms(unit: Unit, sparse: bool) -> float:
    module = conv_of(unit)
    f, c, r, s = module.structure.shape if isinstance(module, PackedConv2d) else module.weight.shape
    n, _, h, w = shape_of(unit.output)
    weights = module.structure.nnz if sparse and isinstance(module, PackedConv2d) else f * c * r * s
    operations = 3 * 2 * weights * n * h * w
    return operations / (GFLOPS_SPARSE if sparse else GFLOPS_DENSE) / torch.get_num_threads() * 1e-6


def _moving_ms(size: float, gb_s: float | None) -> float:
    return size / ((gb_s or GB_S) * 1e6)
