"""Which operator each layer gets, for the graph as a whole: ClickTrain section 5.4.

The paper decides layer by layer, by the share of zeros. Here an operator brings its layout with it, and a
conversion between two layouts costs about as much as a batch norm; so all nodes are decided together, by a
minimum cut over costs and conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import fx, nn

from clicktrain.compiler import remembered
from clicktrain.compiler.estimate import conversion_ms, unit_ms
from clicktrain.compiler.measure import (
    LayerTimes,
    measure_batch_norms,
    measure_conversion,
    measure_convolutions,
    measure_memory,
)
from clicktrain.compiler.min_cut import Value, cheapest_layouts
from clicktrain.compiler.norm_statistics import NormTimes, measure_statistics
from clicktrain.compiler.plan import DENSE, Choice, LoweringPlan, Machine
from clicktrain.compiler.trace import Traced
from clicktrain.compiler.units import Unit, find_units, shape_of
from clicktrain.kernels.native import C_TYPES
from clicktrain.kernels.sparse_conv2d import PackedConv2d

RULES = ("measured", "density", "sparse")
DENSITY_LIMIT = 0.35
"""ClickTrain section 5.4: sparse where more than 65% of the weights are zero."""


def make_plan(
    traced: Traced, batch: int, rule: str, dtypes: Sequence[str] = ("fp32",), remember: bool = True
) -> LoweringPlan:
    """Decide everything about a traced model.

    Args:
        traced: with the shapes of the example.
        batch: images in the example.
        rule: one of `RULES`.
        dtypes: what dense convolutions may compute in.
        remember: take a plan that was measured before on this machine, or keep this one for later.
    """
    units, refused = find_units(traced)
    trained = trained_values(traced)
    place = remembered.place(units, trained, batch, dtypes)
    if rule == "measured" and remember and (known := remembered.read(place)) is not None:
        return known
    convolutions = [unit for unit in units if unit.kind == "conv"]
    times: dict[str, LayerTimes] = {}
    costs: dict[str, tuple[float | None, float | None]] = {
        unit.name: (unit_ms(unit, blocked=False), unit_ms(unit, blocked=True)) for unit in units
    }
    norms: dict[str, tuple[float, float]] = {}
    gb_s = None
    if rule == "measured":
        gb_s = measure_memory()
        times = measure_convolutions(
            convolutions, {u.name: u.inputs[0] in trained for u in convolutions}, dtypes
        )
        norms = measure_batch_norms([unit for unit in units if unit.kind == "batch_norm"])
        costs = {
            unit.name: (unit_ms(unit, blocked=False, gb_s=gb_s), unit_ms(unit, blocked=True, gb_s=gb_s))
            for unit in units
        }
        costs.update(norms)
    dense = dense_ways(times)
    for unit in convolutions:
        if rule == "measured":
            costs[unit.name] = (times[unit.name].dense[dense[unit.name]], times[unit.name].sparse)
        elif rule == "density":
            # The paper decides a convolution before its neighbours are looked at.
            costs[unit.name] = (None, 0.0) if density_of(unit.module) < DENSITY_LIMIT else (0.0, None)
    if rule == "sparse":
        blocked = {unit.name: True for unit in units}
    else:
        blocked = cheapest_layouts(costs, values_of(traced, units, trained, rule == "measured"))
    statistics: dict[str, NormTimes] = {}
    if rule == "measured":
        statistics = measure_statistics(units, blocked, {name: times[name].tilings for name in times})
    choices = []
    for unit in units:
        if unit.kind == "conv":
            way = dense.get(unit.name, DENSE[0])
            choice = _conv_choice(unit, blocked[unit.name], times.get(unit.name), way, rule)
            choices.append(_with_statistics(choice, statistics.get(unit.name)))
        else:
            choices.append(_choice(unit, blocked[unit.name], norms.get(unit.name)))
    choices += [
        Choice(name, "conv", "plain", refused=(f"sparse blocked: {reason}",))
        for name, reason in refused.items()
    ]
    notes = tuple(f"{path} is not traced: {reason}" for path, reason in traced.opaque.items())
    plan = LoweringPlan(rule, batch, Machine.here(), tuple(choices), notes)
    if rule == "measured" and remember:
        remembered.keep(place, plan)
    return plan


def density_of(module: nn.Module | None) -> float:
    """Kept weights / all weights of a layer; 1 for what is not packed."""
    return module.structure.density if isinstance(module, PackedConv2d) else 1.0


def dense_ways(times: Mapping[str, LayerTimes]) -> dict[str, str]:
    """How each convolution runs where it is dense: the fastest number type, in one memory format for all.

    One format, because the activations between dense layers keep it; with two, each would convert its input.
    """
    if not times:
        return {}
    formats = dict.fromkeys(name.split()[0] for name in DENSE)

    def fastest(layer: LayerTimes, memory: str) -> str:
        return min((n for n in layer.dense if n.startswith(memory)), key=lambda name: layer.dense[name])

    totals = {
        memory: sum(layer.dense[fastest(layer, memory)] for layer in times.values()) for memory in formats
    }
    best = min(totals, key=lambda memory: totals[memory])
    return {name: fastest(layer, best) for name, layer in times.items()}


def trained_values(traced: Traced) -> set[fx.Node]:
    """Nodes whose values depend on a trained parameter: their gradients are computed."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        own = False
        if node.op == "call_module":
            own = any(parameter.requires_grad for parameter in traced.module(node).parameters())
        elif node.op == "get_attr":
            own = True
        if own or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def values_of(
    traced: Traced, units: Sequence[Unit], trained: Iterable[fx.Node], measured: bool
) -> list[Value]:
    """What is computed by whom, read by whom, and what converting it costs."""
    trained = set(trained)
    known: dict[tuple[object, ...], tuple[float, float]] = {}
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
        source_unit = of_output.get(node)
        # Whatever layout a global pooling reads, what it gives is plain.
        from_graph = source_unit is None or source_unit.kind == "global_pool"
        producer = None if from_graph or source_unit is None else source_unit.name
        shape, dtype = shape_of(node), getattr(node.meta.get("tensor_meta"), "dtype", None)
        key = (shape, dtype, node in trained)
        if key not in known:
            if measured and len(shape) == 4 and dtype in C_TYPES:
                known[key] = measure_conversion(shape, dtype, node in trained)
            else:
                known[key] = (conversion_ms(shape, getattr(dtype, "itemsize", 4), node in trained),) * 2
        values.append(Value(producer, tuple(consumers), *known[key]))
    return values


