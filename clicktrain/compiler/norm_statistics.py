"""Whether a convolution takes the statistics of the batch norm behind it on its way, where that wins.

The norm then reads the convolution's result once instead of twice; the convolution has more to do for each
tile that it finishes. Which is less depends on the layer's size, density and the caches: both are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clicktrain.compiler.measure import (
    SECONDS,
    conv_parts,
    dtype_of,
    layer_key,
    sparse_structure,
    take_turns,
)
from clicktrain.compiler.plan import Activations, LoweringPlan, kept_in
from clicktrain.compiler.units import Unit, find_units, shape_of
from clicktrain.errors import UserError
from clicktrain.graph import ModelGraph
from clicktrain.kernels.batch_norm2d import launch as norm_launch
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.library import build_all
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
from clicktrain.kernels.sparse_conv2d.blocked.problem import Phase, Tiling

Tilings = tuple[tuple[Phase, Tiling], ...]


@dataclass(frozen=True, slots=True)
class NormTimes:
    """Milliseconds of a convolution and the batch norm behind it, forward only: the rest is the same.

    Attributes:
        apart: batch norm takes its statistics itself.
        together: the convolution takes them.
    """

    apart: float
    together: float

    @property
    def pays(self) -> bool:
        """Whether the convolution should take them."""
        return self.together < self.apart

    def reason(self) -> str:
        """Why the other way was not taken."""
        if self.pays:
            return f"statistics apart: {self.apart:.2f} ms with the norm, together {self.together:.2f} ms"
        return f"statistics together: {self.together:.2f} ms with the norm, apart {self.apart:.2f} ms"


def convolutions_before_norms(units: Sequence[Unit]) -> dict[str, Unit]:
    """By name of each convolution that a batch norm reads and nobody else: the batch norm's unit."""
    convolutions = {unit.output: unit for unit in units if unit.kind == "conv"}
    found = {}
    for unit in units:
        if unit.kind == "batch_norm" and unit.inputs[0] in convolutions and len(unit.inputs[0].users) == 1:
            found[convolutions[unit.inputs[0]].name] = unit
    return found


def check_statistics(traced: ModelGraph, plan: LoweringPlan) -> None:
    """Refuse a plan, edited by hand perhaps, that wants statistics where they cannot be taken.

    Raises:
        UserError: no batch norm alone reads that convolution, or it does not run blocked.
    """
    choices = plan.by_layer()
    units, _ = find_units(traced)
    norms, known = convolutions_before_norms(units), {unit.name for unit in units}
    for choice in plan.choices:
        if not choice.statistics or choice.layer not in known:
            continue
        norm = norms.get(choice.layer)
        if norm is None:
            raise UserError(
                f"{choice.layer} cannot take the statistics of a batch norm: its result is not read by one "
                "alone; set its statistics to false"
            )
        if norm.name not in choices or choices[norm.name].layout != "blocked":
            raise UserError(
                f"{choice.layer} takes the statistics of {norm.name}, which the plan does not run blocked: "
                "set its statistics to false"
            )


def measure_statistics(
    units: Sequence[Unit],
    blocked: Mapping[str, bool],
    tilings: Mapping[str, Tilings],
    activations: Activations = "parameters",
) -> dict[str, NormTimes]:
    """Times of each blocked convolution that a blocked batch norm alone reads, by its name.

    Args:
        units: of the graph, with shapes.
        blocked: unit name -> whether it runs in the blocked layout.
        tilings: convolution name -> how it cuts its work.
        activations: what is kept.
    """
    norms = convolutions_before_norms(units)
    known: dict[tuple[object, ...], NormTimes | None] = {}
    times = {}
    for unit in units:
        norm = norms.get(unit.name)
        if norm is None or not (blocked[unit.name] and blocked[norm.name]):
            continue
        key = (*layer_key(unit), tilings[unit.name], norm.relu, len(norm.inputs))
        if key not in known:
            known[key] = _times(unit, norm, tilings[unit.name], kept_in(activations, dtype_of(unit)))
        if (found := known[key]) is not None:
            times[unit.name] = found
    return times


def _times(unit: Unit, norm: Unit, tilings: Tilings, kept: torch.dtype) -> NormTimes | None:
    """Both times; None where a kernel cannot be built."""
    layer, problem = conv_parts(unit)
    tools = toolchain()
    assert tools is not None
    assert isinstance(norm.module, nn.BatchNorm2d)
    values = (layer.values if isinstance(layer, PackedConv2d) else layer.weight.flatten(1)).detach()
    plan, tables = prepare(sparse_structure(layer), problem, layer.groups, dict(tilings))
    text, of_layer, dtype = plan.to_json(), list(tables.tensors), values.dtype
    if build_all([launch.compile_plan(text, kept, ["forward"], sums)[0] for sums in (False, True)]):
        return None
    n, *image = shape_of(unit.inputs[0])
    lanes = tools.lanes(kept)
    x = torch.randn(-(-n // lanes), *image, lanes, dtype=dtype).to(kept)
    ones, eps = torch.ones(problem.filters, dtype=dtype), norm.module.eps
    residual = torch.randn(launch.output_shape(x, problem)).to(kept) if len(norm.inputs) > 1 else None
    bias = None if layer.bias is None else layer.bias.detach()

    def apart() -> object:
        y = launch.forward(x, values, bias, of_layer, text)
        return norm_launch.forward(y, ones, ones, residual, n, eps, norm.relu)

    def together() -> object:
        y, mean, var = launch.forward_statistics(x, values, bias, of_layer, text, n)
        return norm_launch.given(y, (mean, var, eps), ones, ones, residual, n, norm.relu)

    functions: dict[str, Callable[[], object]] = {"apart": apart, "together": together}
    return NormTimes(**take_turns(functions, SECONDS / 2))
