"""One convolution layer: sparse implementations beside the best dense calls of PyTorch (section 5.2).

The sparse side is what a network calls, the registered operators, on activations that are in the layout of
their implementation already: within an accelerated network they stay in it from layer to layer.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.bench.masks import check_sparsity, pattern_mask
from clicktrain.bench.peak import multiply_adds, one_pass
from clicktrain.bench.timing import (
    Progress,
    WrongResultError,
    check_rounds,
    fastest,
    median_ms,
    need_compiler,
)
from clicktrain.bench.timing import to_json as to_json
from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values
from clicktrain.kernels.impls import PHASES, Candidate, ConvProblem, Impl, Phase, candidates_for
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import keep_memory
from clicktrain.kernels.native.library import need_all
from clicktrain.kernels.sparse_conv2d.api import OPERATOR

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of the sparse operators' activations, by name."""
TUNING_ROUNDS = 5

_Call = Callable[[], Tensor]
_KERNEL = (3, 3)


@dataclass(frozen=True, slots=True)
class Shape:
    """A 3x3 convolution with stride 1 that keeps the image's size."""

    channels: int
    filters: int
    height: int
    width: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From ``C,SIZE,N`` (as many filters as channels, square image) or ``C,F,H,W,N``.

        Raises:
            UserError: it is neither, or a number is not positive.
        """
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) == 3:
            c, size, n = numbers
            numbers = [c, c, size, size, n]
        if len(numbers) != 5 or min(numbers) < 1:
            raise UserError(
                f"shape is {text!r}: write CHANNELS,SIZE,BATCH as in 64,32,64, or C,F,H,W,N as in "
                "64,128,32,32,64"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        channels = f"{self.channels}" if self.channels == self.filters else f"{self.channels}->{self.filters}"
        return f"{channels} @ {self.height}x{self.width}, batch {self.batch}"


SHAPES = tuple(
    Shape(c, c, size * 64 // c, size * 64 // c, batch)
    for size, batch in ((32, 64), (56, 16))
    for c in (64, 128, 256, 512)
)
"""The 3x3 layers of ResNet-18 on CIFAR and on ImageNet."""


@dataclass(frozen=True, slots=True)
class ConvRow:
    """One layer in one direction.

    Attributes:
        shape: (C, F, H, W, N).
        compression: all weights over kept ones, as asked for.
        group: neighboring filters that share their positions.
        density: reached; whole kernels cannot meet every compression.
        dense_ms, dense_bf16_ms: the fastest dense float32 and bfloat16 call; None if not asked for.
        precision: of the sparse operator's activations, ``fp32`` or ``bf16`` (summed up in float32).
        ratio, ratio_bf16: dense over sparse.
        fraction_of_peak: multiply-adds of kept weights (those with the padding left out) per second, over the
            measured peak; None without one.
        multiply_adds_ms: as many multiply-adds as the kept weights bring, from registers.
        memory_ms: one pass over what the layer reads and writes. Both are timed beside the calls, with the
            same threads.
        bound: dense_ms over the sum of both: the ratio of a layer that did nothing else, one after the other.
        tiling: how the sparse kernel cut its work.
    """

    shape: tuple[int, int, int, int, int]
    compression: float
    group: int
    density: float
    phase: Phase
    dense_ms: float
    dense_name: str
    dense_bf16_ms: float | None
    dense_bf16_name: str | None
    precision: str
    sparse_ms: float
    ratio: float
    ratio_bf16: float | None
    fraction_of_peak: float | None
    multiply_adds_ms: float
    memory_ms: float
    bound: float
    tiling: dict[str, Any]
    impl: str


def bench_conv(
    shapes: Sequence[Shape] = SHAPES,
    *,
    compressions: tuple[float, ...] = (4.0, 10.0),
    groups: tuple[int, ...] = (1,),
    precisions: tuple[str, ...] = ("fp32",),
    rounds: int = 7,
    tune: bool = True,
    compiled: bool = False,
    bf16: bool = True,
    peak_gflops: float | None = None,
    seed: int = 0,
    progress: Progress = lambda text: None,
) -> list[ConvRow]:
    """Time every layer forward and backward, dense and sparse, interleaved.

    ``compressions``, ``groups`` and ``precisions`` (keys of `PRECISIONS`) of the sparse layers are as in
    `ConvRow`; medians are taken of ``rounds`` timings. ``tune`` measures the tilings that the kernels can use
    first and takes the best, as the compiler does for a network, else the rule chooses. Dense calls are also
    measured under ``torch.compile`` (``compiled``) and in bfloat16 (``bf16``). ``peak_gflops`` is what the
    running threads can do at most, for ``fraction_of_peak``; ``seed`` is that of data and positions.

    Raises:
        UserError: a setting that cannot be, or there is no C compiler.
        WrongResultError: a sparse result differs from the dense one in float64.
    """
    check_rounds(rounds)
    check_sparsity(compressions, groups)
    check_precisions(precisions)
    if not shapes:
        raise UserError("at least one shape is needed")
    need_compiler()
    keep_memory()  # for both sides: else what is timed is how the system hands out pages
    rows = []
    for shape in shapes:
        torch.manual_seed(seed)
        data = _Data(shape)
        progress(f"{shape}: building and checking")
        layers = []
        for case in itertools.product(compressions, groups, precisions, _tunable()):
            layer = _SparseLayer(data, *case, seed, tune)
            if not layer.impl.refusals(layer.problem):
                layer.check()
                layer.choose()
                layers.append(layer)
        dense = _dense_calls(data, compiled, bf16)
        for phase in PHASES:
            progress(f"{shape}: {phase}")
            if compiled:
                # Of one function PyTorch keeps eight compiled forms; what came later would run uncompiled.
                torch.compiler.reset()
            rows += _measure(phase, dense[phase], layers, rounds, peak_gflops)
    return rows


def _tunable() -> list[Impl]:
    """Implementations whose phases can be timed one by one."""
    return [impl for impl in candidates_for(OPERATOR, "cpu") if impl.candidates is not None]


def check_precisions(precisions: Sequence[str]) -> None:
    """Raise UserError unless there is at least one, and all are known."""
    unknown = sorted(set(precisions) - set(PRECISIONS))
    if unknown or not precisions:
        raise UserError(f"precision is {' or '.join(PRECISIONS)}, not {', '.join(unknown) or 'nothing'}")


def geometric_means(rows: Sequence[ConvRow], column: str = "ratio") -> dict[str, float]:
    """Mean over the shapes by compression, group, precision if bf16, and phase; over all phases.

    ``column`` of `ConvRow` is averaged: ``ratio``, ``bound``, or ``ratio_bf16`` (empty if not measured).
    """
    by_key: dict[str, list[float]] = {}
    for phase in (*PHASES, None):
        for row in rows:
            if phase in (row.phase, None) and (value := getattr(row, column)) is not None:
                precision = "" if row.precision == "fp32" else f" {row.precision}"
                key = f"{row.compression:g}x G={row.group}{precision} {phase or 'all'}"
                by_key.setdefault(key, []).append(value)
    return {key: statistics.geometric_mean(values) for key, values in by_key.items()}


class _Data:
    """Activations, gradients and a weight, as the dense calls and the sparse ones want them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        image = (shape.height, shape.width)
        self.x = torch.randn(shape.batch, shape.channels, *image)
        self.gy = torch.randn(shape.batch, shape.filters, *image)
        self.weight = torch.randn(shape.filters, shape.channels, *_KERNEL) * 0.05


