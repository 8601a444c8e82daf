"""A convolution as the blocked kernels see it: all that generated code depends on, except the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, get_args

from clicktrain.kernels.impls import PHASES as PHASES
from clicktrain.kernels.impls import Phase as Phase
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Axis

Code = Literal["unrolled", "cache_blocked", "indexed"]
_LEAST = {"tile": 1, "region": 1, "filters_per_tile": 1, "images": 1, "sources": 0, "results": 0}
_MOST = {"tile": 256, "filters_per_tile": 16}
"""Code is written for each position of a tile and each filter of it; the others are bounds of loops."""
_MOST_NUMBER = 1 << 24


@dataclass(frozen=True, slots=True)
class ConvProblem:
    """Shape of one convolution layer on images of one size; channels and filters of all groups together."""

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
        return [self.channels, self.filters, *astuple(self.rows), *astuple(self.columns)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ConvProblem:
        """Inverse of `numbers`."""
        channels, filters, *rest = numbers
        return cls(channels, filters, Axis(*rest[:6]), Axis(*rest[6:12]))


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel divides its work; the result does not depend on it.

    Attributes:
        tile: rows and columns of the positions whose sums are in registers (``cache_blocked``: in the cache).
        region: tiles per region along either axis.
        filters_per_tile: neighboring filters computed at once; they have to have the same channels and tap
            patterns.
        code: ``unrolled``, code of its own for each tap pattern, sums in registers; ``cache_blocked``, the
            same with sums in L1 or L2 (forward and dgrad only); or ``indexed``, offsets of taps as data.
        sources: channels (of dgrad: filters) of one pass over all results; 0 = all
            (not ``unrolled`` wgrad).
        results: filters (of dgrad: channels) whose sums are in the cache at once; 0 = all
            (``cache_blocked`` only).
        images: blocks of images of one region (wgrad only).
        pairs: multiply pairs of bfloat16 numbers, see ``operand_types.h`` (bfloat16 activations only; not
            with ``cache_blocked``).
    """

    tile: tuple[int, int]
    region: tuple[int, int] = (1, 1)
    filters_per_tile: int = 1
    code: Code = "unrolled"
    sources: int = 0
    results: int = 0
    images: int = 1
    pairs: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.tile)) + f" {self.code}" + (" pairs" if self.pairs else "")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Tiling:
        """Inverse of ``dataclasses.asdict``, after JSON; ValueError if a field is wrong."""
        if fields.get("code", "unrolled") not in get_args(Code):
            raise ValueError(
                f"the code of a tiling is unrolled, cache_blocked or indexed, not {fields['code']!r}"
            )
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
