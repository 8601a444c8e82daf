"""The implementation and layout of each layer, for the graph as a whole: ClickTrain section 5.4.

The paper decides layer by layer, by the share of zeros. Here an implementation brings its layout with it, and
a conversion between two layouts costs about as much as a batch norm; so all nodes are decided together, by
`layout_choice` over costs and conversions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from clicktrain.compiler import plan_cache
from clicktrain.compiler.costs import trained_values, unit_ms, values_of
from clicktrain.compiler.layout_choice import PLAIN, cheapest_layouts, total_cost
from clicktrain.compiler.measure import (
    ConvTimes,
    ImplTimes,
    Tilings,
    measure_batch_norms,
    measure_convolutions,
    measure_memory,
    problem_of,
)
from clicktrain.compiler.norm_statistics import NormTimes, measure_statistics
from clicktrain.compiler.plan import (
    DENSE,
    Activations,
    Choice,
    LoweringPlan,
    activations_of,
    default_implementation,
    held_dtype,
)
from clicktrain.compiler.units import (
    Unit,
    conv_of,
    density_of,
    dtype_of,
    find_units,
    pass_of,
    runs_in,
    shape_of,
)
from clicktrain.graph import ModelGraph
from clicktrain.kernels.impls import Impl, candidates_for
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import KernelError
from clicktrain.kernels.native.failure import watch_failures
from clicktrain.kernels.native.library import build_all
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.machine import Machine

_CONVERSION = ("layout", 0)
"""The pass of `Layout.sources` that every region has."""
DENSITY_LIMIT = 0.35
"""ClickTrain section 5.4: sparse where more than 65% of the weights are zero."""


def make_plan(
    traced: ModelGraph, batch: int, rule: str, dtypes: Sequence[str] = ("fp32",), remember: bool = True
) -> LoweringPlan:
    """Decide everything about a traced model, on an example of ``batch`` images.

    A kernel that cannot be built is no candidate: the failure is reported, and the plan is not kept.

    Args:
        traced: with the shapes of the example.
        batch: images in the example.
        rule: one of `RULES`.
        dtypes: of dense convolutions, and of activations in other layouts; unmeasured, bfloat16 if allowed.
        remember: take a plan that was measured before on this machine, or keep this one for later.

    Raises:
        KernelError: activations cannot be converted into any layout, for want of a kernel.
    """
    with watch_failures() as failed:
        plan, place = _Decision(traced, batch, rule, dtypes).plan(remember)
    if place is not None and not failed:
        plan_cache.keep(place, plan)
    return plan


class _Best(NamedTuple):
    ms: float
    activations: Activations
    layouts: Mapping[str, str]


class _Decision:
    def __init__(self, traced: ModelGraph, batch: int, rule: str, dtypes: Sequence[str]) -> None:
        self.traced, self.batch, self.rule, self.dtypes = traced, batch, rule, dtypes
        self.units, self.refused = find_units(traced)
        self.trained = trained_values(traced)
        types = {dtype_of(unit) for unit in self.units}
        self.dtype = torch.float32 if types == {torch.float32} else torch.float64
        self.device = next(traced.model.parameters()).device
        self.offered = candidates_for(OPERATOR, self.device.type)
        self.possible = activations_of(dtypes, self.dtype)
        layouts = dict.fromkeys(impl.layout for impl in self.offered)
        self.layouts = [layout for layout in layouts if layout != PLAIN]
        """Those that convolutions can run in, beside the plain one."""
        self.convolutions: Mapping[str, ConvTimes] = {}
        self.norms: Mapping[str, Mapping[tuple[str, torch.dtype], float]] = {}
        self.ways: Mapping[str, str] = {}
        self.broken: dict[tuple[tuple[str, int] | None, str, torch.dtype], KernelError] = {}
        """By pass, layout and dtype: kernels beside convolutions that cannot be built."""

    def plan(self, remember: bool) -> tuple[LoweringPlan, Path | None]:
        """The plan, and where to keep it if it was measured now."""
        if self.rule != "measured":
            return self._written([_Best(math.nan, self.possible[-1], self._by_rule())], {}), None
        place = None
        if remember:
            place = plan_cache.place(self.units, self.trained, self.batch, self.dtypes, self.device)
            known = plan_cache.read(place)
            args = self.traced, self.batch, self.possible, self.dtypes
            if known is not None and plan_cache.fits(known, *args):
                return known, None
        gb_s = self._measure()
        ways = [self._cheapest(kept, gb_s) for kept in self.possible]
        _, activations, layouts = min(ways, key=lambda one: one.ms)
        running = {name: self._running(name, layouts[name], activations) for name in self.convolutions}
        statistics = measure_statistics(
            self.units, layouts, {name: times for name, times in running.items() if times}, activations
        )
        return self._written(ways, statistics), place

    def held(self, layout: str, activations: Activations) -> torch.dtype:
        return held_dtype(layout, activations, self.dtype)

    def _measure(self) -> float:
        """Measure everything that does not depend on the choice; returns the speed of memory in GB/s."""
        passes = {one for unit in self.units if (one := pass_of(unit)) is not None}
        texts = {
            ((name, number), layout, held): LAYOUTS[layout].sources[name](held, number)
            for layout in self.layouts
            for name, number in [_CONVERSION, *sorted(passes)]
            if name in LAYOUTS[layout].sources
            for held in dict.fromkeys(self.held(layout, kept) for kept in self.possible)
        }
        failed = build_all(texts.values())
        self.broken = {key: failed[text] for key, text in texts.items() if text in failed}
        self.possible = tuple(kept for kept in self.possible if self._open(kept))
        if not self.possible:
            raise next(error for (one, _, _), error in self.broken.items() if one == _CONVERSION)
        gb_s = measure_memory(self.device)
        convolutions = [unit for unit in self.units if unit.kind == "conv"]
        trained = {unit.name: unit.inputs[0] in self.trained for unit in convolutions}
        self.convolutions = measure_convolutions(convolutions, trained, self.dtypes)
        self.ways = dense_ways(self.convolutions)
        norms = [unit for unit in self.units if unit.kind == "batch_norm"]
        wanted = {
            (layout, self.held(layout, kept))
            for kept in self.possible
            for layout in self._open(kept)
            if LAYOUTS[layout].batch_norm is not None
        }
        ordered = sorted(wanted, key=str)
        usable = {
            norm.name: [key for key in ordered if (pass_of(norm), *key) not in self.broken] for norm in norms
        }
        self.norms = measure_batch_norms(norms, usable, self.device)
        return gb_s

    def _open(self, activations: Activations) -> list[str]:
        keys = {one: (_CONVERSION, one, self.held(one, activations)) for one in self.layouts}
        return [one for one, key in keys.items() if key not in self.broken]

    def _running(self, name: str, layout: str, activations: Activations) -> ImplTimes | None:
        """The fastest implementation in a layout; None for PyTorch's dense one, and where nothing can."""
        times = self.convolutions[name]
        best = times.best(layout, self.held(layout, activations))
        dense = layout == PLAIN and best is not None and times.dense[self.ways[name]] <= best.ms
        return None if dense else best

    def _cheapest(self, activations: Activations, gb_s: float) -> _Best:
        costs: dict[str, dict[str, float]] = {}
        for unit in self.units:
            own = costs[unit.name] = {}
            for layout in (PLAIN, *self._open(activations)):
                if (cost := self._cost(unit, layout, activations, gb_s)) is not None:
                    own[layout] = cost
        values = values_of(self.traced, self.units, self.trained, self._open(activations), activations)
        layouts = cheapest_layouts(costs, values)
        return _Best(total_cost(costs, values, layouts), activations, layouts)

    def _cost(self, unit: Unit, layout: str, activations: Activations, gb_s: float) -> float | None:
        """Milliseconds of a unit in a layout; None where it cannot run there."""
        if unit.kind == "conv":
            times = self._running(unit.name, layout, activations)
            if times is None:
                return self.convolutions[unit.name].dense[self.ways[unit.name]] if layout == PLAIN else None
            return times.ms
        held = self.held(layout, activations)
        if unit.name in self.norms:
            return self.norms[unit.name].get((layout, held))
        if layout == PLAIN:
            return unit_ms(unit, gb_s=gb_s)
        if not runs_in(unit, LAYOUTS[layout]) or (pass_of(unit), layout, held) in self.broken:
            return None
        return unit_ms(unit, LAYOUTS[layout], gb_s, held.itemsize)

    def _by_rule(self) -> dict[str, str]:
        implementations = {unit.name: self._accepting(unit) for unit in self.units if unit.kind == "conv"}
        costs: dict[str, dict[str, float]] = {}
        for unit in self.units:
            if unit.kind == "conv":
                # The paper decides a convolution before its neighbors are looked at.
                sparse = self.rule == "sparse" or density_of(unit.module) < DENSITY_LIMIT
                impl = implementations[unit.name]
                costs[unit.name] = {impl.layout if sparse and impl else PLAIN: 0.0}
                continue
            moved = {one: unit_ms(unit, LAYOUTS[one]) for one in self.layouts if runs_in(unit, LAYOUTS[one])}
            if self.rule == "sparse" and moved:
                costs[unit.name] = dict.fromkeys(moved, 0.0)  # conversions decide where
            else:
                costs[unit.name] = {PLAIN: unit_ms(unit), **moved}
        return cheapest_layouts(costs, values_of(self.traced, self.units, self.trained, self.layouts, None))

    def _accepting(self, unit: Unit) -> Impl | None:
        problems = ((one, problem_of(unit, self.held(one.layout, self.possible[-1]))) for one in self.offered)
        return next((impl for impl, problem in problems if not impl.refusals(problem)), None)

    def _written(self, ways: Sequence[_Best], statistics: Mapping[str, NormTimes]) -> LoweringPlan:
        _, activations, layouts = min(ways, key=lambda one: one.ms) if len(ways) > 1 else ways[0]
        choices, implementations = [], self.offered
        for unit in self.units:
            layout = layouts[unit.name]
            if unit.kind == "conv":
                choice = self._conv_choice(unit, layout, activations)
                if times := statistics.get(unit.name):
                    refused = (*choice.refused, times.reason())
                    choice = replace(choice, statistics=times.pays, refused=refused)
                choices.append(choice)
            else:
                norm = self.norms.get(unit.name)
                ms = None if norm is None else norm[layout, self.held(layout, activations)]
                choices.append(_choice(unit, layout, ms))
        for name, reason in self.refused.items():
            reasons = tuple(f"sparse {impl.name}: {reason}" for impl in implementations)
            choices.append(Choice(name, "conv", PLAIN, refused=reasons))
        notes = [f"{path} runs as it is written: it {reason}" for path, reason in self.traced.opaque.items()]
        if len(ways) > 1:
            totals = [f"{_in_words(one.activations)} {one.ms:.1f} ms" for one in ways]
            notes.append(
                f"activations kept in {_in_words(activations)}; convolutions, norms and conversions take "
                f"{', '.join(totals)}"
            )
        machine = Machine.here(self.device)
        return LoweringPlan(self.rule, self.batch, machine, tuple(choices), tuple(notes), activations)

    def _conv_choice(self, unit: Unit, layout: str, activations: Activations) -> Choice:
        module, times = conv_of(unit), self.convolutions.get(unit.name)
        way, density = self.ways.get(unit.name, DENSE[0]), density_of(unit.module)
        ms: float | None = None
        tilings: Tilings = ()
        if times is None:
            impl = self._accepting(unit) if self.rule == "sparse" or density < DENSITY_LIMIT else None
            impl = None if impl is None or impl.layout != layout else impl
            refused = self._refused_by_rule(unit, impl, density)
        else:
            running = self._running(unit.name, layout, activations)
            impl = None if running is None else running.impl
            ms = round(times.dense[way] if running is None else running.ms, 4)
            tilings = () if running is None else running.tilings
            refused = self._refused(times, running, way, activations)
        return replace(
            _choice(unit, layout, ms),
            dense=way,
            tilings=tilings,
            weight=module.structure.shape if isinstance(module, PackedConv2d) else tuple(module.weight.shape),
            density=round(density, 6),
            refused=refused,
            impl="" if impl is default_implementation(layout) or impl is None else impl.name,
        )

    def _refused_by_rule(self, unit: Unit, impl: Impl | None, density: float) -> tuple[str, ...]:
        reasons = [
            f"sparse {other.name}: {reason}"
            for other in self.offered
            for reason in other.refusals(problem_of(unit, self.held(other.layout, self.possible[-1])))
        ]
        zero = f"{1 - density:.0%} of the weights are zero"
        if self.rule == "density" and impl is not None:
            reasons.append(f"dense: {zero}, more than {1 - DENSITY_LIMIT:.0%}")
        elif self.rule == "density" and not reasons:
            reasons.append(f"sparse {self.offered[0].name}: only {zero}")
        return tuple(reasons)

    def _refused(
        self, times: ConvTimes, running: ImplTimes | None, way: str, activations: Activations
    ) -> tuple[str, ...]:
        dense = times.dense[way]
        reasons = [f"dense {name}: {ms:.2f} ms" for name, ms in times.dense.items() if running or name != way]
        others = {key: other for key, other in times.impls.items() if other is not running}
        for (name, dtype), other in others.items():
            if dtype is not self.held(other.impl.layout, activations):
                kept = "bf16" if dtype is torch.bfloat16 else "fp32"
                reasons.append(f"sparse {name}, activations in {kept}: {_time(other)}")
        if running is not None and running.ms > dense:
            reasons.append("slower by itself, but it saves conversions")
        mine = dense if running is None else running.ms
        for (name, dtype), other in others.items():
            if dtype is self.held(other.impl.layout, activations):
                more = ", and the conversions cost more than it gains" if other.ms < mine else ""
                reasons.append(f"sparse {name}: {_time(other)}{more}")
        return tuple(reasons)


