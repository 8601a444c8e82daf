"""Triton kernels in the batch-innermost layout ``[C, H, W, N]``, on NVIDIA GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, Candidate, ConvProblem, Impl, Kernels, Phase
from clicktrain.kernels.sparse_conv2d.impl.alone import run_alone
from clicktrain.kernels.triton_run import interpreted, missing_triton

_PREPARED: WeakKeyDictionary[Structure, dict[ConvProblem, Kernels]] = WeakKeyDictionary()
"""Kernels of each layer that runs alone, by problem, for as long as its structure lives."""
_HALF = ("bfloat16", "float16")


def reject(problem: ConvProblem) -> list[str]:
    """Why there are no kernels for a problem."""
    from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import LARGEST_IMAGE, padding_of

    missing = missing_triton()
    reasons = [] if missing is None else [missing]
    if problem.device == "cpu" and not interpreted():
        reasons.append("on the CPU Triton's interpreter runs it, where TRITON_INTERPRET=1 is set")
    if problem.dtype not in ("float32", "float64", *_HALF):
        reasons.append(f"it has no weights in {problem.dtype}")
    elif problem.activations != problem.dtype and not (
        problem.dtype == "float32" and problem.activations in _HALF
    ):
        reasons.append(f"it does not keep activations in {problem.activations} beside {problem.dtype}")
    if min(problem.output) < 1:
        reasons.append(f"a kernel of {problem.kernel} does not fit images of {problem.image}")
    reach = [(k - 1) * d for k, d in zip(problem.kernel, problem.dilation, strict=True)]
    padding = [side for axis in padding_of(problem) for side in axis]
    if max(*problem.image, *problem.output, *reach, *padding, *problem.stride) > LARGEST_IMAGE:
        reasons.append(f"images, reach and padding are at most {LARGEST_IMAGE} here")
    return reasons


def prepare(structure: Structure, problem: ConvProblem, tilings: Mapping[Phase, Any]) -> Kernels:
    """Compute a layer's tables; Triton compiles its kernels when they are first called."""
    from clicktrain.kernels.sparse_conv2d.batch_innermost import ops
    from clicktrain.kernels.sparse_conv2d.batch_innermost.choice import tiles_by_rule
    from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import make_plan

    tiles = tiles_by_rule(structure, problem, tilings, PHASES)
    plan, tables = make_plan(structure, problem, tiles)
    return Kernels(
        ops.sparse_conv2d_batch_innermost,
        (tables, plan.to_json()),
        with_statistics=ops.sparse_conv2d_batch_innermost_statistics,
        with_affine=ops.sparse_conv2d_batch_innermost_affine,
    )


def candidates(structure: Structure, problem: ConvProblem) -> Sequence[Candidate]:
    """List the kernels that are worth measuring for a layer: what a model of the GPU thinks fastest."""
    from clicktrain.kernels.sparse_conv2d.batch_innermost.choice import choose, gpu_here

    gpu = gpu_here(structure.device)
    return [
        _candidate(structure, problem, phase, chosen.tile)
        for phase in PHASES
        for chosen in choose(phase, structure, problem, gpu)
    ]


def _candidate(structure: Structure, problem: ConvProblem, phase: Phase, tile: Any) -> Candidate:
    from clicktrain.kernels.sparse_conv2d.batch_innermost import ops
    from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import make_plan

    plan, tables = make_plan(structure, problem, {phase: tile})
    text = plan.to_json()

    def run(x: Tensor, gy: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor
        if phase == "forward":
            y = ops.sparse_conv2d_batch_innermost(x, values, bias, tables, text)
        elif phase == "dgrad":
            y = ops.sparse_conv2d_batch_innermost_dgrad(gy, values, tables, text)
        else:
            y = ops.sparse_conv2d_batch_innermost_wgrad(x, gy, list(values.shape), tables, text)
        return y

    return Candidate(phase, tile, "", run)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What the roofline model expects of a phase on a GPU, and of PyTorch's dense one; nothing is measured.

    Attributes:
        tile: the one that should be fastest, as text.
        limit: what it waits for: ``products``, ``shared`` (memory), ``instructions``, ``l2`` or ``memory``.
    """

    seconds: float
    dense_seconds: float
    tile: str
    limit: str


def predicted(phase: Phase, structure: Structure, problem: ConvProblem, code: str) -> Predicted:
    """Predict the best tile of a code, ``blocks`` or ``rows``, on the GPU here, else on an H200."""
    from clicktrain.kernels.sparse_conv2d.batch_innermost.choice import choose, gpu_here

    gpu = gpu_here(structure.device)
    best = choose(phase, structure, problem, gpu, 1, code)[0]
    f, c, r, s = structure.shape
    size = getattr(torch, problem.activations).itemsize * problem.batch
    images = math.prod(problem.output)
    operations = 2.0 * f * c * r * s * images * problem.batch
    moved = size * (problem.channels * math.prod(problem.image) + f * images)
    dense = gpu.dense_seconds(operations, moved, problem.activations)
    return Predicted(best.prediction.seconds, dense, str(best.tile), best.prediction.limit)


def read_tiling(phase: Phase, value: Any) -> Any:
    """A tile from JSON, or one to check; ValueError for a wrong field, UserError without such code."""
    from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import read_tile

    return read_tile(phase, value)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    structure: Structure,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Run a layer alone, between two conversions; arguments as in `Impl.run`.

    ``accelerate`` keeps activations batch-innermost from layer to layer and saves the conversions.

    Raises:
        ValueError: Triton is not installed, or what `reject` says.
    """

    def convolve(problem: ConvProblem, inside: Tensor) -> Tensor:
        prepared = _PREPARED.setdefault(structure, {})
        if problem not in prepared:
            prepared[problem] = prepare(structure, problem, {})
        kernels = prepared[problem]
        return kernels.convolve(inside, values, bias, *kernels.arguments)

    refusals = IMPL.refusals if x.device.type != "cpu" else reject
    return run_alone(
        "triton", refusals, convolve, x, structure, values.dtype, stride, padding, dilation, groups
    )


IMPL = Impl(
    "triton",
    reject,
    prepare,
    sparse_conv2d,
    # Weights are rounded to the activations' dtype, and sums are float32; float32 may be multiplied as tf32,
    # which has three digits, where PyTorch's own convolutions may.
    {torch.float64: 1e-12, torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3},
    layout="batch_innermost",
    devices=("cuda",),
    candidates=candidates,
    read_tiling=read_tiling,
)
