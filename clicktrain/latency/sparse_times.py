"""Measured times of pruned convolutions over their kept kernels, and of the dense ones beside them.

The sparse operators are timed as in an accelerated network: on activations that are in the implementation's
layout already. A table is measured once per layer geometry and kept on disk; between its points times are
interpolated, and they are made monotone as in `clicktrain.latency.width_times`. Tilings are those of the
rule: the gain of measured ones is left to the correction by the whole network's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.comm.agreement import agreed
from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, ConvProblem, Impl, Kernels, Phase, candidates_for, positions_of
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.library import need_all
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.machine import measured_once
from clicktrain.latency.network_times import Timed
from clicktrain.latency.timer import clock_of, interleaved_ms
from clicktrain.latency.width_times import WidthTimes

FORMAT_VERSION = 3
SHARES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Kept kernels that are measured, as shares of all, beside a single one."""
ROUNDS = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class SparseGeometry:
    """What the time of a pruned 2-D convolution depends on, except the number of kept kernels.

    ``entries`` are the kept positions of a kept kernel, ``patterns`` the different ones in the layer, and
    ``group`` neighboring filters share their positions.
    """

    problem: ConvProblem
    entries: int
    patterns: int
    group: int
    timed: Timed

    @classmethod
    def of(
        cls, conv: nn.Conv2d, image: tuple[int, int], entries: int, patterns: int, group: int, batch: int,
        timed: Timed,
    ) -> SparseGeometry:  # fmt: skip
        """Describe a layer on images of [H, W]."""
        problem = ConvProblem.of_layer(conv, (batch, conv.in_channels, *image))
        problem = replace(problem, dtype="float32", activations="float32", bias=False)
        whole = entries == math.prod(problem.kernel)
        return cls(problem, entries, 1 if whole else patterns, group, timed)

    @property
    def kernels(self) -> int:
        """Kernels of a filter."""
        return self.problem.channels // self.problem.groups

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is computed."""
        return PHASES if self.timed == "step" else ("forward",)

    def points(self) -> tuple[int, ...]:
        """Measured numbers of kept kernels per filter, ascending."""
        return tuple(sorted({1, *(max(1, round(share * self.kernels)) for share in SHARES)}))

    def masks(self, counts: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Random positions for each number of kernels per filter (by default the points).

        Those of a smaller number lie within those of a larger one.
        """
        generator = torch.Generator().manual_seed(0)
        size, total = math.prod(self.problem.kernel), self.problem.filters
        order = torch.rand(self.patterns, size, generator=generator).argsort(1)[:, : self.entries]
        patterns = torch.zeros(self.patterns, size, dtype=torch.bool).scatter_(1, order, True)
        filters = -(-total // self.group)
        ids = torch.randint(self.patterns, (filters, self.kernels), generator=generator)
        rank = torch.rand(filters, self.kernels, generator=generator).argsort(1).argsort(1)
        whole = patterns[ids].view(filters, self.kernels, *self.problem.kernel)
        return {
            count: (whole & (rank < count)[:, :, None, None])
            .repeat_interleave(self.group, 0)[:total]
            .contiguous()
            for count in (self.points() if counts is None else counts)
        }

    def read(self, document: Mapping[str, Any]) -> SparseTimes | None:
        """Times from disk; None where they are of other points."""
        kernels = tuple(map(int, document["kernels"]))
        sparse = tuple(map(float, document["sparse_ms"]))
        fits = kernels == self.points() and len(sparse) == len(kernels)
        return SparseTimes(kernels, sparse, float(document["dense_ms"])) if fits else None


@dataclass(frozen=True, slots=True)
class SparseTimes:
    """Milliseconds of one layer: of the sparse operator over kept kernels per filter, and of the dense one.

    ``kernels`` ascend, ``sparse_ms`` does not fall.
    """

    kernels: tuple[int, ...]
    sparse_ms: tuple[float, ...]
    dense_ms: float

    def at(self, kernels: int) -> float:
        """Milliseconds with these kernels per filter, of the faster operator.

        Examples:
            >>> SparseTimes((1, 3), (1.0, 2.0), 1.75).at(2), SparseTimes((1, 3), (1.0, 2.0), 1.75).at(3)
            (1.5, 1.75)
        """
        return min(WidthTimes((1,), self.kernels, (self.sparse_ms,)).at(1, kernels), self.dense_ms)

    @classmethod
    def of(cls, measured: dict[int, float], dense_ms: float) -> SparseTimes:
        """Monotone times from measured ones."""
        kernels = tuple(sorted(measured))
        times = WidthTimes.of((1,), kernels, {(1, count): ms for count, ms in measured.items()})
        return cls(kernels, times.ms[0], dense_ms)


def sparse_times(geometries: Iterable[SparseGeometry]) -> dict[SparseGeometry, SparseTimes]:
    """Times of pruned layers in fp32 on this CPU, from disk or measured now; needs a C compiler."""
    tables: dict[SparseGeometry, SparseTimes] = {}
    tools = toolchain()
    for geometry in dict.fromkeys(geometries):
        about = [FORMAT_VERSION, asdict(geometry), SHARES, tools.identity if tools else None]
        measure = partial(measure_sparse, geometry)
        times = measured_once("sparse", about, _CPU, geometry.read, measure)
        *sparse, dense = agreed([*times.sparse_ms, times.dense_ms], _CPU)
        tables[geometry] = replace(times, sparse_ms=tuple(sparse), dense_ms=dense)
    return tables


def measure_sparse(geometry: SparseGeometry) -> SparseTimes:
    """Time a layer at all its points, beside the dense one."""
    calls: dict[int, Callable[[], object]] = {0: _dense_call(geometry)}
    sources: list[str] = []
    for count, mask in geometry.masks().items():
        structure = Structure.from_mask(mask)
        problem = replace(geometry.problem, **positions_of(structure))
        impl = next(impl for impl in candidates_for(OPERATOR, problem.device) if not impl.refusals(problem))
        kernels = impl.prepare(structure, problem, {})
        sources += [kernels.sources[phase] for phase in geometry.phases if phase in kernels.sources]
        calls[count] = _sparse_call(geometry, structure, impl, kernels)
    need_all(sources)
    with torch.no_grad():
        ms = {count: min(ms) for count, ms in interleaved_ms(calls, ROUNDS, clock=clock_of(_CPU)).items()}
    dense = ms.pop(0)
    return SparseTimes.of(ms, dense)


def _images(problem: ConvProblem) -> tuple[Tensor, Tensor]:
    """The input of a layer, and the gradient of its result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(problem.batch, problem.channels, *problem.image, generator=generator)
    return x, torch.randn(problem.batch, problem.filters, *problem.output, generator=generator)


def _sparse_call(
    geometry: SparseGeometry, structure: Structure, impl: Impl, kernels: Kernels
) -> Callable[[], object]:
    x, gy = _images(geometry.problem)
    if impl.layout in LAYOUTS:
        enter = LAYOUTS[impl.layout].enter(x.dtype)
        x, gy = enter(x), enter(gy)
    values = torch.full(structure.values_shape, 0.01)
    return _call(lambda: kernels.convolve(x, values, None, *kernels.arguments), geometry.timed, x, values, gy)


def _dense_call(geometry: SparseGeometry) -> Callable[[], object]:
    p = geometry.problem
    x, gy = _images(p)
    weight = torch.randn(p.filters, geometry.kernels, *p.kernel)
    convolve = partial(F.conv2d, x, weight, None, p.stride, p.padding, p.dilation, p.groups)
    return _call(convolve, geometry.timed, x, weight, gy)


def _call(
    forward: Callable[[], Tensor], timed: Timed, x: Tensor, weight: Tensor, gy: Tensor
) -> Callable[[], object]:
    step = timed == "step"
    x.requires_grad_(step)
    weight.requires_grad_(step)

    def call() -> None:
        with torch.set_grad_enabled(step):
            y = forward()
            if step:
                torch.autograd.grad(y, (x, weight), gy)

    return call
