"""One convolution layer on a GPU: Triton's kernels beside cuDNN, checked, timed, with predictions.

What is timed is what the GPU does: calls are recorded in a CUDA graph and replayed, so that what Python
takes to launch them does not count, for dense and sparse alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.bench.conv import Shape
from clicktrain.bench.masks import pattern_mask
from clicktrain.bench.timing import WrongResultError
from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values
from clicktrain.kernels.impls import PHASES, Candidate, ConvProblem, Phase
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import KernelError
from clicktrain.kernels.sparse_conv2d import IMPLS
from clicktrain.kernels.sparse_conv2d.impl.triton import predicted
from clicktrain.kernels.triton_run import interpreted, missing_triton

PRECISIONS: Mapping[str, tuple[torch.dtype, bool]] = {
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
"""By name: dtype of the activations, and whether float32 may be multiplied as tf32."""
REPEATS = 10
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class GpuCase:
    """A layer and its structure.

    Attributes:
        compression: all weights over kept ones, as asked for.
        filters, channels: how many side by side share channels and patterns, and kernels.
        precision: a key of `PRECISIONS`.
        kernel: rows and columns of a kernel; the image keeps its size.
    """

    shape: Shape
    compression: float
    filters: int
    channels: int
    precision: str
    kernel: int = 3

    def name(self) -> str:
        """For files and messages."""
        s = self.shape
        return (
            f"{s.channels}-{s.filters}-{s.height}x{s.width}-n{s.batch}-{self.compression:g}x-"
            f"{self.filters}x{self.channels}-{self.precision}{'' if self.kernel == 3 else f'-k{self.kernel}'}"
        )


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One layer in one direction; milliseconds are medians of replayed graphs, and missing in a dry run.

    Attributes:
        dense: by memory format.
        sparse: by tile.
        ratio: the fastest dense over the fastest sparse; None without times.
        predicted_ms: of the best tile, by the model, before it was measured.
        errors: by tile, largest error against float64 over the largest value.
        failed: by tile, why it could not be built.
    """

    case: GpuCase
    phase: Phase
    density: float
    dense: dict[str, float]
    sparse: dict[str, float]
    ratio: float | None
    predicted_ms: float
    predicted_ratio: float
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def need_gpu() -> torch.device:
    """The GPU; a UserError says what is missing."""
    if not torch.cuda.is_available():
        raise UserError(f"this needs an NVIDIA GPU that PyTorch can see; torch {torch.__version__} sees none")
    return torch.device("cuda")


