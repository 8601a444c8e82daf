"""A network for inference: few kinds of operations on images, one after another.

A value is what one image has become: channels, height, width. Vectors are 1x1 images. An operation reads
values and writes one; what PyTorch has as layers of their own (batch norm, dropout, activations, reshaping)
is folded into others or is a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clicktrain.errors import UserError

Array: TypeAlias = NDArray[np.float64]
Pair: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int, int, int]
"""Channels, height, width."""

ACTIVATIONS = (
    "none", "relu", "clamp", "leaky", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid",
    "tanh", "elu",
)  # fmt: skip
"""In the order of ``ACT_*`` in ``runtime.h``."""


class NotPortableError(UserError):
    """A network has an operation that no program has."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What is applied to each number: ``clamp`` to [low, high], ``leaky`` and ``elu`` with factor low."""

    name: str = "none"
    low: float = 0.0
    high: float = 0.0

    @property
    def number(self) -> int:
        """In ``runtime.h``."""
        return ACTIVATIONS.index(self.name)


NONE = Activation()


@dataclass(slots=True, eq=False)
class Value:
    """What one image has become; compared by identity."""

    shape: Shape
    name: str

    @property
    def size(self) -> int:
        """Numbers of one image."""
        c, h, w = self.shape
        return c * h * w


@dataclass(slots=True, kw_only=True, eq=False)
class Op:
    """One operation; ends with the activation."""

    input: Value
    output: Value
    act: Activation = NONE

    def inputs(self) -> tuple[Value, ...]:
        """Values that are read."""
        return (self.input,)


@dataclass(slots=True, kw_only=True, eq=False)
class Conv(Op):
    """Convolution with ``weight`` [F, C / groups, R, S] and ``bias`` [F], plus ``residual`` if any."""

    weight: Array
    bias: Array
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    residual: Value | None = None

    def inputs(self) -> tuple[Value, ...]:
        """Values that are read."""
        return (self.input,) if self.residual is None else (self.input, self.residual)

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer: one position, and nothing is added."""
        one = self.input.shape[1:] == self.output.shape[1:] == self.weight.shape[2:] == (1, 1)
        return one and self.groups == 1 and self.residual is None and self.padding == (0, 0)


@dataclass(slots=True, kw_only=True, eq=False)
class Pool(Op):
    """Maxima or averages of windows; negative padding leaves out rows and columns."""

    mode: Literal["max", "average"]
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    counts_padding: bool = True
    divisor: float = 0.0


@dataclass(slots=True, kw_only=True, eq=False)
class Bins(Op):
    """Adaptive pooling to the output's height and width."""

    mode: Literal["max", "average"]


@dataclass(slots=True, kw_only=True, eq=False)
class Binary(Op):
    """``input`` and ``other`` of its shape, or [C, 1, 1]."""

    mode: Literal["add", "multiply", "subtract"]
    other: Value

    def inputs(self) -> tuple[Value, ...]:
        """Values that are read."""
        return self.input, self.other


@dataclass(slots=True, kw_only=True, eq=False)
class Affine(Op):
    """``input * scale + shift``, both [C]."""

    scale: Array
    shift: Array


@dataclass(slots=True, kw_only=True, eq=False)
class Copy(Op):
    """Channels ``start`` .. ``start + channels`` to channels ``to`` .. of the output, moved by ``shift``.

    With ``channels`` None all numbers, in their order: another shape of as many. ``clears``: all else becomes
    zero.
    """

    start: int = 0
    to: int = 0
    channels: int | None = None
    shift: Pair = (0, 0)
    clears: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Softmax(Op):
    """Over the channels of a vector."""


@dataclass(slots=True, eq=False)
class Program:
    """Operations in the order that they run in; ``values`` are those that occur in them."""

    input: Value
    output: Value
    ops: list[Op] = field(default_factory=list)

    @property
    def values(self) -> list[Value]:
        """The input first, then in the order of their making."""
        made = dict.fromkeys([self.input, *(op.output for op in self.ops)])
        return list(made)

    def multiply_adds(self) -> int:
        """Those of one image with nonzero weights."""
        total = 0
        for op in self.ops:
            if isinstance(op, Conv):
                positions = op.output.shape[1] * op.output.shape[2]
                total += int(np.count_nonzero(op.weight)) * positions
        return total
