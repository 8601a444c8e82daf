"""Measured times of pruned convolutions over their kept kernels, and of the dense ones beside them.

The sparse operators are timed as in an accelerated network: on activations that are in the blocked layout
already. A table is built once for a layer's geometry and kept on disk; between its points times are
interpolated, and they are made monotone as in `clicktrain.latency.width_times`. Tilings are those of the
rule: what a compiler gains by measuring them too is left to the correction by the whole network's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.comm.agreement import agreed
from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, ConvProblem, Impl, Kernels, Phase, candidates_for
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.library import need_all
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.network_times import Timed
from clicktrain.latency.tables import keep_table, read_table, table_path
from clicktrain.latency.timer import clock_of, least_ms
from clicktrain.latency.width_times import WidthTimes

FORMAT_VERSION = 2
SHARES = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Kept kernels that are measured, as shares of all, beside a single one."""
ROUNDS = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class SparseGeometry:
    """All that the time of a pruned 2-D convolution depends on, but for how many kernels are kept.

    Attributes:
        channels, filters, kernel, stride, padding, dilation, groups: of the convolution.
        image: [H, W] of what it reads.
        entries: kept positions of a kept kernel.
        patterns: different ones that kernels of the layer have.
        group: neighboring filters that share their positions.
        batch: images.
        timed: what is timed.
    """

    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    image: tuple[int, int]
    entries: int
    patterns: int
    group: int
    batch: int
    timed: Timed

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        image: tuple[int, int],
        *,
        entries: int,
        patterns: int,
        group: int,
        batch: int,
        timed: Timed,
    ) -> SparseGeometry:
        """Of a layer on images of [H, W]."""

        def pair(sizes: tuple[int, ...]) -> tuple[int, int]:
            return sizes[0], sizes[1]

        padding = conv.padding if isinstance(conv.padding, str) else pair(conv.padding)
        if entries == conv.kernel_size[0] * conv.kernel_size[1]:
            patterns = 1
        return cls(
            conv.in_channels, conv.out_channels, pair(conv.kernel_size), pair(conv.stride), padding,
            pair(conv.dilation), conv.groups, image, entries, patterns, group, batch, timed,
        )  # fmt: skip

    @property
    def kernels(self) -> int:
        """Kernels of a filter."""
        return self.channels // self.groups

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is computed."""
        return PHASES if self.timed == "step" else ("forward",)

    def points(self) -> tuple[int, ...]:
        """The numbers of kept kernels per filter that are measured, ascending."""
        return tuple(sorted({1, *(max(1, round(share * self.kernels)) for share in SHARES)}))

    def masks(self, counts: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Random positions for each number of kernels per filter (by default the points).

        Those of a smaller number lie within those of a larger one.
        """
        generator = torch.Generator().manual_seed(0)
        size = self.kernel[0] * self.kernel[1]
        order = torch.rand(self.patterns, size, generator=generator).argsort(1)[:, : self.entries]
        patterns = torch.zeros(self.patterns, size, dtype=torch.bool).scatter_(1, order, True)
        filters = -(-self.filters // self.group)
        ids = torch.randint(self.patterns, (filters, self.kernels), generator=generator)
        rank = torch.rand(filters, self.kernels, generator=generator).argsort(1).argsort(1)
        whole = patterns[ids].view(filters, self.kernels, *self.kernel)
        return {
            count: (whole & (rank < count)[:, :, None, None])
            .repeat_interleave(self.group, 0)[: self.filters]
            .contiguous()
            for count in (self.points() if counts is None else counts)
        }


@dataclass(frozen=True, slots=True)
class SparseTimes:
    """Milliseconds of one layer.

    Attributes:
        kernels: the measured numbers of kept kernels per filter, ascending.
        sparse_ms: of the sparse operator with so many; not falling.
        dense_ms: of the dense one.
    """

    kernels: tuple[int, ...]
    sparse_ms: tuple[float, ...]
    dense_ms: float

    def at(self, kernels: int) -> float:
        """With so many kernels per filter, by whichever operator is faster.

        Example:
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
    """Times of pruned layers in fp32 on this CPU, from the cache or measured now.

    There has to be a C compiler. Equal layers are measured once.
    """
    found: dict[SparseGeometry, SparseTimes] = {}
    for geometry in dict.fromkeys(geometries):
        path = _cache_path(geometry)
        times = _from_document(read_table(path), geometry)
        if times is None:
            times = measure_sparse(geometry)
            keep_table(path, asdict(times))
        *sparse, dense = agreed([*times.sparse_ms, times.dense_ms], _CPU)
        found[geometry] = replace(times, sparse_ms=tuple(sparse), dense_ms=dense)
    return found


def measure_sparse(geometry: SparseGeometry) -> SparseTimes:
    """Time a layer at all its points, beside the dense one."""
    g = geometry
    calls: dict[int, Callable[[], object]] = {0: _dense_call(g)}
    texts: list[str] = []
    for count, mask in g.masks().items():
        structure = Structure.from_mask(mask)
        problem = ConvProblem.of_structure(
            structure,
            g.image,
            g.batch,
            groups=g.groups,
            stride=g.stride,
            padding=g.padding,
            dilation=g.dilation,
        )
        impl = next(impl for impl in candidates_for(OPERATOR) if not impl.refusals(problem))
        kernels = impl.prepare(structure, problem, {})
        texts += [kernels.sources[phase] for phase in g.phases if phase in kernels.sources]
        calls[count] = _sparse_call(g, problem, structure, impl, kernels)
    need_all(texts)
    with torch.no_grad():
        ms = least_ms(calls, ROUNDS, clock=clock_of(_CPU))
    dense = ms.pop(0)
    return SparseTimes.of(ms, dense)


def _images(geometry: SparseGeometry, problem: ConvProblem) -> tuple[Tensor, Tensor]:
    """What a layer reads, and the gradient of its result."""
    generator = torch.Generator().manual_seed(0)
    g = geometry
    x = torch.randn(g.batch, g.channels, *g.image, generator=generator)
    return x, torch.randn(g.batch, g.filters, *problem.output, generator=generator)


def _sparse_call(
    geometry: SparseGeometry, problem: ConvProblem, structure: Structure, impl: Impl, kernels: Kernels
) -> Callable[[], object]:
    step = geometry.timed == "step"
    x, gy = _images(geometry, problem)
    if impl.layout in LAYOUTS:
        enter = LAYOUTS[impl.layout].enter(x.dtype)
        x, gy = enter(x), enter(gy)
    values = torch.full(structure.values_shape, 0.01).requires_grad_(step)
    x.requires_grad_(step)

    def call() -> None:
        with torch.set_grad_enabled(step):
            y = kernels.convolve(x, values, None, *kernels.arguments)
            if step:
                torch.autograd.grad(y, (x, values), gy)

    return call


def _dense_call(geometry: SparseGeometry) -> Callable[[], object]:
    g, step = geometry, geometry.timed == "step"
    problem = ConvProblem(
        g.batch, g.channels, g.filters, g.kernel, g.image, g.stride, g.padding, g.dilation, g.groups
    )
    x, gy = _images(g, problem)
    x.requires_grad_(step)
    weight = torch.randn(g.filters, g.kernels, *g.kernel).requires_grad_(step)

    def call() -> None:
        with torch.set_grad_enabled(step):
            y = F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)
            if step:
                torch.autograd.grad(y, (x, weight), gy)

    return call


def _cache_path(geometry: SparseGeometry) -> Path | None:
    tools = toolchain()
    about = [FORMAT_VERSION, asdict(geometry), SHARES, tools.identity if tools else None]
    return table_path("sparse", about, _CPU)


def _from_document(document: Mapping[str, Any] | None, geometry: SparseGeometry) -> SparseTimes | None:
    """Times as read from disk; None where they are damaged or have other points, and are measured again."""
    try:
        if document is None:
            return None
        kernels = tuple(map(int, document["kernels"]))
        sparse = tuple(map(float, document["sparse_ms"]))
        dense = float(document["dense_ms"])
    except (ValueError, KeyError, TypeError):
        return None
    fits = kernels == geometry.points() and len(sparse) == len(kernels)
    return SparseTimes(kernels, sparse, dense) if fits else None
