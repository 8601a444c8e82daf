"""Which rows and columns a tile of a convolution reads: the index arithmetic of forward and both gradients.

Rows and columns are treated alike and apart, so everything here is about one axis. A *tile* is a run of
positions of the result that one pass of a kernel computes, its *window* the run of positions of the source
that these need. Windows may reach over the image's edge: into the padding.
"""

from __future__ import annotations

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
    """A run of result positions and what it reads.

    Attributes:
        start: first position.
        size: positions.
        window: first source position that any tap reads; negative in the padding.
        extent: source positions from there.
        low, high: how many of them at either end lie outside the source.
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
    """Cut the result into tiles of ``size`` (a multiple of the direction's step); the last may be smaller."""
    if size % direction.step and size < direction.length:
        raise ValueError(f"tiles of {size} do not start at multiples of {direction.step}")
    result = []
    for start in range(0, direction.length, size):
        length = min(size, direction.length - start)
        window, extent = direction.window(start, length)
        low = min(max(0, -window), extent)
        high = min(max(0, window + extent - direction.source), extent - low)
        result.append(Tile(start, length, window, extent, low, high))
    return result
