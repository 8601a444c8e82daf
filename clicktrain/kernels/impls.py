"""Implementations of the operators that pruned layers call, behind one interface; free of their internals.

The compiler, the benchmarks and the tests read what is registered here; none of them knows how it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure

Phase = Literal["forward", "dgrad", "wgrad"]
"""The forward pass, the gradient w.r.t. the input, the gradient w.r.t. the packed values."""
PHASES: tuple[Phase, ...] = ("forward", "dgrad", "wgrad")
MOST_PATTERNS = 17
"""`ConvProblem.patterns` counts up to here: implementations treat all larger numbers alike."""


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """A convolution on a batch: hashable and JSON-able, it keys caches, names tests and bench rows.

    Attributes:
        channels, filters: of input and output, all groups together.
        kernel, image: rows and columns.
        stride, padding, dilation, groups: as in ``F.conv2d``, pairs spelled out.
        dtype, activations: dtypes of values and bias, and of activations, without ``torch.``.
        density: nonzero weights / all weights, to a hundredth.
        patterns: different patterns that its kernels have, at most `MOST_PATTERNS`.
        equal_filters: whether all filters have equally many values.
        two_of_four: whether a filter of 1x1 kernels keeps at most two of each four consecutive channels.
        input_grad: whether dgrad is computed.
        operator: key of `IMPLS`.
    """

    batch: int
    channels: int
    filters: int
    kernel: tuple[int, int]
    image: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "float32"
    activations: str = "float32"
    device: str = "cpu"
    density: float = 1.0
    patterns: int = 1
    equal_filters: bool = True
    two_of_four: bool = False
    bias: bool = False
    input_grad: bool = True
    operator: str = "sparse_conv2d"

    @classmethod
    def of_layer(
        cls,
        layer: Any,
        x_shape: Sequence[int],
        *,
        activations: torch.dtype | None = None,
        input_grad: bool = True,
    ) -> ConvProblem:
        """Describe a packed or dense layer on images [N, C, H, W]."""
        structure = getattr(layer, "structure", None)
        values = layer.weight if structure is None else layer.values
        dtype = values.dtype
        return cls(
            x_shape[0],
            layer.in_channels,
            layer.out_channels,
            _pair(layer.kernel_size),
            _pair(x_shape[-2:]),
            _pair(layer.stride),
            layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
            _pair(layer.dilation),
            layer.groups,
            dtype=_name(dtype),
            activations=_name(activations or dtype),
            device=values.device.type,
            bias=layer.bias is not None,
            input_grad=input_grad,
            **({} if structure is None else positions_of(structure)),
        )

    @classmethod
    def of_structure(
        cls, structure: Structure, image: Sequence[int], batch: int, *, groups: int = 1, **more: Any
    ) -> ConvProblem:
        """Describe a packed weight on images of (H, W); ``more`` are other attributes."""
        f, c, r, s = structure.shape
        own = {"batch": batch, "channels": c * groups, "filters": f, "kernel": (r, s), "groups": groups}
        return cls(**{**own, "image": _pair(image), **positions_of(structure), **more})

    @property
    def output(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        rows, columns = (self._output(axis) for axis in (0, 1))
        return rows, columns

    def _output(self, axis: int) -> int:
        reach = (self.kernel[axis] - 1) * self.dilation[axis]
        if isinstance(self.padding, str):
            both = reach if self.padding == "same" else 0
        else:
            both = 2 * self.padding[axis]
        return (self.image[axis] + both - reach - 1) // self.stride[axis] + 1

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a training step."""
        return PHASES if self.input_grad else ("forward", "wgrad")

    @property
    def activation_dtype(self) -> torch.dtype:
        """`activations` as PyTorch has it."""
        dtype: torch.dtype = getattr(torch, self.activations)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConvProblem:
        """Inverse of `to_json`, after JSON; a UserError if it has other keys."""
        if set(data) != (known := {one.name for one in fields(cls)}):
            raise UserError(
                f"a problem has the keys {', '.join(sorted(known))}, not {', '.join(sorted(data))}"
            )
        values: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
        return cls(**values)

    def __str__(self) -> str:
        sizes = "x".join(map(str, (self.filters, self.channels // self.groups, *self.kernel)))
        dtype = self.dtype if self.activations == self.dtype else f"{self.dtype}/{self.activations}"
        return (
            f"{self.operator} {sizes} @ {self.batch}x{self.image[0]}x{self.image[1]} {dtype} {self.density:g}"
        )


_POSITIONS: WeakKeyDictionary[Structure, dict[str, Any]] = WeakKeyDictionary()


def positions_of(structure: Structure) -> dict[str, Any]:
    """The attributes of a `ConvProblem` that depend on the positions of packed values; computed once."""
    from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import distinct

    if structure not in _POSITIONS:
        _POSITIONS[structure] = {
            "density": round(structure.density, 2),
            "patterns": min(len(distinct(structure)), MOST_PATTERNS),
            "equal_filters": structure.nnz_per_filter is not None,
            "two_of_four": _two_of_four(structure),
        }
    return _POSITIONS[structure]


def _two_of_four(structure: Structure) -> bool:
    filters, channels, *kernel = structure.shape
    if kernel != [1, 1] or channels % 4:
        return False
    fours = torch.bincount(structure.flat().long() // 4, minlength=filters * channels // 4)
    return not bool((fours > 2).any())


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """The kernels of one layer, for activations in the layout of its implementation.

    Attributes:
        convolve: (x, values, bias, *arguments) -> y, differentiable in x, values and bias.
        arguments: tables, and whatever else is computed once from the positions.
        sources: C texts by phase, to be built before the first call.
        with_statistics: (x, values, bias, *arguments, n) -> y, mean [F] and biased variance [F] over the
            results of ``n`` images; None where the implementation cannot take a batch norm's statistics.
        statistics_sources: C texts that this needs beside ``sources``.
        with_affine: (x, values, scale [F], shift [F], residual or None, whether negative results become zero,
            *arguments) -> act(conv(x) * scale + shift + residual), without gradients; None likewise.
    """

    convolve: Callable[..., Tensor]
    arguments: tuple[Any, ...] = ()
    sources: Mapping[Phase, str] = field(default_factory=dict)
    with_statistics: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    statistics_sources: tuple[str, ...] = ()
    with_affine: Callable[..., Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A kernel that could do one phase of one layer, cut by a tiling of its implementation's own.

    ``run`` maps (x, gy, values, bias) to its result, in the layout of the implementation. ``source`` is its C
    text; empty where it is built in another way, when it is first called.
    """

    phase: Phase
    tiling: Any
    source: str
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Impl:
    """One way to run an operator.

    Attributes:
        name: key in `IMPLS`, in plans and in messages.
        reject: problem -> reasons why it cannot run it; empty where it can. Cheap; errors escape.
        prepare: (structure, problem, tilings by phase) -> what runs a layer; phases without a tiling are cut
            by the implementation's own rule.
        run: (x, values, structure, bias, stride, padding, dilation, groups) -> y, a layer alone on
            [N, C, H, W], differentiable in x, values and bias.
        tolerance: by dtype of the activations: largest error of a result over its largest value.
        layout: of the activations that ``prepare``'s kernels read and write, a key of `LAYOUTS` or ``plain``.
        devices: types of devices that it runs on; empty for all.
        candidates: (structure, problem) -> kernels to measure, of each phase the rule's own choice first.
            None where there is nothing to tune: then ``prepare`` is measured as a whole.
        read_tiling: (phase, tiling or its JSON) -> tiling; raises ValueError if it is none, UserError with a
            clause about the layer if that phase cannot be cut so.
        needs_half: tiling -> a clause about the layer if it needs activations in bfloat16, else "".
        slow_here: tiling -> a clause about the plan if this machine runs it, but slowly, else "".
        oracle: whether it only checks the others: a compiler never chooses it.
    """

    name: str
    reject: Callable[[ConvProblem], list[str]]
    prepare: Callable[[Structure, ConvProblem, Mapping[Phase, Any]], Kernels]
    run: Callable[..., Tensor]
    tolerance: Mapping[torch.dtype, float]
    layout: str = "plain"
    devices: tuple[str, ...] = ("cpu",)
    candidates: Callable[[Structure, ConvProblem], Sequence[Candidate]] | None = None
    read_tiling: Callable[[Phase, Any], Any] | None = None
    needs_half: Callable[[Any], str] = lambda tiling: ""
    slow_here: Callable[[Any], str] = lambda tiling: ""
    oracle: bool = False

    def refusals(self, problem: ConvProblem) -> list[str]:
        """All reasons why it cannot run a problem, those of its devices first."""
        elsewhere = bool(self.devices) and problem.device not in self.devices
        own = [f"it runs on {' and '.join(self.devices)}, not on {problem.device}"] if elsewhere else []
        return own + self.reject(problem)


IMPLS: dict[str, dict[str, Impl]] = {}
"""Operator -> name -> implementation. `register` adds to it."""


def register(operator: str, impl: Impl) -> None:
    """Add an implementation of an operator; one of the same name is replaced."""
    IMPLS.setdefault(operator, {})[impl.name] = impl


def candidates_for(operator: str, device: str | None = None) -> list[Impl]:
    """The implementations that a compiler may choose from, in the order of their registration.

    With ``device``, a type of devices: those that run there.
    """
    return [
        impl
        for impl in IMPLS.get(operator, {}).values()
        if not impl.oracle and (device is None or not impl.devices or device in impl.devices)
    ]


def _pair(sizes: Any) -> tuple[int, int]:
    rows, columns = sizes
    return int(rows), int(columns)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
