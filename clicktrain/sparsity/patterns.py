"""Patterns: which positions of an R x S kernel are kept (ClickTrain sections 2.1 and 4.2)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from clicktrain.errors import UserError

MAX_POSITIONS = 62
"""Patterns are bit sets in an int64, which kernels up to 7 x 7 fit; larger ones are kept or pruned whole."""


@dataclass(frozen=True, slots=True, order=True)
class Pattern:
    """Kept positions of one kernel; bit ``r * S + s`` stands for weight ``[r, s]``."""

    bits: int
    shape: tuple[int, int] = (3, 3)

    def __post_init__(self) -> None:
        positions = self.shape[0] * self.shape[1]
        if positions > MAX_POSITIONS and self.entries < positions:
            raise ValueError(f"a pattern has at most {MAX_POSITIONS} positions, got {self.shape}")
        if not 0 < self.bits < 1 << positions:
            raise ValueError(f"pattern bits {self.bits} do not fit a kernel of shape {self.shape}")

    @property
    def entries(self) -> int:
        """Number of kept positions."""
        return self.bits.bit_count()

    def mask(self) -> Tensor:
        """Bool tensor [R, S], True = kept."""
        r, s = self.shape
        return torch.tensor([bool(self.bits >> i & 1) for i in range(r * s)]).view(r, s)

    def __str__(self) -> str:
        r, s = self.shape
        rows = ("".join("#" if self.bits >> (i * s + j) & 1 else "." for j in range(s)) for i in range(r))
        return "/".join(rows)


@dataclass(frozen=True, slots=True)
class PatternPool:
    """The P patterns that kernels of one shape may take; all of one shape and one number of entries."""

    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("a pattern pool needs at least one pattern")
        if len({(p.shape, p.entries) for p in self.patterns}) > 1:
            raise ValueError("the patterns of a pool must agree in shape and in the number of kept positions")

    def __len__(self) -> int:
        return len(self.patterns)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, S)."""
        return self.patterns[0].shape

    @property
    def entries(self) -> int:
        """Kept positions per kernel."""
        return self.patterns[0].entries

    def masks(self) -> Tensor:
        """Bool tensor [P, R, S]."""
        return torch.stack([p.mask() for p in self.patterns])

    @classmethod
    def from_bits(cls, bits: Iterable[int], shape: tuple[int, int]) -> PatternPool:
        """Build a pool of one kernel shape from pattern bit sets."""
        return cls(tuple(Pattern(int(b), shape) for b in bits))


def all_patterns(entries: int = 4, shape: tuple[int, int] = (3, 3)) -> tuple[Pattern, ...]:
    """Every way to keep ``entries`` positions: 126 of them for 4 of 9 (ClickTrain section 4.2)."""
    size = shape[0] * shape[1]
    return tuple(
        Pattern(sum(1 << i for i in kept), shape) for kept in itertools.combinations(range(size), entries)
    )


def default_entries(shape: tuple[int, int], entries: int) -> int:
    """Kept positions of an R x S kernel when ``entries`` of a 3 x 3 one are kept.

    The paper keeps 4 of 9 and says that the method applies to 5 x 5 and 7 x 7 as well without giving a
    number; the density of the 3 x 3 case is used, at least one position.
    """
    return max(1, min(shape[0] * shape[1], round(entries * shape[0] * shape[1] / 9)))


# All contain the center: the four 2x2 squares, the four T shapes of the cross, the four Y and four Z shapes.
_FIXED_3X3 = (
    "##./##./...", ".##/.##/...", ".../##./##.", ".../.##/.##",
    ".#./###/...", ".../###/.#.", ".#./##./.#.", ".#./.##/.#.",
    "###/.#./...", ".../.#./###", "#../##./#..", "..#/.##/..#",
    "##./.##/...", "..#/.##/.#.", ".../##./.##", ".#./##./#..",
)  # fmt: skip
FIXED_SIZES = (4, 8, 12, 16)


def fixed_pool(size: int) -> PatternPool:
    """A pool of 4, 8, 12 or 16 given 3 x 3 patterns with 4 entries, the static baseline of ClickTrain Fig. 8.

    The paper does not print its fixed patterns; these are 2 x 2 squares, then T, Y and Z shapes, each in four
    rotations.

    Raises:
        UserError: ``size`` is another number.
    """
    if size not in FIXED_SIZES:
        raise UserError(f"a fixed pattern pool has 4, 8, 12 or 16 patterns, not {size}")
    bits = (
        sum(1 << i for i, c in enumerate(text.replace("/", "")) if c == "#") for text in _FIXED_3X3[:size]
    )
    return PatternPool.from_bits(bits, (3, 3))


@functools.lru_cache(maxsize=64)
def neighbor_table(shape: tuple[int, int], diagonal: bool) -> Tensor:
    """Adjacency of the positions of an R x S kernel, by the 8 neighbors (diagonal) or 4: bool [R*S, R*S].

    Entry [i, j] says that j is a neighbor of i. A position is not its own neighbor.
    """
    r, s = shape
    rows = torch.arange(r).repeat_interleave(s)
    cols = torch.arange(s).repeat(r)
    dr = (rows[:, None] - rows[None, :]).abs()
    dc = (cols[:, None] - cols[None, :]).abs()
    near = (dr <= 1) & (dc <= 1) if diagonal else dr + dc <= 1
    return near & ((dr + dc) > 0)
