"""The values of a graph that may be converted between layouts, and what that costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from clicktrain.compiler.estimate import conversion_ms
from clicktrain.compiler.layout_choice import Value
from clicktrain.compiler.measure import measure_conversion
from clicktrain.compiler.plan import Activations, held_dtype
from clicktrain.compiler.units import Unit, shape_of
from clicktrain.graph import ModelGraph
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import C_TYPES


def trained_values(traced: ModelGraph) -> set[fx.Node]:
    """Nodes whose values depend on a trained parameter: their gradients are computed."""
    dependent: set[fx.Node] = set()
    for node in traced.graph.nodes:
        own = False
        if node.op == "call_module":
            own = any(parameter.requires_grad for parameter in traced.module(node).parameters())
        elif node.op == "get_attr":
            own = True
        if own or any(source in dependent for source in node.all_input_nodes):
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
    of_output = {unit.output: unit for unit in units}
    inside = {node for unit in units for node in unit.nodes}
    reads: dict[fx.Node, list[str | None]] = {}
    for unit in units:
        for node in unit.inputs:
            reads.setdefault(node, []).append(unit.name)
    for node in traced.graph.nodes:
        if node not in inside:
            for source in node.all_input_nodes:
                reads.setdefault(source, []).append(None)
    values = []
    for node, consumers in reads.items():
        unit_or_none = of_output.get(node)
        # Whatever layout a global pooling reads, what it gives is plain.
        from_graph = unit_or_none is None or unit_or_none.kind == "global_pool"
        producer = None if from_graph or unit_or_none is None else unit_or_none.name
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
