"""Measured times of the candidates for one layer on its real shapes, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.compiler import steps
from clicktrain.compiler.activations import in_torch
from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.compiler.plan import DENSE, Activations, activations_of, held_dtype
from clicktrain.compiler.units import Unit, conv_of, dtype_of, max_pooling, shape_of
from clicktrain.kernels.impls import Candidate, ConvProblem, Impl, Phase, candidates_for
from clicktrain.kernels.layouts import LAYOUTS, Layout
from clicktrain.kernels.max_pool2d import Pooling
from clicktrain.kernels.native import KernelError
from clicktrain.kernels.native.failure import report_failure
from clicktrain.kernels.native.library import build_all
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.timer import candidates_ms

SECONDS = 0.8
"""For all candidates of one layer shape together."""
LITTLE_WORK = 1 << 21
"""Multiply-adds of a layer and batch, under 0.1 ms, up to which one candidate a phase is built: each takes a
third of a second, and could save microseconds."""
CALL_MS = 0.05
"""Overhead of one operator in PyTorch, forward and backward."""
Tilings = tuple[tuple[Phase, Any], ...]
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class ImplTimes:
    """Milliseconds of a convolution by one implementation, forward + backward, and its best tilings.

    Infinite, with the reason, where it refuses the problem or a kernel cannot be built.
    """

    impl: Impl
    ms: float
    tilings: Tilings = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ConvTimes:
    """Milliseconds of one convolution, forward + backward: by `DENSE`, and by implementation and dtype."""

    dense: Mapping[str, float]
    impls: Mapping[tuple[str, torch.dtype], ImplTimes]

    def best(self, layout: str, activations: torch.dtype) -> ImplTimes | None:
        """The fastest implementation of a layout; None if none can run the layer there."""
        fitting = [
            times
            for (_, dtype), times in self.impls.items()
            if times.impl.layout == layout and dtype is activations and not math.isinf(times.ms)
        ]
        return min(fitting, key=lambda times: times.ms, default=None)


def problem_of(unit: Unit, activations: torch.dtype | None = None, input_grad: bool = True) -> ConvProblem:
    """The convolution of a unit on the example; activations are of its own dtype by default."""
    return ConvProblem.of_layer(
        conv_of(unit), shape_of(unit.inputs[0]), activations=activations, input_grad=input_grad
    )


def measure_convolutions(
    units: Sequence[Unit], trained_inputs: Mapping[str, bool], dtypes: Sequence[str]
) -> dict[str, ConvTimes]:
    """Times of each convolution; layers with the same problem share them.

    Args:
        units: of kind ``conv``, with shapes.
        trained_inputs: unit name -> whether dgrad is computed.
        dtypes: ``fp32`` and ``bf16``: what dense candidates compute in, and activations are kept in.
    """
    groups: dict[ConvProblem, list[Unit]] = {}
    for unit in units:
        groups.setdefault(problem_of(unit, input_grad=trained_inputs[unit.name]), []).append(unit)
    ways = {
        problem: _ways(same[0], problem, activations_of(dtypes, dtype_of(same[0])))
        for problem, same in groups.items()
    }
    failed = build_all([text for own in ways.values() for way in own for text in way.sources()])
    times = {}
    for problem, same in groups.items():
        measured = _times(same[0], problem, [way.without(failed) for way in ways[problem]], dtypes)
        times.update({unit.name: measured for unit in same})
    return times


@dataclass(frozen=True, slots=True)
class _Way:
    """An implementation with activations of a dtype, and the kernels to measure."""

    impl: Impl
    problem: ConvProblem
    step: steps.SparseConv | None = None
    candidates: tuple[Candidate, ...] = ()
    reason: str = ""

    def sources(self) -> list[str]:
        own = [] if self.step is None else list(self.step.kernels.sources.values())
        return [*own, *(one.source for one in self.candidates)]

    def without(self, failed: Mapping[str, object]) -> _Way:
        step = (
            None if self.step is None or set(self.step.kernels.sources.values()) & set(failed) else self.step
        )
        left = tuple(one for one in self.candidates if one.source not in failed)
        enough = step is not None or {one.phase for one in left} >= set(self.problem.phases)
        reason = self.reason or ("" if enough else "its kernels cannot be built")
        return replace(self, step=step, candidates=left if enough else (), reason=reason)

    def calls(self, x: Tensor, gy: Tensor, values: Tensor, bias: Tensor | None) -> dict[int, Call]:
        """The calls to time, on activations in the layout: each candidate, or the whole layer as 0."""
        if self.reason:
            return {}
        x, gy = (_entered(self.impl.layout, images, self.problem) for images in (x, gy))
        if self.step is not None:
            return {0: _step_call(self.step, x.requires_grad_(self.problem.input_grad), gy)}
        calls = {
            number: functools.partial(one.run, x, gy, values, bias)
            for number, one in enumerate(self.candidates)
        }
        return {n: call for n, call in calls.items() if self.candidates[n].source or _works(call)}

    def rival(self, number: int) -> str:
        """The group of alternatives that a call belongs to."""
        return "dense" if self.step is not None else self.candidates[number].phase

    def times(self, ms: Mapping[int, float]) -> ImplTimes:
        if self.reason:
            return ImplTimes(self.impl, math.inf, reason=self.reason)
        if self.step is not None:
            return ImplTimes(self.impl, ms[0])
        total, tilings = CALL_MS, []
        if {self.candidates[n].phase for n in ms} < set(self.problem.phases):
            return ImplTimes(self.impl, math.inf, reason="its kernels cannot be built")
        for phase in self.problem.phases:
            best = min((n for n in ms if self.candidates[n].phase == phase), key=lambda n: (ms[n], n))
            total += ms[best]
            tilings.append((phase, self.candidates[best].tiling))
        return ImplTimes(self.impl, total, tuple(tilings))


def _works(call: Call) -> bool:
    """Whether a kernel that is built when it is first called can be; failures are reported."""
    try:
        call()
    except KernelError as error:
        report_failure(error)
        return False
    return True


def _ways(unit: Unit, problem: ConvProblem, activations: Sequence[Activations]) -> list[_Way]:
    """All implementations of a layer; of one with little work the likeliest kernel of each phase alone."""
    layer, dtype = conv_of(unit), dtype_of(unit)
    structure = steps.structure_of(layer)
    little = structure.nnz * problem.batch * math.prod(problem.output) < LITTLE_WORK
    ways: dict[tuple[str, torch.dtype], _Way] = {}
    for impl in candidates_for(OPERATOR, problem.device):
        for kept in dict.fromkeys(held_dtype(impl.layout, one, dtype) for one in activations):
            own = replace(problem, activations=str(kept).removeprefix("torch."))
            if reasons := impl.refusals(own):
                ways[impl.name, kept] = _Way(impl, own, reason="; ".join(reasons))
            elif impl.candidates is None:
                ways[impl.name, kept] = _Way(impl, own, steps.SparseConv(layer, impl, own, {}))
            else:
                every = [one for one in impl.candidates(structure, own) if one.phase in own.phases]
                first = {one.phase: one for one in reversed(every)}
                ways[impl.name, kept] = _Way(impl, own, None, tuple(first.values() if little else every))
    return list(ways.values())


def _times(unit: Unit, problem: ConvProblem, ways: Sequence[_Way], dtypes: Sequence[str]) -> ConvTimes:
    layer, dtype, shape = conv_of(unit), dtype_of(unit), shape_of(unit.inputs[0])
    device = next(layer.parameters()).device
    x = torch.randn(*shape, dtype=dtype, device=device)
    gy = torch.randn(problem.batch, problem.filters, *problem.output, dtype=dtype, device=device)
    values = (layer.weight.flatten(1) if isinstance(layer, nn.Conv2d) else layer.values).detach()
    bias = None if layer.bias is None else layer.bias.detach()
    functions: dict[Any, Call] = {
        name: _dense_call(layer, shape, dtype, name, problem.input_grad)
        for name in DENSE
        if name.split()[1] in dtypes
    }
    rivals: dict[Any, Hashable] = dict.fromkeys(functions, "dense")
    for place, way in enumerate(ways):
        for number, call in way.calls(x, gy, values, bias).items():
            functions[place, number], rivals[place, number] = call, way.rival(number)
    with torch.no_grad():
        ms = candidates_ms(functions, SECONDS, rivals=rivals, device=device)
    dense = {name: ms[name] for name in DENSE if name in ms}
    impls = {}
    for place, way in enumerate(ways):
        own_ms = {key[1]: value for key, value in ms.items() if isinstance(key, tuple) and key[0] == place}
        impls[way.impl.name, way.problem.activation_dtype] = way.times(own_ms)
    return ConvTimes(dense, impls)


def _entered(layout: str, images: Tensor, problem: ConvProblem) -> Tensor:
    images = images.to(problem.activation_dtype)
    return images if layout == PLAIN else LAYOUTS[layout].enter(images.dtype)(images)


def _dense_call(
    layer: steps.Convolution, shape: Sequence[int], dtype: torch.dtype, name: str, input_grad: bool
) -> Call:
    channels_last = name.startswith("channels_last")
    step = steps.DenseConv(layer, channels_last, name.endswith("bf16"))
    memory = torch.channels_last if channels_last else torch.contiguous_format
    device = next(layer.parameters()).device
    x = torch.randn(*shape, dtype=dtype, device=device).contiguous(memory_format=memory)
    x.requires_grad_(input_grad)
    with torch.no_grad():
        gy = torch.randn_like(step(x))
    return _step_call(step, x, gy)


def _step_call(step: steps.DenseConv | steps.SparseConv, x: Tensor, gy: Tensor) -> Call:
    parameters = [p for p in step.layer.parameters() if p.requires_grad]
    wanted = [x, *parameters] if x.requires_grad else parameters

    def call() -> object:
        with torch.enable_grad():
            y = step(x)
        return torch.autograd.grad(y, wanted, gy) if wanted else y

    return call


def measure_batch_norms(
    units: Sequence[Unit],
    layouts: Mapping[str, Sequence[tuple[str, torch.dtype]]],
    device: torch.device,
) -> dict[str, dict[tuple[str, torch.dtype], float]]:
    """Milliseconds of each batch norm by layout and dtype, forward + backward with all that it fuses.

    ``layouts`` of each unit have a batch norm, and come with the dtype of activations; the plain one is
    always measured.
    """
    known: dict[Hashable, dict[tuple[str, torch.dtype], float]] = {}
    times = {}
    for unit in units:
        key = (
            *map(shape_of, (*unit.inputs, unit.output)),
            unit.activation,
            repr(max_pooling(unit)) if unit.pooled else None,
        )
        if key not in known:
            known[key] = _batch_norm_times(unit, layouts[unit.name], device)
        times[unit.name] = known[key]
    return times


def _pooled(x: Tensor, pooling: Pooling) -> Tensor:
    kernel, stride, padding, dilation = (pooling.window()[i : i + 2] for i in range(0, 8, 2))
    return F.max_pool2d(x, kernel, stride, padding, dilation, pooling.ceil_mode)


def _batch_norm_times(
    unit: Unit, layouts: Sequence[tuple[str, torch.dtype]], device: torch.device
) -> dict[tuple[str, torch.dtype], float]:
    shape, dtype = shape_of(unit.output), dtype_of(unit)
    layer = nn.BatchNorm2d(shape[1], dtype=dtype, device=device)
    pooling = max_pooling(unit) if unit.pooled else None
    function = in_torch(unit.activation)

    def plain(x: Tensor, *residual: Tensor) -> Tensor:
        y: Tensor = layer(x if pooling is None else _pooled(x, pooling))
        for other in residual:
            y = y + other
        return function(y)

    def fused(step: steps.BatchNorm) -> Callable[..., Tensor]:
        return lambda x, *residual: step.forward(x, shape[0], *residual)

    def timed(run: Callable[..., Tensor], convert: Callable[[Tensor], Tensor]) -> Call:
        shapes = [shape_of(node) for node in (*unit.inputs, unit.output)]
        *inputs, gy = (convert(torch.randn(one, dtype=dtype, device=device)) for one in shapes)
        for x in inputs:
            x.requires_grad_()

        def call() -> object:
            with torch.enable_grad():
                y = run(*inputs)
            return torch.autograd.grad(y, [*inputs, *layer.parameters()], gy)

        return call

    functions = {(PLAIN, dtype): timed(plain, torch.clone)}
    for name, held in layouts:
        run = LAYOUTS[name].batch_norm
        assert run is not None
        enter = steps.Enter(LAYOUTS[name].enter(held), held)
        functions[name, held] = timed(
            fused(steps.BatchNorm(layer, run, unit.activation, pooling)), enter.forward
        )
    return candidates_ms(functions, SECONDS / 4, device=device)


def measure_conversion(
    layout: Layout,
    shape: Sequence[int],
    dtype: torch.dtype,
    held: torch.dtype,
    trained: bool,
    device: torch.device,
) -> tuple[float, float]:
    """Milliseconds into a layout and out of it, with the gradient's way back if ``trained``.

    Images have the ``dtype``, activations in the layout the dtype ``held``.
    """
    enter = steps.Enter(layout.enter(held), held)
    images = torch.randn(*shape, dtype=dtype, device=device, requires_grad=trained)
    inside = enter.forward(images).detach().requires_grad_(trained)
    g_images, g_inside = torch.randn_like(images), torch.randn_like(inside)

    def call(convert: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Call:
        def run() -> object:
            with torch.enable_grad():
                y = convert(x)
            return torch.autograd.grad(y, x, g) if trained else y

        return run

    out = call(lambda x: layout.leave(x, shape[0]).to(dtype), inside, g_images)
    calls = {"into": call(enter.forward, images, g_inside), "out": out}
    ms = candidates_ms(calls, SECONDS / 8, device=device)
    return ms["into"], ms["out"]


def measure_memory(device: torch.device) -> float:
    """10^9 bytes a second, read and written, of a large copy."""
    source = torch.ones(8 << 20, device=device)
    target = torch.empty_like(source)
    ms = candidates_ms({"copy": lambda: target.copy_(source)}, 0.1, device=device)["copy"]
    return 2 * source.numel() * source.itemsize / (ms * 1e6)
