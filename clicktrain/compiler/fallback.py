"""Acceleration layer by layer, for models that run by their own code: each layer between two conversions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.compiler.plan import Choice, LoweringPlan, default_implementation
from clicktrain.compiler.select import DENSITY_LIMIT
from clicktrain.graph import Inputs, layer_input_shapes, own_random_numbers, working_copy
from clicktrain.kernels.impls import ConvProblem, Impl, candidates_for
from clicktrain.kernels.native import KernelError
from clicktrain.kernels.native.failure import report_failure
from clicktrain.kernels.sparse_conv2d import IMPLS, PackedConv2d, PackedLayer, sparse_conv2d
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.machine import Machine
from clicktrain.latency.timer import candidates_ms

_SECONDS = 0.3
_ORACLE = "reference"


def accelerate_layers_(
    model: nn.Module,
    inputs: Inputs,
    rule: str,
    below: str = "",
    plan: LoweringPlan | None = None,
    *,
    lowered: type[nn.Module] | tuple[()] = (),
) -> list[str]:
    """Switch packed layers to another implementation where that pays; returns their names.

    Args:
        model: a copy of it runs once on the inputs, to see what each layer gets.
        inputs: of the model.
        rule: as of `accelerate`; by ``measured`` a layer's conversions are part of its time.
        below: path of the only part to look at.
        plan: take its choices for the layers that it names.
        lowered: leave out layers of this type, which the lowered graph has.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLayer)
        and not isinstance(module, lowered)
        and (not below or f"{name}.".startswith(f"{below}."))
    }
    known = {} if plan is None else plan.by_layer()
    possible = [name for name in layers if name not in known or known[name].implementation is not None]
    shapes = _input_shapes(model, possible, inputs) if possible else {}
    chosen = []
    # Measuring draws random numbers; training must not notice.
    with own_random_numbers():
        for name, shape in shapes.items():
            layer, wanted = layers[name], known[name].implementation if name in known else None
            form = layer.as_conv2d(shape)
            if form is None:
                continue
            impl = _fastest(*form, "sparse" if wanted else rule, [wanted] if wanted else None)
            if impl is not None:
                layer.use(impl, otherwise=_ORACLE)
                chosen.append(name)
    return chosen


def plan_by_layer(model: nn.Module, chosen: list[str], rule: str, batch: int, note: str) -> LoweringPlan:
    """The plan of a network that runs by its own code: only its packed layers, each for itself."""
    choices = [
        Choice(
            name,
            "conv",
            impl.layout if name in chosen else PLAIN,
            weight=module.structure.shape,
            density=round(module.structure.density, 6),
            impl="" if name not in chosen or impl is default_implementation(impl.layout) else impl.name,
        )
        for name, module in model.named_modules()
        if isinstance(module, PackedLayer)
        for impl in (IMPLS[module.impl],)
    ]
    return LoweringPlan(rule, batch, Machine.here(), tuple(choices), (note,))


def _input_shapes(model: nn.Module, names: list[str], inputs: Inputs) -> dict[str, torch.Size]:
    with own_random_numbers(inputs.tensors()):
        shapes = layer_input_shapes(working_copy(model), names, inputs.map(torch.clone))
    return {name: calls[-1] for name, calls in shapes.items()}


def _fastest(
    layer: PackedConv2d, shape: Sequence[int], rule: str, impls: Sequence[Impl] | None = None
) -> str | None:
    """The implementation to run a layer on, unmeasured the first able one; None for the one that it has."""
    if rule == "density" and layer.structure.density >= DENSITY_LIMIT:
        return None
    problem = ConvProblem.of_layer(layer, shape)
    able = [impl for impl in impls or candidates_for(OPERATOR, problem.device) if not impl.refusals(problem)]
    names = [impl.name for impl in able if _works(layer, shape, impl.name)]
    if rule != "measured" or not names:
        return next(iter(names), None)
    ms = candidates_ms(
        {name: _call(layer, shape, name) for name in (_ORACLE, *names)},
        _SECONDS,
        device=layer.values.device,
    )
    best = min(ms, key=lambda name: ms[name])
    return None if best == _ORACLE else best


def _works(layer: PackedConv2d, shape: Sequence[int], impl: str) -> bool:
    """Whether the layer's kernels can be built; failures are reported."""
    try:
        _call(layer, shape, impl)()
    except KernelError as error:
        report_failure(error)
        return False
    return True


def _call(layer: PackedConv2d, shape: Sequence[int], impl: str) -> Callable[[], object]:
    x = torch.randn(shape, dtype=layer.values.dtype, device=layer.values.device, requires_grad=True)
    values = layer.values.detach().requires_grad_()
    settings: dict[str, Any] = {key: getattr(layer, key) for key in layer.settings}

    def step() -> object:
        with torch.enable_grad():
            y = sparse_conv2d(x, values, layer.structure, layer.bias, impl=impl, **settings)
        return torch.autograd.grad(y.sum(), [x, values])

    return step
