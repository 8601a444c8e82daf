"""Calls of a layer's generated code: loaded once, given pointers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.native import compute_type, load, needed_toolchain, toolchain
from clicktrain.kernels.native.library import call
from clicktrain.kernels.sparse_conv2d.blocked import statistics
from clicktrain.kernels.sparse_conv2d.blocked.codegen import scratch_vectors, source
from clicktrain.kernels.sparse_conv2d.blocked.layout import vectors
from clicktrain.kernels.sparse_conv2d.blocked.prepared import ConvPlan
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.walk import ordered_vectors

STREAM_BYTES = 8 << 20
"""Results of this size are written around the caches: the next reader would not find them there anyway."""


def _weights(values: Tensor, order: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor | None]:
    """Values as a kernel reads them, and the order that it brings them into itself.

    Pairs of bfloat16 are made here.
    """
    if tiling.pairs:
        flat = values.reshape(-1).bfloat16()
        return torch.cat([flat, flat.new_zeros(1)]).index_select(0, order), None
    return values.contiguous(), order if order.numel() else None


def _ordered(values: Tensor, order: Tensor) -> Tensor:
    """Values in the order of a kernel; without one, as they are."""
    flat = values.reshape(-1)
    return flat.index_select(0, order) if order.numel() else flat.contiguous()


def compile_plan(
    plan: str, dtype: torch.dtype, phases: Sequence[Phase] = PHASES, sums: bool = False
) -> list[str]:
    """The C texts of a plan's phases, to be built ahead of their first use; forward perhaps with sums."""
    return [_text(plan, dtype, phase, sums and phase == "forward") for phase in phases]


def forward(x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str) -> Tensor:
    """[B, C, H, W, V] -> [B, F, H', W', V]."""
    kernel = _kernel(plan, x.dtype, "forward")
    _check(x, _read(kernel), values, bias)
    y = x.new_empty(output_shape(x, kernel.plan.problem))
    bias = None if bias is None else bias.contiguous()
    weights = _weights(values, tables[2], kernel.tiling)
    kernel.run(vectors(x), y, *weights, bias, tables[0], tables[1])
    return y


