"""Generated C in the batch-blocked layout ``[N/V, C, H, W, V]``, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, Candidate, ConvProblem, Impl, Kernels, Phase

_PREPARED: WeakKeyDictionary[Structure, dict[ConvProblem, Kernels]] = WeakKeyDictionary()
"""Kernels of each layer that runs alone, by problem, for as long as its structure lives."""


def reject(problem: ConvProblem) -> list[str]:
    """Why there are no kernels for a problem."""
    from clicktrain.kernels.native import missing_toolchain, toolchain

    reasons = [] if toolchain() is not None else [f"it needs a C compiler, but {missing_toolchain()}"]
    if problem.dtype not in ("float32", "float64"):
        reasons.append(f"it computes in float32 or float64, not in {problem.dtype}")
    elif problem.activations not in (problem.dtype, "bfloat16") or (
        problem.activations == "bfloat16" and problem.dtype != "float32"
    ):
        reasons.append(f"it does not keep activations in {problem.activations} beside {problem.dtype}")
    if min(problem.output) < 1:
        reasons.append(f"a kernel of {problem.kernel} does not fit images of {problem.image}")
    return reasons


def prepare(structure: Structure, problem: ConvProblem, tilings: Mapping[Phase, Any]) -> Kernels:
    """Compute a layer's tables and generate its kernels, which are built later."""
    from clicktrain.kernels.sparse_conv2d.blocked import launch, ops, prepared

    if problem.activations != "bfloat16":  # a plan may be lowered for a model of another dtype
        tilings = {phase: replace(tiling, pairs=False) for phase, tiling in tilings.items()}
    plan, tables = prepared.prepare(structure, _geometry(problem), problem.groups, tilings)
    text, dtype = plan.to_json(), problem.activation_dtype
    return Kernels(
        ops.sparse_conv2d_blocked,
        (list(tables), text),
        dict(zip(PHASES, launch.compile_plan(text, dtype), strict=True)),
        ops.sparse_conv2d_blocked_statistics,
        tuple(launch.compile_plan(text, dtype, ["forward"], sums=True)),
    )


def candidates(structure: Structure, problem: ConvProblem) -> Sequence[Candidate]:
    """List the kernels that are worth measuring for a layer."""
    from clicktrain.kernels.sparse_conv2d.blocked import launch, ops, prepared

    dtype = problem.activation_dtype

    def candidate(one: prepared.Variant) -> Candidate:
        tables, plan = one.tables, one.plan

        def run(x: Tensor, gy: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor
            if one.phase == "forward":
                y = ops.sparse_conv2d_blocked(x, values, bias, tables, plan)
            elif one.phase == "dgrad":
                y = ops.sparse_conv2d_blocked_dgrad(gy, values, tables, plan)
            else:
                y = ops.sparse_conv2d_blocked_wgrad(x, gy, list(values.shape), tables, plan)
            return y

        return Candidate(one.phase, one.tiling, launch.compile_plan(plan, dtype, [one.phase])[0], run)

    return [*map(candidate, prepared.variants(structure, _geometry(problem), problem.groups, dtype))]


def read_tiling(phase: Phase, value: Any) -> Any:
    """A tiling from JSON, or one to check; ValueError for a wrong field, UserError without such code."""
    from clicktrain.kernels.sparse_conv2d.blocked.problem import Tiling

    if not isinstance(value, Tiling):
        if not isinstance(value, dict):
            raise ValueError(f"a tiling is an object, not {str(value)[:60]!r}")
        value = Tiling.from_dict(value)
    if value.pairs and value.code == "cache_blocked" and phase != "wgrad":
        raise UserError(
            f"cannot multiply pairs in {phase} with cache_blocked code: set the tiling's code to unrolled or "
            "indexed, or its pairs to false"
        )
    if value.code == "cache_blocked" and phase == "wgrad":
        raise UserError("has no cache_blocked wgrad: set the tiling's code to unrolled or indexed")
    return value


def needs_half(tiling: Any) -> str:
    """Say so if a tiling multiplies pairs of bfloat16 numbers."""
    return "multiplies pairs of bfloat16 numbers" if tiling.pairs else ""


def slow_here(tiling: Any) -> str:
    """Say so if a tiling wants an instruction that this processor lacks."""
    from clicktrain.kernels.native import toolchain

    tools = toolchain()
    if not tiling.pairs or tools is None or tools.simd.pairs:
        return ""
    return "multiplies pairs of bfloat16 numbers, which this processor has no instruction for"


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

    ``accelerate`` keeps activations blocked from layer to layer and saves the conversions.

    Raises:
        ValueError: not on the CPU, or a dtype other than float32 and float64.
        KernelError: no C compiler, or it fails on a kernel of this layer.
    """
    from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
    from clicktrain.kernels.native import C_TYPES, KernelError, missing_toolchain, toolchain
    from clicktrain.kernels.native.library import need_all

    tools = toolchain()
    if tools is None:
        raise KernelError(f"impl='blocked' needs a C compiler, but {missing_toolchain()}")
    if x.device.type != "cpu" or values.device.type != "cpu":
        raise ValueError(f"impl='blocked' runs on the CPU, not on {x.device}: use 'reference' there")
    if values.dtype not in C_TYPES:
        raise ValueError(f"impl='blocked' computes in float32 or float64, not in {values.dtype}")
    images = x if x.dim() == 4 else x[None]
    if torch.is_autocast_enabled("cpu"):
        images = images.to(values.dtype)
    if images.dtype != values.dtype:
        raise ValueError(f"the input is {x.dtype}, the weight {values.dtype}")
    f, c, r, s = structure.shape
    dtype = str(values.dtype).removeprefix("torch.")
    problem = ConvProblem(
        1, c * groups, f, (r, s), (images.shape[2], images.shape[3]), stride, padding, dilation, groups,
        dtype, dtype,
    )  # fmt: skip
    prepared = _PREPARED.setdefault(structure, {})
    if problem not in prepared:
        kernels = prepare(structure, problem, {})
        need_all(
            kernels.sources.values()
        )  # now: what cannot be built would else be missed in a backward pass
        prepared[problem] = kernels
    kernels = prepared[problem]
    blocks = block_batch(images, tools.lanes(values.dtype))
    y = unblock_batch(kernels.convolve(blocks, values, bias, *kernels.arguments), images.shape[0])
    return cast(Tensor, y if x.dim() == 4 else y[0])


def _geometry(problem: ConvProblem) -> Any:
    from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem as Geometry

    sizes = problem.stride, problem.padding, problem.dilation
    return Geometry.make(problem.channels, problem.filters, problem.kernel, problem.image, *sizes)


IMPL = Impl(
    "blocked",
    reject,
    prepare,
    sparse_conv2d,
    # Float32 sums of a layer stay two orders below it; in bfloat16 results are rounded to a 256th, and so
    # are weights that are multiplied in pairs.
    {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2},
    layout="blocked",
    candidates=candidates,
    read_tiling=read_tiling,
    needs_half=needs_half,
    slow_here=slow_here,
)
