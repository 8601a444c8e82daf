"""Convolutions that compute the statistics of the batch norm behind them.

The norm then reads the convolution's result once instead of twice; the convolution has more to do for each
tile that it finishes. Which is less depends on the layer's size, density and the caches: both are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clicktrain.compiler import steps
from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.compiler.measure import SECONDS, ImplTimes, problem_of
from clicktrain.compiler.plan import Activations, Choice, LoweringPlan, held_dtype
from clicktrain.compiler.units import Unit, conv_of, dtype_of, find_units, runs_in, shape_of
from clicktrain.errors import UserError
from clicktrain.graph import ModelGraph
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native.library import build_all
from clicktrain.latency.timer import candidates_ms


@dataclass(frozen=True, slots=True)
class NormTimes:
    """Milliseconds of a convolution and the batch norm behind it, forward only: backward is the same.

    ``apart`` if the norm takes its statistics itself, ``together`` if the convolution takes them.
    """

    apart: float
    together: float

    @property
    def pays(self) -> bool:
        """Whether the convolution should take them."""
        return self.together < self.apart

    def reason(self) -> str:
        """Name the way that was not taken, with both times."""
        if self.pays:
            return f"statistics apart: {self.apart:.2f} ms with the norm, together {self.together:.2f} ms"
        return f"statistics together: {self.together:.2f} ms with the norm, apart {self.apart:.2f} ms"


def convolutions_before_norms(units: Sequence[Unit]) -> dict[str, Unit]:
    """Map each convolution whose only reader is a batch norm without pooling to that norm's unit."""
    convolutions = {unit.output: unit for unit in units if unit.kind == "conv"}
    norms = {}
    for unit in units:
        alone = unit.inputs[0] in convolutions and len(unit.inputs[0].users) == 1
        if unit.kind == "batch_norm" and alone and not unit.pooled:
            norms[convolutions[unit.inputs[0]].name] = unit
    return norms


def check_plan(traced: ModelGraph, plan: LoweringPlan) -> None:
    """Refuse a plan, edited by hand perhaps, that cannot be run as it says.

    Raises:
        UserError: an operation has no kernel in its layout, an implementation refuses a layer, or statistics
            are to be taken where no batch norm alone reads a convolution, or one in another layout.
    """
    choices = plan.by_layer()
    units, _ = find_units(traced)
    norms = convolutions_before_norms(units)
    for unit in units:
        choice = choices.get(unit.name)
        if choice is None or choice.kind != unit.kind:
            continue
        if choice.layout != PLAIN and not runs_in(unit, LAYOUTS[choice.layout]):
            raise UserError(
                f"{choice.layer} cannot run in the {choice.layout} layout: set its layout to plain"
            )
        if choice.implementation is not None:
            held = held_dtype(choice.layout, plan.activations, dtype_of(unit))
            if reasons := choice.implementation.refusals(problem_of(unit, held)):
                raise UserError(
                    f"{choice.implementation.name} cannot run {choice.layer}, {reasons[0]}: set its layout "
                    "to plain and its impl to ''"
                )
        if choice.statistics:
            _check_statistics(choice, norms.get(choice.layer), choices)


def _check_statistics(choice: Choice, norm: Unit | None, choices: Mapping[str, Choice]) -> None:
    if norm is None:
        raise UserError(
            f"{choice.layer} cannot take the statistics of a batch norm: its result is not read by one "
            "alone; set its statistics to false"
        )
    if norm.name not in choices or choices[norm.name].layout != choice.layout:
        raise UserError(
            f"{choice.layer} takes the statistics of {norm.name}, which the plan does not run "
            f"{choice.layout}: set its statistics to false"
        )


def measure_statistics(
    units: Sequence[Unit],
    layouts: Mapping[str, str],
    times: Mapping[str, ImplTimes],
    activations: Activations = "parameters",
) -> dict[str, NormTimes]:
    """Time each convolution in ``times`` that only a batch norm in its layout reads; by its name."""
    norms = convolutions_before_norms(units)
    known: dict[Hashable, NormTimes | None] = {}
    result = {}
    for unit in units:
        norm, own = norms.get(unit.name), times.get(unit.name)
        if norm is None or own is None or not PLAIN != layouts[unit.name] == layouts[norm.name]:
            continue
        key = (problem_of(unit), own.impl, own.tilings, norm.activation, len(norm.inputs))
        if key not in known:
            known[key] = _times(unit, norm, own, activations)
        if (measured := known[key]) is not None:
            result[unit.name] = measured
    return result


def _times(unit: Unit, norm: Unit, own: ImplTimes, activations: Activations) -> NormTimes | None:
    """Both times; None where a kernel cannot be built, or the implementation takes no statistics."""
    layout = LAYOUTS[own.impl.layout]
    held = held_dtype(layout.name, activations, dtype_of(unit))
    conv = steps.SparseConv(conv_of(unit), own.impl, problem_of(unit, held), dict(own.tilings))
    kernels = conv.kernels
    if kernels.with_statistics is None or layout.batch_norm is None:
        return None
    if build_all([*kernels.sources.values(), *kernels.statistics_sources]):
        return None
    dtype, device = dtype_of(unit), next(conv_of(unit).parameters()).device
    layer = nn.BatchNorm2d(conv.problem.filters, track_running_stats=False, dtype=dtype, device=device)
    step = steps.ConvBatchNorm(conv, steps.BatchNorm(layer, layout.batch_norm, norm.activation))
    enter = steps.Enter(layout.enter(held), held)
    n = shape_of(unit.inputs[0])[0]
    x, *others = (
        enter(torch.randn(shape_of(read), dtype=dtype, device=device))
        for read in (unit.inputs[0], *norm.inputs[1:])
    )
    functions: dict[str, Callable[[], object]] = {
        "apart": lambda: step.norm(conv(x), n, *others),
        "together": lambda: step(x, n, *others),
    }
    with torch.no_grad():
        return NormTimes(**candidates_ms(functions, SECONDS / 2, device=x.device))
