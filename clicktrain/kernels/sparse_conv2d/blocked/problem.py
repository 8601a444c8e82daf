"""A convolution as the blocked kernels see it: all that generated code depends on, but for the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from clicktrain.kernels.sparse_conv2d.blocked.geometry import Axis

Phase = Literal["forward", "grad_input", "grad_weight"]
Code = Literal["sets", "sweep", "taps"]
PHASES: tuple[Phase, ...] = ("forward", "grad_input", "grad_weight")
_LEAST = {"tile": 1, "region": 1, "together": 1, "images": 1, "sources": 0, "results": 0}
_MOST = {"tile": 256, "together": 16}
"""Code is written for each position of a tile and each filter of it; the others are bounds of loops."""
_MOST_NUMBER = 1 << 24


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """Shape of one convolution layer on images of one size.

    Attributes:
        channels: of the input, all groups together.
        filters: of the output, all groups together.
        rows, columns: sizes along either axis of the image.
    """

    channels: int
    filters: int
    rows: Axis
    columns: Axis

    @classmethod
    def make(
        cls,
        channels: int,
        filters: int,
        kernel: Sequence[int],
        image: Sequence[int],
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] | str = (0, 0),
        dilation: Sequence[int] = (1, 1),
    ) -> ConvProblem:
        """From what ``F.conv2d`` takes; raises ValueError if the kernel does not fit into the image."""
        axes = []
        for i in (0, 1):
            reach = (kernel[i] - 1) * dilation[i]
            if isinstance(padding, str):
                before, both = (reach // 2, reach) if padding == "same" else (0, 0)
            else:
                before, both = padding[i], 2 * padding[i]
            out = (image[i] + both - reach - 1) // stride[i] + 1
            if out < 1 or image[i] < 1:
                raise ValueError(f"a kernel of {kernel[i]} (dilation {dilation[i]}) does not fit {image[i]}")
            axes.append(Axis(image[i], kernel[i], stride[i], before, dilation[i], out))
        return cls(channels, filters, axes[0], axes[1])

    def numbers(self) -> list[int]:
        """As plain integers, for an operator's arguments; `from_numbers` is the inverse."""
        axes = [[a.size, a.taps, a.stride, a.padding, a.dilation, a.out] for a in (self.rows, self.columns)]
        return [self.channels, self.filters, *axes[0], *axes[1]]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ConvProblem:
        """Inverse of `numbers`."""
        channels, filters, *rest = numbers
        return cls(channels, filters, Axis(*rest[:6]), Axis(*rest[6:12]))


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel cuts its work; the result does not depend on it.

    Attributes:
        tile: rows and columns of the positions whose sums are in registers (``sweep``: in the cache).
        region: tiles per region along either axis.
        together: neighbouring filters computed at once; they have to agree on their channels and tap sets.
        code: ``sets``, code of its own for each tap set, sums in registers; ``sweep``, the same with sums in
            the caches (forward and gradient of the input only); or ``taps``, offsets of taps as
            data.
        sources: channels (of the gradient of the input: filters) of one pass over all results; 0 = all
            (``sweep`` and ``taps`` only).
        results: filters (of the gradient of the input: channels) whose sums are in the cache at once; 0 = all
            (``sweep`` only).
        images: blocks of images of one region (gradient of the weight with ``taps`` only).
        pairs: multiply pairs of bfloat16 numbers, see `cells` (activations in bfloat16 only; forward and
            gradient of the input with ``taps`` only).
    """

    tile: tuple[int, int]
    region: tuple[int, int] = (1, 1)
    together: int = 1
    code: Code = "sets"
    sources: int = 0
    results: int = 0
    images: int = 1
    pairs: bool = False

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Tiling:
        """Inverse of ``dataclasses.asdict``, after JSON; what an older program did not write defaults.

        Raises:
            ValueError: one of them is nothing that there is.
        """
        if fields.get("code", "sets") not in get_args(Code):
            raise ValueError(f"the code of a tiling is sets, sweep or taps, not {fields['code']!r}")
        if not isinstance(fields.get("pairs", False), bool):
            raise ValueError(f"pairs of a tiling is true or false, not {fields['pairs']!r}")
        plain = {**fields, "tile": tuple(fields["tile"]), "region": tuple(fields["region"])}
        for name, least in _LEAST.items():
            numbers = plain.get(name, least)
            if isinstance(numbers, tuple) and len(numbers) != 2:
                raise ValueError(f"{name} of a tiling is two numbers, not {list(numbers)}")
            for number in numbers if isinstance(numbers, tuple) else (numbers,):
                if type(number) is not int or number < least:
                    raise ValueError(f"{name} of a tiling is a number of at least {least}, not {number!r}")
                if number > (most := _MOST.get(name, _MOST_NUMBER)):
                    raise ValueError(f"{name} of a tiling is a number of at most {most}, not {number}")
        return cls(**plain)