def graph_ms(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each call on the GPU; calls take turns."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, call in calls.items():
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number:
                times[name].append(begin.elapsed_time(end) / REPEATS)
    return {name: statistics.median(ms) for name, ms in times.items()}


def dry_device() -> torch.device:
    """The CPU, for a dry run; UserError unless Triton's interpreter is asked for."""
    if (missing := missing_triton()) is not None or not interpreted():
        raise UserError(f"a dry run wants TRITON_INTERPRET=1 and Triton{f': {missing}' if missing else ''}")
    return torch.device("cpu")


def bench_case(case: GpuCase, seed: int = 0, *, dry: bool = False) -> list[GpuRow]:
    """Check every candidate against float64 and time it beside cuDNN, in each direction.

    ``dry``: on the CPU, in Triton's interpreter; the likeliest candidate of each direction is checked, and
    nothing is timed.

    Raises:
        UserError: no GPU, or the implementation refuses the layer.
        WrongResultError: a result is off by more than the implementation allows.
    """
    device, impl = dry_device() if dry else need_gpu(), IMPLS["triton"]
    dtype, tf32 = PRECISIONS[case.precision]
    s = case.shape
    torch.manual_seed(seed)
    channels, kernel = min(case.channels, s.channels), (case.kernel, case.kernel)
    mask = pattern_mask(
        (s.filters, s.channels // channels, *kernel),
        case.compression,
        case.filters,
        torch.Generator().manual_seed(seed),
    ).repeat_interleave(channels, 1)
    structure = Structure.from_mask(mask).to(device)
    weight = torch.randn(s.filters, s.channels, *kernel, device=device) * 0.05
    x = torch.randn(s.batch, s.channels, s.height, s.width, device=device).to(dtype)
    gy = torch.randn(s.batch, s.filters, s.height, s.width, device=device).to(dtype)
    values = pack_values(structure, weight)
    problem = ConvProblem.of_structure(
        structure,
        (s.height, s.width),
        s.batch,
        padding=(case.kernel // 2, case.kernel // 2),
        activations=str(dtype).removeprefix("torch."),
        device=device.type,
    )
    if reasons := impl.reject(problem):
        raise UserError(f"{case.name()}: {'; '.join(reasons)}")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, True
    try:
        assert impl.candidates is not None
        every = impl.candidates(structure, problem)
        if dry:
            every = list({one.phase: one for one in reversed(every)}.values())
        expected = _expected(x, gy, weight * mask.to(device), structure)
        return [
            _row(case, phase, every, (x, gy, values), weight, structure, problem, expected[phase], dry)
            for phase in PHASES
        ]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def _row(
    case: GpuCase,
    phase: Phase,
    every: Any,
    tensors: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    structure: Structure,
    problem: ConvProblem,
    expected: Tensor,
    dry: bool,
) -> GpuRow:
    x, gy, values = tensors
    layout, impl = LAYOUTS["batch_innermost"], IMPLS["triton"]
    inside, inside_gy = (layout.enter(one.dtype)(one) for one in (x, gy))
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    candidates: list[Candidate] = [one for one in every if one.phase == phase]
    for candidate in candidates:
        tile = str(candidate.tiling)

        def call(candidate: Candidate = candidate) -> Tensor:
            return candidate.run(inside, inside_gy, values, None)

        try:
            with torch.no_grad():
                result = call()
        except KernelError as error:
            failed[tile] = str(error)
            continue
        if phase != "wgrad":
            result = layout.leave(result, x.shape[0])
        # As large as the largest value; the last few images stand for all where the batch is large.
        errors[tile] = float(
            (result[-len(expected) :].double() - expected).abs().max() / expected.abs().max()
        )
        if not errors[tile] <= impl.tolerance[x.dtype]:
            raise WrongResultError(
                f"{case.name()} {phase} {tile}: off by {errors[tile]:.2g} of the largest value"
            )
        calls[tile] = call
    dense = _dense_calls(phase, x, gy, weight)
    dense_ms: dict[str, float] = {}
    sparse_ms: dict[str, float] = {}
    if dry:
        for one in dense.values():
            one()
    else:
        with torch.no_grad():
            times = graph_ms({**calls, **{f"dense {name}": call for name, call in dense.items()}})
        dense_ms = {name: times[f"dense {name}"] for name in dense}
        sparse_ms = {name: times[name] for name in calls}
    forecast = predicted(phase, structure, problem, "")
    ratio = min(dense_ms.values()) / min(sparse_ms.values()) if sparse_ms and dense_ms else None
    return GpuRow(
        case,
        phase,
        structure.density,
        dense_ms,
        sparse_ms,
        ratio,
        forecast.seconds * 1e3,
        forecast.dense_seconds / forecast.seconds,
        errors,
        failed,
    )


def _dense(phase: Phase, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
    around = weight.shape[2] // 2
    if phase == "forward":
        return F.conv2d(x, weight, padding=around)
    mask, one = [phase == "dgrad", phase == "wgrad", False], [1, 1]
    both = torch.ops.aten.convolution_backward(
        gy, x, weight, None, one, [around, around], one, False, [0, 0], 1, mask
    )
    result: Tensor = both[0 if phase == "dgrad" else 1]
    return result


def _dense_calls(phase: Phase, x: Tensor, gy: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for name, memory in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        own = [one.to(x.dtype).contiguous(memory_format=memory) for one in (x, gy, weight)]

        def call(own: list[Tensor] = own) -> Tensor:
            return _dense(phase, *own)

        calls[name] = call
    return calls


def _expected(x: Tensor, gy: Tensor, weight: Tensor, structure: Structure) -> dict[Phase, Tensor]:
    """In float64, of the values that were rounded; forward and dgrad of the last four images."""
    half = weight.to(x.dtype).double()
    last, last_gy = x[-4:].double(), gy[-4:].double()
    result: dict[Phase, Tensor] = {
        "forward": _dense("forward", last, last_gy, half),
        "dgrad": _dense("dgrad", last, last_gy, half),
    }
    whole = torch.zeros_like(half)
    for at in range(0, len(x), 16):  # float64 of the whole batch at once may not fit
        whole += _dense("wgrad", x[at : at + 16].double(), gy[at : at + 16].double(), half)
    result["wgrad"] = pack_values(structure, whole)
    return result