def _in_words(activations: Activations) -> str:
    """For messages; there is a choice only where parameters are float32."""
    return "bf16" if activations == "bf16" else "fp32"


def _time(times: ImplTimes) -> str:
    return times.reason or f"{times.ms:.2f} ms"


def dense_ways(times: Mapping[str, ConvTimes]) -> dict[str, str]:
    """How each convolution runs where it is dense: in the fastest dtype, and one memory format for all.

    One format, because the activations between dense layers keep it; with two, each would convert its input.
    """
    if not times:
        return {}
    formats = dict.fromkeys(name.split()[0] for name in DENSE)

    def fastest(layer: ConvTimes, memory: str) -> str:
        return min((n for n in layer.dense if n.startswith(memory)), key=lambda name: layer.dense[name])

    totals = {
        memory: sum(layer.dense[fastest(layer, memory)] for layer in times.values()) for memory in formats
    }
    best = min(totals, key=lambda memory: totals[memory])
    return {name: fastest(layer, best) for name, layer in times.items()}


def _choice(unit: Unit, layout: str, ms: float | None) -> Choice:
    return Choice(
        unit.name,
        unit.kind,
        layout,
        image=shape_of(unit.inputs[0])[1:],
        predicted_ms=round(unit_ms(unit, LAYOUTS.get(layout)), 4),
        measured_ms=None if ms is None else round(ms, 4),
    )