def _choice(unit: Unit, blocked: bool, norm: tuple[float, float] | None) -> Choice:
    return Choice(
        unit.name,
        unit.kind,
        "blocked" if blocked else "plain",
        image=shape_of(unit.inputs[0])[1:],
        predicted_ms=round(unit_ms(unit, blocked=blocked), 4),
        measured_ms=None if norm is None else round(norm[int(blocked)], 4),
    )


def _conv_choice(unit: Unit, blocked: bool, times: LayerTimes | None, way: str, rule: str) -> Choice:
    module = unit.module
    assert isinstance(module, (PackedConv2d, nn.Conv2d))
    shape = module.structure.shape if isinstance(module, PackedConv2d) else tuple(module.weight.shape)
    return Choice(
        unit.name,
        unit.kind,
        "blocked" if blocked else "plain",
        dense=way,
        tilings=times.tilings if times is not None and blocked else (),
        weight=shape,
        image=shape_of(unit.inputs[0])[1:],
        density=round(density_of(module), 6),
        predicted_ms=round(unit_ms(unit, blocked=blocked), 4),
        measured_ms=None if times is None else round(times.sparse if blocked else times.dense[way], 4),
        refused=_refused(blocked, times, way, rule, density_of(module)),
    )


def _with_statistics(choice: Choice, times: NormTimes | None) -> Choice:
    """The choice, and whether the convolution takes the statistics of the norm behind it."""
    if times is None:
        return choice
    return replace(choice, statistics=times.pays, refused=(*choice.refused, times.reason()))


def _refused(blocked: bool, times: LayerTimes | None, way: str, rule: str, density: float) -> tuple[str, ...]:
    """Why the other ways were not taken."""
    if times is None:
        if rule == "density" and blocked:
            return (f"dense: {1 - density:.0%} of the weights are zero, more than {1 - DENSITY_LIMIT:.0%}",)
        if rule == "density":
            return (f"sparse blocked: only {1 - density:.0%} of the weights are zero",)
        return ()
    reasons = [f"dense {name}: {ms:.2f} ms" for name, ms in times.dense.items() if blocked or name != way]
    if blocked and times.sparse > times.dense[way]:
        reasons.append("slower by itself, but it saves conversions")
    if not blocked:
        more = ", and the conversions cost more than it gains" if times.sparse < times.dense[way] else ""
        reasons.append(f"sparse blocked: {times.sparse:.2f} ms{more}")
    return tuple(reasons)