def forward_statistics(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`; also mean and biased variance [F] of the results of ``n`` images."""
    lanes = x.shape[4]
    if not max((x.shape[0] - 1) * lanes, 0) < n <= x.shape[0] * lanes:
        raise UserError(f"{x.shape[0]} blocks of {lanes} lanes hold no batch of {n} images to take a mean of")
    kernel = _kernel(plan, x.dtype, "forward", sums=True)
    _check(x, _read(kernel), values, bias)
    y = x.new_empty(output_shape(x, kernel.plan.problem))
    mean, var = values.new_empty(y.shape[1]), values.new_empty(y.shape[1])
    bias = None if bias is None else bias.contiguous()
    weights = _weights(values, tables[2], kernel.tiling)
    kernel.run(vectors(x), y, *weights, bias, tables[0], tables[1], mean, var, images=n)
    return y, mean, var


def output_shape(x: Tensor, problem: ConvProblem) -> tuple[int, int, int, int, int]:
    """Of a convolution's result, [B, F, H', W', V]."""
    return x.shape[0], problem.filters, problem.rows.out, problem.columns.out, x.shape[4]


def grad_input(gy: Tensor, values: Tensor, tables: Sequence[Tensor], plan: str) -> Tensor:
    """[B, F, H', W', V] -> [B, C, H, W, V]."""
    kernel = _kernel(plan, gy.dtype, "grad_input")
    _check(gy, _read(kernel), values)
    problem = kernel.plan.problem
    gx = gy.new_empty(gy.shape[0], problem.channels, problem.rows.size, problem.columns.size, gy.shape[4])
    weights = _weights(values, tables[5], kernel.tiling)
    kernel.run(vectors(gy), gx, *weights, None, tables[3], tables[4])
    return gx


def grad_weight(
    x: Tensor, gy: Tensor, values_shape: Sequence[int], tables: Sequence[Tensor], plan: str
) -> Tensor:
    """Activations and output gradients -> gradient of the packed values."""
    kernel = _kernel(plan, x.dtype, "grad_weight")
    _check(x, _read(kernel))
    if gy.dtype is not x.dtype:
        raise UserError(
            f"the output's gradient is of {gy.dtype}, the input of {x.dtype}: both have to be alike"
        )
    expected = output_shape(x, kernel.plan.problem)
    if gy.shape != expected:
        raise UserError(f"the output's gradient is {list(gy.shape)}, this layer's plan says {list(expected)}")
    order, chunks = tables[8], tables[9]
    found = x.new_empty(int(chunks[1]), dtype=compute_type(x.dtype))
    few = x.shape[0] * kernel.regions < 4 * kernel.images * torch.get_num_threads()
    whole = chunks if few else _one_chunk(chunks)
    kernel.run(vectors(x), vectors(gy), found, tables[6], tables[7], whole)
    return _ordered(found, order).view(tuple(values_shape))


def _read(kernel: _Kernel) -> tuple[int, int, int]:
    """Channels, rows and columns of what a phase reads its windows from."""
    problem = kernel.plan.problem
    if kernel.phase == "grad_input":
        return problem.filters, problem.rows.out, problem.columns.out
    return problem.channels, problem.rows.size, problem.columns.size


def _check(x: Tensor, planes: tuple[int, int, int], *parameters: Tensor | None) -> None:
    """Refuse what the generated code would misread: it takes pointers.

    Raises:
        UserError: number types that do not fit each other, images of another size than the plan is for, or
            other lanes than this processor has.
    """
    computed, tools = compute_type(x.dtype), toolchain()
    for one in parameters:
        if one is not None and one.dtype is not computed:
            raise UserError(
                f"a blocked convolution of {x.dtype} has weights and bias of {computed}, not of {one.dtype}"
            )
    lanes = tools.lanes(x.dtype) if tools else 0
    if x.dim() != 5 or x.shape[4] != lanes:
        raise UserError(
            f"a blocked convolution takes [B, C, H, W, {lanes}] of {x.dtype} here, not {list(x.shape)}: "
            "convert with block_batch"
        )
    if x.shape[1:4] != planes:
        raise UserError(f"this layer's plan is for {list(planes)} (C, H, W), not for {list(x.shape[1:4])}")


def _one_chunk(chunks: Tensor) -> Tensor:
    return torch.tensor([1, int(chunks[1]), 0, int(chunks[-2]), 0], dtype=torch.int64)


class _Scratch(threading.local):
    """Memory that a thread's kernels work in, kept from call to call: as much as the largest one needs."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """So many numbers at least, of any value."""
        kept = self._kept.get(dtype)
        if kept is None or kept.numel() < count:
            kept = self._kept[dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return kept


_SCRATCH = _Scratch()


class _Kernel:
    """One loaded function with what it needs to be called."""

    def __init__(self, plan: ConvPlan, dtype: torch.dtype, phase: Phase, text: str, sums: bool) -> None:
        self.plan, self.phase, self.dtype = plan, phase, dtype
        self._run = load(text).run
        self.tiling = plan.tiling(phase)
        self._computed = compute_type(dtype)
        self._scratch = scratch_vectors(phase, plan.problem, plan.vocabulary, self.tiling, dtype)
        self._sums = sums
        self.regions = region_count(phase, plan.problem, self.tiling)
        self.images = self.tiling.images

    def run(self, first: Tensor, *rest: Tensor | None, images: int | None = None) -> None:
        threads = torch.get_num_threads()
        lanes = first.shape[4]
        vectors_each, count = self._scratch, 0
        if self.phase == "grad_weight":
            result = rest[1]
            assert result is not None
            vectors_each += -(-result.numel() // lanes)
        size = self._computed.itemsize
        room = vectors_each * threads * lanes
        if self._sums:
            filters = self.plan.problem.filters
            room += -(-statistics.scratch_bytes(filters, threads, lanes * size) // size)
        numbers = [first.shape[0], threads]
        if self.phase != "grad_weight":
            result, weights, order, _, _, entries = rest[:6]
            assert result is not None
            assert weights is not None
            assert entries is not None
            places = 0 if order is None else order.numel()
            count = places if self.tiling.code == "taps" else weights.numel()
            # In their order already: each has an entry.
            missing = order is None and not self.tiling.pairs and weights.numel() != entries.numel()
            if missing or weights.numel() < places:
                raise UserError(f"this layer's plan is not for {weights.numel()} weights")
            if places:
                room += ordered_vectors(count, size, lanes * size) * lanes
            stream = result.numel() * result.itemsize >= STREAM_BYTES
            numbers = [count, places, first.shape[0], int(stream), threads]
        scratch = _SCRATCH.take(max(room, 1), self._computed)
        if first.numel():
            if images is not None:
                numbers.insert(0, images)
            if call(self._run, first, *rest, scratch, *numbers):
                raise UserError(f"this layer's plan is not for {count} weights")
        elif self.phase == "grad_weight":
            rest[1].zero_()  # type: ignore[union-attr]


def region_count(phase: Phase, problem: ConvProblem, tiling: Tiling) -> int:
    """Regions of one block of images."""
    sizes = (
        (problem.rows.size, problem.columns.size)
        if phase == "grad_input"
        else (problem.rows.out, problem.columns.out)
    )
    count = 1
    for size, tile, region in zip(sizes, tiling.tile, tiling.region, strict=True):
        tiles = -(-size // tile)
        count *= -(-tiles // region)
    return count


@functools.cache
def _text(plan: str, dtype: torch.dtype, phase: Phase, sums: bool = False) -> str:
    parsed = ConvPlan.from_json(plan)
    tiling, lanes = parsed.tiling(phase), needed_toolchain().lanes(dtype)
    return source(phase, parsed.problem, parsed.vocabulary, tiling, dtype, lanes, sums)


@functools.cache
def _kernel(plan: str, dtype: torch.dtype, phase: Phase, sums: bool = False) -> _Kernel:
    return _Kernel(ConvPlan.from_json(plan), dtype, phase, _text(plan, dtype, phase, sums), sums)
