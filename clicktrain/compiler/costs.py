"""What units and conversions cost: estimated from arithmetic and bytes, or measured. Estimates are rough."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from clicktrain.compiler.layout_choice import Value
from clicktrain.compiler.measure import measure_conversion
from clicktrain.compiler.plan import Activations, held_dtype
from clicktrain.compiler.units import Unit, conv_of, dtype_of, max_pooling, shape_of
from clicktrain.graph import ModelGraph
from clicktrain.kernels.activations import NONE
from clicktrain.kernels.layouts import LAYOUTS, Layout
from clicktrain.kernels.native import C_TYPES
from clicktrain.kernels.sparse_conv2d import PackedConv2d

GFLOPS_DENSE = 90.0
GFLOPS_SPARSE = 55.0
"""Speed of one core in dense and in sparse convolutions, 10^9 operations a second."""
GB_S = 10.0
"""Memory bandwidth of one core, 10^9 bytes a second."""

# Passes over a tensor of the output's size, forward and backward.
_PASSES = {"elementwise": 5.0, "cat": 4.0, "pool": 5.0, "global_pool": 2.0}
_BATCH_NORM, _ADDITION, _ACTIVATION = 8.0, 3.0, 5.0
_FUSED, _FUSED_ADDITION, _FUSED_POOL, _FUSED_ACTIVATION = 8.0, 2.0, 2.0, 4.5
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
        added, active = len(unit.inputs) > 1, unit.activation != NONE
        maxima = math.prod(shape_of(unit.output)) / math.prod(shape) if unit.pooled else 1.0
        plain = (_BATCH_NORM + added * _ADDITION + active * _ACTIVATION) * maxima
        fused = (_FUSED + added * _FUSED_ADDITION) * maxima
        pooling = unit.pooled * (_FUSED_POOL if layout else _PASSES["pool"])
        passes = (fused if layout else plain) + pooling
    elif layout and layout.max_pool is not None and max_pooling(unit) is not None:
        passes = _MAX_POOL
    elif unit.kind == "elementwise" and layout and layout.activation is not None and unit.activation != NONE:
        passes = _FUSED_ACTIVATION
    else:
        passes = _PASSES[unit.kind]
    return _moving_ms(passes * larger * filling, gb_s)


def conversion_ms(layout: Layout, shape: tuple[int, ...], itemsize: int, trained: bool) -> float:
    """Estimate the conversion of one activation between a layout and PyTorch's, and of its gradient."""
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


def trained_values(traced: ModelGraph) -> set[fx.Node]:
    """Nodes whose values depend on a trained parameter: their gradients are computed."""
    dependent: set[fx.Node] = set()
    for node in traced.graph.nodes:
        own = node.op == "get_attr"
        if node.op == "call_module":
            own = any(parameter.requires_grad for parameter in traced.module(node).parameters())
        if own or not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def values_of(
    traced: ModelGraph,
    units: Sequence[Unit],
    trained: Collection[fx.Node],
    layouts: Sequence[str],
    activations: Activations | None,
) -> list[Value]:
    """List the values that may be converted, with who computes and reads each, and the costs.

    Conversions are measured for ``activations``, and estimated where these are None.
    """
    known: dict[tuple[object, ...], dict[str, tuple[float, float]]] = {}
    device = next(traced.model.parameters()).device
    of_output: Mapping[fx.Node, Unit] = {unit.output: unit for unit in units}
    inside = {node for unit in units for node in unit.nodes}
    reads: dict[fx.Node, list[str | None]] = {}
    for own in units:
        for node in own.inputs:
            reads.setdefault(node, []).append(own.name)
    for node in traced.graph.nodes:
        if node not in inside:
            for source in node.all_input_nodes:
                reads.setdefault(source, []).append(None)
    values = []
    for node, consumers in reads.items():
        unit = of_output.get(node)
        # Whatever layout a global pooling reads, what it gives is plain.
        producer = None if unit is None or unit.kind == "global_pool" else unit.name
        shape, dtype = shape_of(node), getattr(node.meta.get("tensor_meta"), "dtype", None)
        key = (shape, dtype, node in trained)
        if key not in known:
            known[key] = {}
            for name in layouts:
                layout = LAYOUTS[name]
                if activations is not None and len(shape) == 4 and dtype in C_TYPES:
                    held = held_dtype(name, activations, dtype)
                    ms = measure_conversion(layout, shape, dtype, held, node in trained, device)
                else:
                    ms = (conversion_ms(layout, shape, getattr(dtype, "itemsize", 4), node in trained),) * 2
                known[key][name] = ms
        enter, leave = ({name: ms[i] for name, ms in known[key].items()} for i in (0, 1))
        values.append(Value(producer, tuple(consumers), enter, leave))
    return values
