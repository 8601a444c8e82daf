"""Which rows and columns a tile of a convolution reads: the index arithmetic of forward and both gradients.

Rows and columns are treated alike and apart, so everything here is about one axis. A *tile* is a run of
positions of the result that one pass of a kernel computes, its *window* the run of positions of the source
that these need. Windows may reach over the image's edge: into the padding.

In a forward pass position i of the result reads the source at ``i * stride`` plus a shift of the tap. Dgrad
with a stride s is s interleaved *strided phases* of positions along an axis, ``p + i * s``: position i of
each reads the source at ``i`` plus a shift, of those taps that hit it. So every direction is the same loop,
and code can take a tap of a kernel as one number: its offset.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a convolution: sizes of the image, of the result and of the kernel along it."""

    size: int
    taps: int
    stride: int
    padding: int
    dilation: int
    out: int


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of ``size`` result positions from ``start``, and what it reads.

    Its window has ``extent`` source positions from the first that any tap reads, negative in the padding;
    ``low`` and ``high`` of them at either end lie outside the source.
    """

    start: int
    size: int
    window: int
    extent: int
    low: int
    high: int


class Forward:
    """Output position i reads input position ``i * stride + tap * dilation - padding``."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.length, self.source = axis.out, axis.size
        self.step = 1

    def window(self, start: int, size: int) -> tuple[int, int]:
        """First source position and extent of the positions [start, start + size)."""
        a = self.axis
        return start * a.stride - a.padding, (size - 1) * a.stride + (a.taps - 1) * a.dilation + 1

    def reads(self, index: int, tap: int) -> int | None:
        """Place in the window that the tile's position ``index`` reads for a tap."""
        return index * self.axis.stride + tap * self.axis.dilation


class Backward:
    """Input position y collects output position ``(y + padding - tap * dilation) / stride`` where whole.

    Tiles start at multiples of the stride, so that which taps hit does not depend on the tile.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.length, self.source = axis.size, axis.out
        self.step = axis.stride

    def window(self, start: int, size: int) -> tuple[int, int]:
        """First source position and extent of the positions [start, start + size)."""
        first = self._first()
        last = (size - 1 + self.axis.padding) // self.axis.stride
        return start // self.axis.stride + first, max(last - first + 1, 1)

    def reads(self, index: int, tap: int) -> int | None:
        """Place in the window that the tile's position ``index`` reads for a tap; None if it hits nothing."""
        place, rest = divmod(index + self.axis.padding - tap * self.axis.dilation, self.axis.stride)
        return None if rest else place - self._first()

    def _first(self) -> int:
        a = self.axis
        return -((-(a.padding - (a.taps - 1) * a.dilation)) // a.stride)


Direction = Forward | Backward


def tiles(direction: Direction, size: int) -> list[Tile]:
    """Cut the result into tiles of at most ``size`` (a multiple of the direction's step), about alike.

    Of two sizes at most, the larger ones first; the last may be smaller where the length is no multiple of
    the step.
    """
    if size % direction.step and size < direction.length:
        raise ValueError(f"tiles of {size} do not start at multiples of {direction.step}")
    result = []
    steps = -(-direction.length // direction.step)
    count = max(-(-direction.length // size), 1)
    starts = [(steps // count * i + min(i, steps % count)) * direction.step for i in range(count + 1)]
    for start, end in itertools.pairwise(starts):
        length = min(end, direction.length) - start
        window, extent = direction.window(start, length)
        low = min(max(0, -window), extent)
        high = min(max(0, window + extent - direction.source), extent - low)
        result.append(Tile(start, length, window, extent, low, high))
    return result


@dataclass(frozen=True, slots=True)
class StridedPhase:
    """Positions ``start + i * step`` of the result along one axis, i from 0 to ``count - 1``.

    ``shifts``, by tap, are added to ``i * reach`` for the position read; None where the tap hits none.
    """

    start: int
    count: int
    shifts: tuple[int | None, ...]


class StridedAxis:
    """The strided phases along one axis, cut into tiles and regions of positions i that all of them share.

    Attributes:
        step: positions of the result from one of a strided_phase to the next.
        reach: positions of the source from one to the next.
        strided_phases: ``step`` of them.
        low: least shift of any tap; where a window begins.
        tile: positions of a tile.
        tiles, regions: how many there are; a region has ``region`` tiles.
        buffer: source positions that a region reads, with what lies outside the source.
    """

    def __init__(self, direction: Direction, tile: int, region: int) -> None:
        axis = direction.axis
        forward = isinstance(direction, Forward)
        self.direction = direction
        self.step, self.reach = (1, axis.stride) if forward else (axis.stride, 1)
        self.strided_phases = (
            [_forward(axis)] if forward else [_backward(axis, p) for p in range(axis.stride)]
        )
        shifts = [s for strided_phase in self.strided_phases for s in strided_phase.shifts if s is not None]
        self.low = min(shifts)
        self.count = max(strided_phase.count for strided_phase in self.strided_phases)
        self.tile, self.region = min(tile, self.count), region
        self.tiles = -(-self.count // self.tile)
        self.regions = -(-self.tiles // region)
        self.positions = self.tile * min(region, self.tiles)
        self.buffer = self.window(self.positions, max(shifts))

    def window(self, positions: int, high: int | None = None) -> int:
        """Source positions that a run of positions reads."""
        if high is None:
            high = max(
                s for strided_phase in self.strided_phases for s in strided_phase.shifts if s is not None
            )
        return (positions - 1) * self.reach + high - self.low + 1

    def first(self, region: int) -> int:
        """First source position of a region's buffer; negative in the padding."""
        return region * self.positions * self.reach + self.low

    def whole(self) -> bool:
        """Whether one region's buffer is the source itself."""
        return self.regions == 1 and self.low == 0 and self.buffer == self.direction.source


def _forward(axis: Axis) -> StridedPhase:
    return StridedPhase(0, axis.out, tuple(tap * axis.dilation - axis.padding for tap in range(axis.taps)))


def _backward(axis: Axis, start: int) -> StridedPhase:
    shifts = []
    for tap in range(axis.taps):
        place, rest = divmod(start + axis.padding - tap * axis.dilation, axis.stride)
        shifts.append(None if rest else place)
    return StridedPhase(start, max(-(-(axis.size - start) // axis.stride), 0), tuple(shifts))
