"""Which operator each layer gets, for the graph as a whole: ClickTrain section 5.4.

The paper decides layer by layer, by the share of zeros. Here an operator brings its layout with it, and a
conversion between two layouts costs about as much as a batch norm; so all nodes are decided together, by a
minimum cut over costs and conversions.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx, nn

from clicktrain.compiler import remembered
from clicktrain.compiler.estimate import conversion_ms, unit_ms
from clicktrain.compiler.measure import (
    LayerTimes,
    dtype_of,
    measure_batch_norms,
    measure_conversion,
    measure_convolutions,
    measure_memory,
)
from clicktrain.compiler.min_cut import Value, cheapest_layouts, total_cost
from clicktrain.compiler.norm_statistics import NormTimes, measure_statistics
from clicktrain.compiler.passes import Pass, broken_passes, pass_of
from clicktrain.compiler.plan import (
    DENSE,
    Activations,
    Choice,
    LoweringPlan,
    activations_of,
    kept_in,
)
from clicktrain.compiler.remembered import fits
from clicktrain.compiler.units import Unit, find_units, shape_of
from clicktrain.graph import ModelGraph
from clicktrain.kernels.native import C_TYPES, KernelError
from clicktrain.kernels.native.failure import watch_failures
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.latency.machine import Machine

DENSITY_LIMIT = 0.35
"""ClickTrain section 5.4: sparse where more than 65% of the weights are zero."""


def make_plan(
    traced: ModelGraph, batch: int, rule: str, dtypes: Sequence[str] = ("fp32",), remember: bool = True
) -> LoweringPlan:
    """Decide everything about a traced model.

    A kernel that cannot be built is no candidate; who watches failures is told, and the plan is not kept.

    Args:
        traced: with the shapes of the example.
        batch: images in the example.
        rule: one of `RULES`.
        dtypes: what dense convolutions may compute in, and activations of blocked regions be kept in; without
            measurements bfloat16 where that is possible.
        remember: take a plan that was measured before on this machine, or keep this one for later.

    Raises:
        KernelError: activations cannot be converted, for want of a kernel.
    """
    with watch_failures() as failed:
        plan, place = _decide(traced, batch, rule, dtypes, remember)
    if place is not None and not failed:
        remembered.keep(place, plan)
    return plan


def _decide(
    traced: ModelGraph, batch: int, rule: str, dtypes: Sequence[str], remember: bool
) -> tuple[LoweringPlan, Path | None]:
    """The plan, and where to keep it if it is new."""
    units, refused = find_units(traced)
    trained = trained_values(traced)
    types = {dtype_of(unit) for unit in units}
    dtype = torch.float32 if types == {torch.float32} else torch.float64
    possible = activations_of(dtypes, dtype)
    place = None
    if rule == "measured" and remember:
        place = remembered.place(units, trained, batch, dtypes)
        known = remembered.read(place)
        if known is not None and fits(known, traced, batch, possible, dtypes):
            return known, None
    measured = _measure(units, trained, dtypes, possible, dtype) if rule == "measured" else None
    ways = dense_ways(measured.convolutions) if measured else {}
    if measured is not None:
        possible = tuple(kept for kept in possible if ("layout", kept) not in measured.broken)
        found = [_cheapest(traced, units, trained, kept, measured, ways) for kept in possible]
        _, activations, blocked = min(found, key=lambda one: one[0])
    else:
        activations, blocked = possible[-1], _by_rule(traced, units, trained, rule)
    statistics: dict[str, NormTimes] = {}
    if measured is not None:
        tilings = {name: times.blocked[activations].tilings for name, times in measured.convolutions.items()}
        statistics = measure_statistics(units, blocked, tilings, activations)
    choices = []
    for unit in units:
        if unit.kind == "conv":
            times = measured.convolutions[unit.name] if measured else None
            way = ways.get(unit.name, DENSE[0])
            choice = _conv_choice(unit, blocked[unit.name], times, way, rule, activations)
            choices.append(_with_statistics(choice, statistics.get(unit.name)))
        else:
            norm = measured.norms.get(unit.name) if measured else None
            ms = None if norm is None else norm[activations if blocked[unit.name] else "plain"]
            choices.append(_choice(unit, blocked[unit.name], ms))
    choices += [
        Choice(name, "conv", "plain", refused=(f"sparse blocked: {reason}",))
        for name, reason in refused.items()
    ]
    notes = [f"{path} runs as it is written: it {reason}" for path, reason in traced.opaque.items()]
    if measured is not None and len(found) > 1:
        totals = [f"{_in_words(kept)} {total:.1f} ms" for total, kept, _ in found]
        notes.append(
            f"activations kept in {_in_words(activations)}; convolutions, norms and conversions take "
            f"{', '.join(totals)}"
        )
    return LoweringPlan(rule, batch, Machine.here(), tuple(choices), tuple(notes), activations), place


def _in_words(activations: Activations) -> str:
    """For people; there is a choice only where parameters are float32."""
    return "bf16" if activations == "bf16" else "fp32"


class _Measured(NamedTuple):
    """Times of everything that is measured, whatever the choice; ``norms`` as `measure_batch_norms`.

    ``broken`` are passes over activations that cannot be built, by what is kept.
    """

    convolutions: Mapping[str, LayerTimes]
    norms: Mapping[str, Mapping[str, float]]
    gb_s: float
    broken: Collection[tuple[Pass, Activations]]


def _measure(
    units: Sequence[Unit],
    trained: Collection[fx.Node],
    dtypes: Sequence[str],
    activations: Sequence[Activations],
    dtype: torch.dtype,
) -> _Measured:
    failed = broken_passes(units, [kept_in(kept, dtype) for kept in activations])
    broken: dict[tuple[Pass, Activations], KernelError] = {}
    for kept in activations:
        broken.update({(name, kept): e for (name, of), e in failed.items() if of is kept_in(kept, dtype)})
    if all(("layout", kept) in broken for kept in activations):
        raise broken["layout", activations[0]]
    convolutions = [unit for unit in units if unit.kind == "conv"]
    gb_s = measure_memory()
    times = measure_convolutions(convolutions, {u.name: u.inputs[0] in trained for u in convolutions}, dtypes)
    usable = [kept for kept in activations if ("batch_norm", kept) not in broken]
    norms = measure_batch_norms([unit for unit in units if unit.kind == "batch_norm"], usable)
    return _Measured(times, norms, gb_s, broken)


def _cheapest(
    traced: ModelGraph,
    units: Sequence[Unit],
    trained: Collection[fx.Node],
    activations: Activations,
    measured: _Measured,
    ways: Mapping[str, str],
) -> tuple[float, Activations, dict[str, bool]]:
    """Milliseconds, and which units then run blocked, if activations are kept so."""
    costs: dict[str, tuple[float | None, float | None]] = {}
    for unit in units:
        kept, gb_s = kept_in(activations, dtype_of(unit)), measured.gb_s
        if unit.kind == "conv":
            times = measured.convolutions[unit.name]
            sparse = times.blocked[activations].ms
            costs[unit.name] = times.dense[ways[unit.name]], None if math.isinf(sparse) else sparse
        elif unit.name in measured.norms:
            norm = measured.norms[unit.name]
            costs[unit.name] = norm["plain"], norm.get(activations)
        else:
            plain = unit_ms(unit, blocked=False, gb_s=gb_s)
            one = unit_ms(unit, blocked=True, gb_s=gb_s, itemsize=kept.itemsize)
            broken = (pass_of(unit), activations) in measured.broken
            costs[unit.name] = plain, None if broken else one
    values = values_of(traced, units, trained, activations)
    blocked = cheapest_layouts(costs, values)
    return total_cost(costs, values, blocked), activations, blocked


def _by_rule(
    traced: ModelGraph, units: Sequence[Unit], trained: Collection[fx.Node], rule: str
) -> dict[str, bool]:
    """Which units run blocked where nothing is measured."""
    if rule == "sparse":
        return {unit.name: True for unit in units}
    costs: dict[str, tuple[float | None, float | None]] = {}
    for unit in units:
        if unit.kind == "conv":
            # The paper decides a convolution before its neighbours are looked at.
            costs[unit.name] = (None, 0.0) if density_of(unit.module) < DENSITY_LIMIT else (0.0, None)
        else:
            costs[unit.name] = unit_ms(unit, blocked=False), unit_ms(unit, blocked=True)
    return cheapest_layouts(costs, values_of(traced, units, trained, None))


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


def trained_values(traced: ModelGraph) -> set[fx.Node]:
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
    traced: ModelGraph, units: Sequence[Unit], trained: Collection[fx.Node], activations: Activations | None
) -> list[Value]:
    """What is computed by whom, read by whom, and what converting it costs.

    Args:
        traced: with shapes.
        units: of the graph.
        trained: nodes whose gradients are computed.
        activations: measure conversions to what is kept so; None estimates them.
    """
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
            if activations is not None and len(shape) == 4 and dtype in C_TYPES:
                known[key] = measure_conversion(shape, dtype, kept_in(activations, dtype), node in trained)
            else:
                known[key] = (conversion_ms(shape, getattr(dtype, "itemsize", 4), node in trained),) * 2
        values.append(Value(producer, tuple(consumers), *known[key]))
    return values


def _choice(unit: Unit, blocked: bool, ms: float | None) -> Choice:
    return Choice(
        unit.name,
        unit.kind,
        "blocked" if blocked else "plain",
        image=shape_of(unit.inputs[0])[1:],
        predicted_ms=round(unit_ms(unit, blocked=blocked), 4),
        measured_ms=None if ms is None else round(ms, 4),
    )


def _conv_choice(
    unit: Unit, blocked: bool, times: LayerTimes | None, way: str, rule: str, activations: Activations
) -> Choice:
    module = unit.module
    sparse = None if times is None else times.blocked[activations]
    ms = None
    if times is not None and sparse is not None:
        ms = round(sparse.ms if blocked else times.dense[way], 4)
    assert isinstance(module, (PackedConv2d, nn.Conv2d))
    shape = module.structure.shape if isinstance(module, PackedConv2d) else tuple(module.weight.shape)
    return Choice(
        unit.name,
        unit.kind,
        "blocked" if blocked else "plain",
        dense=way,
        tilings=sparse.tilings if sparse is not None and blocked else (),
        weight=shape,
        image=shape_of(unit.inputs[0])[1:],
        density=round(density_of(module), 6),
        predicted_ms=round(unit_ms(unit, blocked=blocked), 4),
        measured_ms=ms,
        refused=_refused(blocked, times, way, rule, density_of(module), activations),
    )


def _with_statistics(choice: Choice, times: NormTimes | None) -> Choice:
    """The choice, and whether the convolution takes the statistics of the norm behind it."""
    if times is None:
        return choice
    return replace(choice, statistics=times.pays, refused=(*choice.refused, times.reason()))


def _refused(
    blocked: bool,
    times: LayerTimes | None,
    way: str,
    rule: str,
    density: float,
    activations: Activations,
) -> tuple[str, ...]:
    """Why the other ways were not taken."""
    if times is None:
        if rule == "density" and blocked:
            return (f"dense: {1 - density:.0%} of the weights are zero, more than {1 - DENSITY_LIMIT:.0%}",)
        if rule == "density":
            return (f"sparse blocked: only {1 - density:.0%} of the weights are zero",)
        return ()
    reasons = [f"dense {name}: {ms:.2f} ms" for name, ms in times.dense.items() if blocked or name != way]
    sparse = times.blocked[activations].ms
    reasons += [
        f"sparse blocked, activations in {_in_words(kept)}: {_time(other.ms)}"
        for kept, other in times.blocked.items()
        if kept != activations
    ]
    if blocked and sparse > times.dense[way]:
        reasons.append("slower by itself, but it saves conversions")
    if not blocked:
        more = ", and the conversions cost more than it gains" if sparse < times.dense[way] else ""
        reasons.append(f"sparse blocked: {_time(sparse)}{more}")
    return tuple(reasons)


def _time(ms: float) -> str:
    return "its kernels cannot be built" if math.isinf(ms) else f"{ms:.2f} ms"
