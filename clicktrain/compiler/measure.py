"""Measured times of the candidates for one layer on its real shapes, forward and backward.

Candidates take turns, so that a disturbance hits all of them, and the median of the turns counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from clicktrain.compiler import steps
from clicktrain.compiler.plan import DENSE, Activations, activations_of, kept_in
from clicktrain.compiler.units import Unit, shape_of
from clicktrain.formats.packed import Structure
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.library import build_all
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.launch import compile_plan
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import MAX_SETS, distinct
from clicktrain.kernels.sparse_conv2d.blocked.prepared import Variant, variants
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling
from clicktrain.latency.timer import clock_of

SECONDS = 0.8
"""For all candidates of one layer shape together."""
TURNS = (2, 7)
"""At least and at most so many."""
HOPELESS = 5
HOPELESS_SECONDS = 0.1
"""See `take_turns`; a first call also builds things, which takes less than this."""
LITTLE_WORK = 1 << 21
"""Kept multiply-adds of a layer and batch, under 0.1 ms, from which on more than one candidate is built: that
takes a third of a second each, and could save microseconds."""
CALL_MS = 0.05
"""What one operator costs in PyTorch, forward and backward."""
_WRITE_ONLY_GRADIENT: tuple[Phase, ...] = ("forward", "wgrad")
Candidates = Mapping[Activations, Sequence[Variant]]
"""Kernels that could run a convolution, by what activations are kept in."""


@dataclass(frozen=True, slots=True)
class BlockedTimes:
    """Milliseconds of one convolution in the blocked layout, forward + backward, and its best tilings.

    Infinitely many where a kernel that it needs cannot be built.
    """

    ms: float
    tilings: tuple[tuple[Phase, Tiling], ...]


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds of one convolution, forward + backward.

    Attributes:
        dense: by name of `DENSE`.
        blocked: by what activations are kept in.
    """

    dense: Mapping[str, float]
    blocked: Mapping[Activations, BlockedTimes]


