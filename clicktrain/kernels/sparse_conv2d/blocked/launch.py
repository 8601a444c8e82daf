"""Calls of a layer's generated code, which takes pointers."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_library import ALIGNMENT, check_dtype, vectors
from clicktrain.kernels.native import compute_type, load, needed_toolchain
from clicktrain.kernels.native.library import call
from clicktrain.kernels.native.memory import STREAM_BYTES
from clicktrain.kernels.sparse_conv2d.blocked.codegen import scratch_vectors, source
from clicktrain.kernels.sparse_conv2d.blocked.prepared import ConvPlan
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import ordered_vectors, statistics_bytes


def compile_plan(
    plan: str, dtype: torch.dtype, phases: Sequence[Phase] = PHASES, sums: bool = False
) -> list[str]:
    """The C texts of a plan's phases, to be built ahead of their first use; forward perhaps with sums."""
    return [_text(plan, dtype, phase, sums and phase == "forward") for phase in phases]


def forward(x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str) -> Tensor:
    """[B, C, H, W, V] -> [B, F, H', W', V]."""
    kernel = _kernel(plan, x.dtype, "forward")
    kernel.check(x, values, bias)
    y = kernel.result(x)
    kernel.accumulate(x, y, values, bias, tables[:3])
    return y


def forward_statistics(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`; also mean and biased variance [F] of the results of ``n`` images."""
    lanes = x.shape[4]
    if not max((x.shape[0] - 1) * lanes, 0) < n <= x.shape[0] * lanes:
        raise UserError(f"{x.shape[0]} blocks of {lanes} lanes hold no batch of {n} images to take a mean of")
    kernel = _kernel(plan, x.dtype, "forward", sums=True)
    kernel.check(x, values, bias)
    y = kernel.result(x)
    mean, var = values.new_empty(y.shape[1]), values.new_empty(y.shape[1])
    kernel.accumulate(x, y, values, bias, tables[:3], (mean, var), n)
    return y, mean, var


def output_shape(x: Tensor, problem: ConvProblem) -> tuple[int, int, int, int, int]:
    """The shape of a convolution's result, [B, F, H', W', V]."""
    return x.shape[0], problem.filters, problem.rows.out, problem.columns.out, x.shape[4]


def dgrad(gy: Tensor, values: Tensor, tables: Sequence[Tensor], plan: str) -> Tensor:
    """[B, F, H', W', V] -> [B, C, H, W, V]."""
    kernel = _kernel(plan, gy.dtype, "dgrad")
    kernel.check(gy, values)
    gx = kernel.result(gy)
    kernel.accumulate(gy, gx, values, None, tables[3:6])
    return gx


def wgrad(x: Tensor, gy: Tensor, values_shape: Sequence[int], tables: Sequence[Tensor], plan: str) -> Tensor:
    """Activations and output gradients -> gradient of the packed values."""
    kernel = _kernel(plan, x.dtype, "wgrad")
    kernel.check(x)
    if gy.dtype is not x.dtype:
        raise UserError(
            f"the output's gradient is of {gy.dtype}, the input of {x.dtype}: both have to be alike"
        )
    expected = output_shape(x, kernel.plan.problem)
    if gy.shape != expected:
        raise UserError(f"the output's gradient is {list(gy.shape)}, this layer's plan says {list(expected)}")
    grad = x.new_empty(values_shape, dtype=kernel.computed)
    kernel.collect(x, gy, grad, tables[6:10])
    return grad


class _Scratch(threading.local):
    """Memory that a thread's kernels work in, kept from call to call."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, Tensor] = {}

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        kept = self._kept.get(dtype)
        if kept is None or kept.numel() < count:
            kept = self._kept[dtype] = torch.empty(count, dtype=dtype, device="cpu")
        return kept


_SCRATCH = _Scratch()


class _Kernel:
    """One loaded function with what it needs to be called.

    What is asked at each call has been put together before: between two kernels, all that Python and PyTorch
    touch has to come back from memory.
    """

    def __init__(self, plan: ConvPlan, dtype: torch.dtype, phase: Phase, text: str, sums: bool) -> None:
        self.plan = plan
        self.tiling = plan.tiling(phase)
        self.computed = compute_type(dtype)
        self._run = load(text).run
        self._dtype, self._sums = dtype, sums
        self._lanes = lanes = needed_toolchain().lanes(dtype)
        self._scratch = scratch_vectors(phase, plan.problem, plan.tap_patterns, self.tiling, dtype)
        self._room = functools.cache(self._find_room)
        self._regions = region_count(phase, plan.problem, self.tiling)
        problem = plan.problem
        inner = problem.channels, problem.rows.size, problem.columns.size, lanes
        outer = problem.filters, problem.rows.out, problem.columns.out, lanes
        self._reads, self._writes = (outer, inner) if phase == "dgrad" else (inner, outer)

    def check(self, x: Tensor, values: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Refuse what the generated code would misread: it takes pointers."""
        for one in (values, bias):
            if one is not None and one.dtype is not self.computed:
                raise UserError(
                    f"a blocked convolution of {self._dtype} has weights and bias of {self.computed}, "
                    f"not of {one.dtype}"
                )
        if bias is not None and bias.numel() != self.plan.problem.filters:
            raise UserError(
                f"this layer has {self.plan.problem.filters} filters, its bias {bias.numel()} numbers"
            )
        shape = x.shape
        if shape[1:] == self._reads:
            return
        if x.dim() != 5 or shape[4] != self._lanes:
            raise UserError(
                f"a blocked convolution takes [B, C, H, W, {self._lanes}] of {x.dtype} here, not "
                f"{list(shape)}: convert with block_batch"
            )
        planes = list(self._reads[:3])
        raise UserError(f"this layer's plan is for {planes} (C, H, W), not for {list(shape[1:4])}")

    def result(self, x: Tensor) -> Tensor:
        return x.new_empty((x.shape[0], *self._writes))

    def accumulate(
        self,
        x: Tensor,
        y: Tensor,
        values: Tensor,
        bias: Tensor | None,
        tables: Sequence[Tensor],
        statistics: tuple[Tensor | None, Tensor | None] = (None, None),
        n: int = 0,
    ) -> None:
        """Forward or dgrad: ``y`` from ``x``, and with ``statistics`` mean and variance of ``n`` images."""
        rows, entries, order = tables
        weights, threads = values.numel(), torch.get_num_threads()
        places = order.numel()
        count, ordered, room = self._room(weights, places, entries.numel(), threads)
        if self.tiling.pairs:
            places = weights
        if not x.numel():
            return
        x = x if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 else vectors(x)
        bias = None if bias is None else bias.contiguous()
        weight = values.contiguous(), order if order.numel() else None, bias
        sizes = n, count, places, ordered, x.shape[0], y.nbytes >= STREAM_BYTES, threads
        scratch = _SCRATCH.take(room, self.computed)
        if call(self._run, x, y, *weight, rows, entries, *statistics, scratch, *sizes):
            raise UserError(f"this layer's plan is not for {count} weights")

    def _find_room(self, weights: int, places: int, entries: int, threads: int) -> tuple[int, int, int]:
        """Weights in the kernel's order, vectors that they fill, and numbers of all scratch memory.

        ``places`` is 0 for weights that are in the kernel's order.
        """
        # In their order already: each has an entry.
        missing = not places and (self.tiling.pairs or weights != entries)
        if (missing and weights) or (not self.tiling.pairs and weights < places):
            raise UserError(f"this layer's plan is not for {weights} weights")
        count = places // 2 if self.tiling.pairs else places if self.tiling.code == "indexed" else weights
        lanes, size = self._lanes, self.computed.itemsize
        room = self._scratch * threads * lanes
        if self._sums:
            filters = self.plan.problem.filters
            room += -(-statistics_bytes(filters, threads, lanes * size) // size)
        ordered = ordered_vectors(count, size, lanes * size) if places else 0
        return count, ordered, max(room + ordered * lanes, 1)

    def collect(self, x: Tensor, gy: Tensor, grad: Tensor, tables: Sequence[Tensor]) -> None:
        """Wgrad: ``grad``, in the order of the packed values."""
        rows, entries, places, chunks = tables
        count, blocks, threads = grad.numel(), x.shape[0], torch.get_num_threads()
        if places.numel() not in (0, count) or (not x.numel() and int(chunks[1]) != count):
            raise UserError(f"this layer's plan is not for {count} weights")
        if not x.numel():
            grad.zero_()
            return
        lanes = self._lanes
        room = (self._scratch + -(-count // lanes)) * threads * lanes
        few = blocks * self._regions < 4 * self.tiling.images * threads
        x = x if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 else vectors(x)
        gy = gy if gy.is_contiguous() and gy.data_ptr() % ALIGNMENT == 0 else vectors(gy)
        index = rows, entries, chunks, places if places.numel() else None
        scratch = _SCRATCH.take(max(room, 1), self.computed)
        if call(self._run, x, gy, grad, *index, scratch, count, blocks, not few, threads):
            raise UserError(f"this layer's plan is not for {count} weights")


def region_count(phase: Phase, problem: ConvProblem, tiling: Tiling) -> int:
    """Regions of one block of images."""
    axes = zip((problem.rows, problem.columns), tiling.tile, tiling.region, strict=True)
    sizes = ((axis.size if phase == "dgrad" else axis.out, tile, region) for axis, tile, region in axes)
    return math.prod(-(-size // tile // region) for size, tile, region in sizes)


@functools.cache
def _text(plan: str, dtype: torch.dtype, phase: Phase, sums: bool = False) -> str:
    parsed = ConvPlan.from_json(plan)
    tiling, lanes = parsed.tiling(phase), needed_toolchain().lanes(dtype)
    return source(phase, parsed.problem, parsed.tap_patterns, tiling, dtype, lanes, sums)


@functools.cache
def _kernel(plan: str, dtype: torch.dtype, phase: Phase, sums: bool = False) -> _Kernel:
    check_dtype(dtype, "a blocked convolution")
    return _Kernel(ConvPlan.from_json(plan), dtype, phase, _text(plan, dtype, phase, sums), sums)