def _dense(phase: Phase, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
    if phase == "forward":
        return F.conv2d(x, weight, padding=1)
    mask = [phase == "dgrad", phase == "wgrad", False]
    one = [1, 1]
    both = torch.ops.aten.convolution_backward(gy, x, weight, None, one, one, one, False, [0, 0], 1, mask)
    return cast(Tensor, both[0 if phase == "dgrad" else 1])


def _dense_calls(data: _Data, compiled: bool, bf16: bool) -> dict[Phase, dict[tuple[bool, str], _Call]]:
    """By phase and by (bfloat16 or not, name): calls on inputs that are in their layout and type already."""
    dtypes = (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    calls: dict[Phase, dict[tuple[bool, str], _Call]] = {phase: {} for phase in PHASES}
    for phase, dtype, (name, memory) in itertools.product(PHASES, dtypes, formats.items()):
        low, images = dtype == torch.bfloat16, (data.x, data.gy, data.weight)
        tensors = [tensor.to(dtype).contiguous(memory_format=memory) for tensor in images]
        # In training the forward call records for its backward, dense and sparse alike.
        tensors[2].requires_grad_(phase == "forward")
        calls[phase][low, name] = functools.partial(_dense, phase, *tensors)
        if compiled:
            run = torch.compile(_dense, dynamic=False)
            calls[phase][low, f"{name} compile"] = functools.partial(run, phase, *tensors)
    return calls


class _SparseLayer:
    """A layer with random positions, its kernels, and the best of them by phase."""

    def __init__(
        self,
        data: _Data,
        compression: float,
        group: int,
        precision: str,
        impl: Impl,
        seed: int,
        tune: bool,
    ) -> None:
        self.data, self.compression, self.group, self.precision = data, compression, group, precision
        self.impl, self.dtype = impl, PRECISIONS[precision]
        self.layout = LAYOUTS.get(impl.layout)
        enter = (lambda images: images) if self.layout is None else self.layout.enter(self.dtype)
        self.x, self.gy = enter(data.x.to(self.dtype)), enter(data.gy.to(self.dtype))
        shape, generator = data.shape, torch.Generator().manual_seed(seed)
        f, c, r, s = data.weight.shape
        self.mask = pattern_mask((f, c, r, s), compression, group, generator)
        self.structure = Structure.from_mask(self.mask)
        self.values = pack_values(self.structure, data.weight)
        activations = str(self.dtype).removeprefix("torch.")
        self.problem = ConvProblem.of_structure(
            self.structure, (shape.height, shape.width), shape.batch, padding=(1, 1), activations=activations
        )
        self.variants = self._variants(tune)
        need_all([variant.source for variants in self.variants.values() for variant in variants])
        self.best = {phase: variants[0] for phase, variants in self.variants.items()}

    def _variants(self, tune: bool) -> dict[Phase, list[Candidate]]:
        """By phase, the rule's own choice first."""
        assert self.impl.candidates is not None
        by_phase: dict[Phase, list[Candidate]] = {phase: [] for phase in PHASES}
        for variant in self.impl.candidates(self.structure, self.problem):
            if tune or not by_phase[variant.phase]:
                by_phase[variant.phase].append(variant)
        return by_phase

    def call(self, phase: Phase, variant: Candidate) -> _Call:
        """The operator as a network calls it."""
        values = self.values.detach().requires_grad_(phase == "forward")
        return functools.partial(variant.run, self.x, self.gy, values, None)

    def check(self) -> None:
        """Raise WrongResultError if a variant differs from the dense convolution in float64."""
        x, gy = self.data.x.double(), self.data.gy.double()
        weight = self.data.weight.double() * self.mask
        for phase, variants in self.variants.items():
            expected = _dense(phase, x, gy, weight)
            if phase == "wgrad":
                expected = pack_values(self.structure, expected)
            for variant in variants:
                result = self.call(phase, variant)().detach()
                if phase != "wgrad" and self.layout is not None:
                    result = self.layout.leave(result, self.data.shape.batch)
                error = float((result - expected).abs().max() / expected.abs().max())
                if not error <= self.impl.tolerance[self.dtype]:
                    raise WrongResultError(
                        f"{phase} of {self.data.shape} at {self.compression:g}x, group {self.group}, "
                        f"{variant.tiling}: the sparse result is off by {error:.2g} of the largest value"
                    )

    def choose(self) -> None:
        """Keep the fastest variant of each phase; it is timed again beside the dense calls."""
        for phase, variants in self.variants.items():
            if len(variants) > 1:
                calls = {i: self.call(phase, variant) for i, variant in enumerate(variants)}
                times = median_ms(calls, TUNING_ROUNDS)
                self.best[phase] = variants[min(times, key=lambda i: times[i])]

    def memory(self, phase: Phase) -> tuple[list[Tensor], Tensor]:
        """The tensors that a phase reads, and one as large as its result."""
        return {
            "forward": ([self.x], self.gy),
            "dgrad": ([self.gy], self.x),
            "wgrad": ([self.x, self.gy], self.values),
        }[phase]

    def operations(self) -> int:
        """Multiply-adds of kept weights, those with the padding left out; two operations each."""
        one, shape = torch.ones(1, 1, 1, 1), self.data.shape
        # By tap, how many positions of the result read a place inside the image.
        inside = F.unfold(one.expand(1, 1, shape.height, shape.width), _KERNEL, padding=1).sum(2)
        return 2 * shape.batch * int((self.mask.sum((0, 1)) * inside.view(_KERNEL)).sum())


def _measure(
    phase: Phase,
    dense: dict[tuple[bool, str], _Call],
    layers: Sequence[_SparseLayer],
    rounds: int,
    peak_gflops: float | None,
) -> list[ConvRow]:
    calls: dict[Hashable, _Call] = dict(dense.items())
    for i, layer in enumerate(layers):
        calls["layer", i] = layer.call(phase, layer.best[phase])
        calls["arithmetic", i] = multiply_adds(layer.operations() // 2)
        calls["memory", i] = one_pass(*layer.memory(phase))
    times = median_ms(calls, rounds)
    dense_name, dense_ms = fastest({key[1]: times[key] for key in dense if not key[0]})
    low = {key[1]: times[key] for key in dense if key[0]}
    bf16_name, bf16_ms = fastest(low) if low else (None, None)
    rows = []
    for i, layer in enumerate(layers):
        shape, ms = layer.data.shape, times["layer", i]
        achieved = layer.operations() / ms / 1e6
        rows.append(
            ConvRow(
                shape=astuple(shape),
                compression=layer.compression,
                group=layer.group,
                density=layer.structure.density,
                phase=phase,
                dense_ms=dense_ms,
                dense_name=dense_name,
                dense_bf16_ms=bf16_ms,
                dense_bf16_name=bf16_name,
                precision=layer.precision,
                sparse_ms=ms,
                ratio=dense_ms / ms,
                ratio_bf16=None if bf16_ms is None else bf16_ms / ms,
                fraction_of_peak=None if peak_gflops is None else achieved / peak_gflops,
                multiply_adds_ms=times["arithmetic", i],
                memory_ms=times["memory", i],
                bound=dense_ms / (times["arithmetic", i] + times["memory", i]),
                tiling=asdict(layer.best[phase].tiling),
                impl=layer.impl.name,
            )
        )
    return rows