def take_turns(
    functions: Mapping[str, Callable[[], object]],
    seconds: float = SECONDS,
    rivals: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Median milliseconds of each function; each runs once before anything counts.

    Where one thread does the work it is that thread's time on the processor: other programs do not count.

    Args:
        functions: by name.
        seconds: for all turns together.
        rivals: by name, what it is an alternative for. One whose first call takes `HOPELESS` times as long as
            the fastest first call of its rivals is not called again, and that call counts: bfloat16 on a
            processor without it takes seconds where float32 takes a tenth of one.
    """
    clock = clock_of(torch.device("cpu"))

    def timed(function: Callable[[], object]) -> float:
        start = clock()
        function()
        return clock() - start

    first = {name: timed(function) for name, function in functions.items()}
    least: dict[str, float] = {}
    for name, rival in (rivals or {}).items():
        least[rival] = min(least.get(rival, first[name]), first[name])
    hopeless = {
        name
        for name, rival in (rivals or {}).items()
        if first[name] > max(HOPELESS * least[rival], HOPELESS_SECONDS)
    }
    taken: dict[str, list[float]] = {name: [first[name]] if name in hopeless else [] for name in functions}
    begin = time.perf_counter()
    for turn in range(TURNS[1]):
        if turn >= TURNS[0] and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            if name not in hopeless:
                taken[name].append(timed(function))
    return {name: 1e3 * median(times) for name, times in taken.items()}


def measure_convolutions(
    units: Sequence[Unit], trained_inputs: Mapping[str, bool], dtypes: Sequence[str]
) -> dict[str, LayerTimes]:
    """Times of each convolution; layers of one shape and density share them.

    Args:
        units: of kind ``conv``, with shapes.
        trained_inputs: unit name -> whether the gradient of its input is wanted.
        dtypes: ``fp32`` and ``bf16``: what dense candidates compute in, and activations are kept in.
    """
    groups: dict[tuple[object, ...], list[Unit]] = {}
    for unit in units:
        groups.setdefault((*layer_key(unit), trained_inputs[unit.name]), []).append(unit)
    prepared = _built({key: (same[0], _sparse_candidates(same[0], dtypes)) for key, same in groups.items()})
    times = {}
    for key, same in groups.items():
        found = _times(same[0], prepared[key], trained_inputs[same[0].name], dtypes)
        times.update({unit.name: found for unit in same})
    return times


def _built(
    wanted: Mapping[tuple[object, ...], tuple[Unit, Candidates]],
) -> dict[tuple[object, ...], Candidates]:
    """Build the kernels of all candidates; those that cannot be built are left out."""
    texts = {
        (key, kept, number): compile_plan(one.plan, kept_in(kept, dtype_of(unit)), [one.phase])[0]
        for key, (unit, candidates) in wanted.items()
        for kept, variants_ in candidates.items()
        for number, one in enumerate(variants_)
    }
    failed = build_all(texts.values())
    return {
        key: {
            kept: [one for number, one in enumerate(variants_) if texts[key, kept, number] not in failed]
            for kept, variants_ in candidates.items()
        }
        for key, (_, candidates) in wanted.items()
    }


def measure_batch_norms(
    units: Sequence[Unit], activations: Sequence[Activations]
) -> dict[str, dict[str, float]]:
    """Milliseconds of each batch norm with what is fused into it: ``plain``, and blocked by what is kept."""
    known: dict[tuple[object, ...], dict[str, float]] = {}
    times = {}
    for unit in units:
        key = (shape_of(unit.output), len(unit.inputs), unit.relu)
        if key not in known:
            known[key] = _batch_norm_times(unit, activations)
        times[unit.name] = known[key]
    return times


def measure_conversion(
    shape: Sequence[int], dtype: torch.dtype, kept: torch.dtype, trained: bool
) -> tuple[float, float]:
    """Milliseconds into the blocked layout and out of it, with the gradient's way back if ``trained``.

    Args:
        shape: of the images.
        dtype: of the images.
        kept: of the blocks.
        trained: whether there are gradients.
    """
    tools = toolchain()
    assert tools is not None
    n, c, h, w = shape
    lanes = tools.lanes(kept)
    block = steps.Block(lanes, kept)
    images = torch.randn(n, c, h, w, dtype=dtype, requires_grad=trained)
    blocks = torch.randn(-(-n // lanes), c, h, w, lanes, dtype=kept, requires_grad=trained)
    g_images, g_blocks = torch.randn_like(images), torch.randn_like(blocks)

    def into() -> object:
        with torch.enable_grad():
            y = block.forward(images)
        return torch.autograd.grad(y, images, g_blocks) if trained else y

    def out() -> object:
        with torch.enable_grad():
            y = steps.unblock(blocks, n, dtype)
        return torch.autograd.grad(y, blocks, g_images) if trained else y

    ms = take_turns({"into": into, "out": out}, SECONDS / 8)
    return ms["into"], ms["out"]


def measure_memory() -> float:
    """10^9 bytes a second, read and written, of a large copy."""
    source = torch.ones(8 << 20)
    target = torch.empty_like(source)
    ms = take_turns({"copy": lambda: target.copy_(source)}, 0.1)["copy"]
    return 2 * source.numel() * source.itemsize / (ms * 1e6)


def conv_parts(unit: Unit) -> tuple[PackedConv2d | nn.Conv2d, ConvProblem]:
    """Layer and problem of a convolution's unit."""
    layer = unit.module
    assert isinstance(layer, (PackedConv2d, nn.Conv2d))
    shape = shape_of(unit.inputs[0])
    return layer, steps.conv_problem(layer, (shape[2], shape[3]))


def layer_key(unit: Unit) -> tuple[object, ...]:
    """What makes two convolutions alike, as far as time goes."""
    layer, problem = conv_parts(unit)
    kind: tuple[object, ...] = ("dense",)
    if isinstance(layer, PackedConv2d):
        sets = min(len(distinct(layer.structure)), MAX_SETS + 1)
        kind = (round(layer.structure.density, 2), layer.structure.nnz_per_filter is None, sets)
    images = shape_of(unit.inputs[0])[0]
    return images, layer.groups, layer.bias is None, *problem.numbers(), *kind


def _sparse_candidates(unit: Unit, dtypes: Sequence[str]) -> Candidates:
    """By what is kept; of layers of little work the likeliest of each phase alone."""
    layer, problem = conv_parts(unit)
    structure, dtype = sparse_structure(layer), dtype_of(unit)
    little = structure.nnz * math.prod((shape_of(unit.output)[0], *shape_of(unit.output)[2:])) < LITTLE_WORK
    found: dict[Activations, Sequence[Variant]] = {}
    for kept in activations_of(dtypes, dtype):
        every = variants(structure, problem, layer.groups, kept_in(kept, dtype))
        first = {one.phase: one for one in reversed(every)}
        found[kept] = list(first.values()) if little else every
    return found


def sparse_structure(layer: PackedConv2d | nn.Conv2d) -> Structure:
    """The kept positions; of a dense layer all."""
    return layer.structure if isinstance(layer, PackedConv2d) else steps.full_structure(layer)


def _times(
    unit: Unit,
    sparse: Mapping[Activations, Sequence[Variant]],
    trained_input: bool,
    dtypes: Sequence[str],
) -> LayerTimes:
    layer, problem = conv_parts(unit)
    dtype, shape = dtype_of(unit), shape_of(unit.inputs[0])
    functions = {
        name: _dense_call(layer, shape, dtype, name, trained_input)
        for name in DENSE
        if name.split()[1] in dtypes
    }
    tools = toolchain()
    assert tools is not None
    lanes = tools.lanes(dtype)
    blocks = -(-shape[0] // lanes)
    x = torch.randn(blocks, *shape[1:], lanes, dtype=dtype)
    gy = torch.randn(blocks, problem.filters, problem.rows.out, problem.columns.out, lanes, dtype=dtype)
    values = (layer.values if isinstance(layer, PackedConv2d) else layer.weight.flatten(1)).detach()
    bias = None if layer.bias is None else layer.bias.detach()
    named: dict[Activations, dict[str, Variant]] = {}
    for kept, candidates in sparse.items():
        own_x, own_gy = (t.to(kept_in(kept, dtype)) for t in (x, gy))
        wanted = [one for one in candidates if trained_input or one.phase in _WRITE_ONLY_GRADIENT]
        named[kept] = {f"sparse {kept} {number}": one for number, one in enumerate(wanted)}
        for name, one in named[kept].items():
            functions[name] = _sparse_call(one, own_x, own_gy, values, bias)
    kinds = {name: "dense" for name in DENSE if name in functions}
    kinds.update({name: one.phase for candidates in named.values() for name, one in candidates.items()})
    ms = take_turns(functions, rivals=kinds)
    dense = {name: ms[name] for name in DENSE if name in ms}
    phases = PHASES if trained_input else _WRITE_ONLY_GRADIENT
    return LayerTimes(dense, {kept: _best(ms, candidates, phases) for kept, candidates in named.items()})


def _best(
    ms: Mapping[str, float], candidates: Mapping[str, Variant], phases: Sequence[Phase]
) -> BlockedTimes:
    """The fastest candidate of each phase."""
    total, tilings = CALL_MS, []
    for phase in phases:
        timed = [
            (ms[name], place) for place, name in enumerate(candidates) if candidates[name].phase == phase
        ]
        if not timed:
            return BlockedTimes(math.inf, ())
        best, place = min(timed)
        total += best
        tilings.append((phase, list(candidates.values())[place].tiling))
    return BlockedTimes(total, tuple(tilings))


def _dense_call(
    layer: PackedConv2d | nn.Conv2d, shape: Sequence[int], dtype: torch.dtype, name: str, trained_input: bool
) -> Callable[[], object]:
    channels_last = name.startswith("channels_last")
    step = steps.DenseConv(layer, channels_last, name.endswith("bf16"))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(*shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_(trained_input)
    with torch.no_grad():
        gy = torch.randn_like(step(x))
    wanted = [p for p in (x, *layer.parameters()) if p.requires_grad]

    def call() -> object:
        with torch.enable_grad():
            y = step(x)
        return torch.autograd.grad(y, wanted, gy) if wanted else y

    return call


def _sparse_call(
    one: Variant, x: Tensor, gy: Tensor, values: Tensor, bias: Tensor | None
) -> Callable[[], object]:
    if one.phase == "forward":
        return lambda: launch.forward(x, values, bias, one.tables, one.plan)
    if one.phase == "dgrad":
        return lambda: launch.dgrad(gy, values, one.tables, one.plan)
    return lambda: launch.wgrad(x, gy, list(values.shape), one.tables, one.plan)


def _batch_norm_times(unit: Unit, activations: Sequence[Activations]) -> dict[str, float]:
    n, c, h, w = shape_of(unit.output)
    dtype = dtype_of(unit)
    tools = toolchain()
    assert tools is not None
    lanes = tools.lanes(dtype)
    layer = nn.BatchNorm2d(c, dtype=dtype)
    fused = steps.BatchNorm(layer, unit.relu)

    def plain(x: Tensor, *residual: Tensor) -> Tensor:
        y: Tensor = layer(x)
        for other in residual:
            y = y + other
        return torch.relu(y) if unit.relu else y

    def blocked(x: Tensor, *residual: Tensor) -> Tensor:
        return fused.forward(x, n, *residual)

    functions = {}
    images, blocks = (n, c, h, w), (-(-n // lanes), c, h, w, lanes)
    ways: list[tuple[str, Callable[..., Tensor], tuple[int, ...], torch.dtype]] = [
        ("plain", plain, images, dtype),
        *((kept, blocked, blocks, kept_in(kept, dtype)) for kept in activations),
    ]
    for name, function, shape, of in ways:
        inputs = [torch.randn(shape, dtype=dtype).to(of).requires_grad_() for _ in unit.inputs]
        gy = torch.randn(shape, dtype=dtype).to(of)

        def call(
            function: Callable[..., Tensor] = function, inputs: list[Tensor] = inputs, gy: Tensor = gy
        ) -> object:
            with torch.enable_grad():
                y = function(*inputs)
            return torch.autograd.grad(y, [*inputs, *layer.parameters()], gy)

        functions[name] = call
    return take_turns(functions, SECONDS / 4)


def dtype_of(unit: Unit) -> torch.dtype:
    """Number type of a unit's result in the example."""
    dtype: torch.dtype = unit.output.meta["tensor_meta"].dtype
    return dtype
