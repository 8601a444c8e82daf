"""Result positions that read alike: what code needs that takes offsets of taps as data.

In a forward pass position i of the result reads the source at ``i * stride`` plus a shift of the tap. Dgrad
with a stride s is s interleaved *strided phases* of positions along an axis, ``p + i * s``: position i of
each reads the source at ``i`` plus a shift, of those taps that hit it. So every direction is the same loop,
and a tap of a kernel is one number: its offset.
"""

from __future__ import annotations

from dataclasses import dataclass

from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Axis, Direction, Forward


@dataclass(frozen=True, slots=True)
class StridedPhase:
    """Positions ``start + i * step`` of the result along one axis, i from 0 to ``count - 1``.

    Attributes:
        shifts: by tap, what is added to ``i * reach`` for the position that is read; None where the tap hits
            none of these positions.
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
