"""Tiles and regions along one axis, and what of them the generated code has to distinguish."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Direction, Tile, tiles

IN_PLACE_CODE = 8192
"""Multiply-adds of all tap patterns on all kinds of tiles, beyond which their code would take long to build.

Windows that are read in place want code of its own for tiles at the edges of the image.
"""


class TileKind(NamedTuple):
    """What distinguishes the code of one tile from another's, along one axis.

    Attributes:
        size: result positions.
        low, high: window positions at either end that lie in the padding and are left out of the code.
        extent: window positions, with those.
    """

    size: int
    low: int
    high: int
    extent: int


RegionKind: TypeAlias = tuple[tuple[TileKind, int, int], ...]
"""For each tile of a region its kind, where it begins to read in the windows, and where to write."""


class AxisRegions:
    """Tiles and regions along one axis of the result.

    Where there are at most two tiles, or windows are read from the source itself, the code leaves out what
    lies in the padding. Regions have ``margin`` positions before the first one that their tiles need.
    """

    def __init__(
        self, direction: Direction, tile: int, region: int, in_place: bool = False, margin: int = 0
    ) -> None:
        self.direction, self.margin = direction, margin
        self.tiles = tiles(direction, min(tile, direction.length))
        self.skips = in_place or len(self.tiles) <= 2
        self.regions = [self.tiles[i : i + region] for i in range(0, len(self.tiles), region)]
        self.kinds = sorted({self.kind_of(t) for t in self.tiles})
        self.span_most = max(self.span(region)[1] for region in self.regions)
        whole = len(self.regions) == 1 and self.span(self.regions[0]) == (0, direction.source)
        self.in_place = in_place or whole
        """Whether windows can be read from the source itself."""
        self.buffer = direction.source if in_place else self.span_most
        self.region_tiles = max(len(region) for region in self.regions)

    def kind_of(self, tile: Tile) -> TileKind:
        """The tile's kind."""
        return TileKind(tile.size, *((tile.low, tile.high) if self.skips else (0, 0)), tile.extent)

    def first(self, tile: Tile) -> int:
        """First source position that the code of a tile may read."""
        return tile.window + self.kind_of(tile).low

    def span(self, region: list[Tile]) -> tuple[int, int]:
        """First source position, and positions, that a region's windows take."""
        first = min(self.first(t) for t in region)
        last = max(t.window + t.extent - self.kind_of(t).high for t in region)
        return first - self.margin, max(last - first, 1) + self.margin

    def reads(self, kind: TileKind, index: int, tap: int) -> int | None:
        """Place, from where the tile's code starts to read, for a position and a tap; None if zero."""
        place = self.direction.reads(index, tap)
        if place is None or not kind.low <= place < kind.extent - kind.high:
            return None
        return place - kind.low

    def region_kind(self, index: int) -> RegionKind:
        """What distinguishes the code of one region from another's: its tiles and where they lie in it."""
        region = self.regions[index]
        first, start = self.span(region)[0], region[0].start
        return tuple((self.kind_of(t), self.first(t) - first, t.start - start) for t in region)

    def region_kinds(self) -> dict[RegionKind, list[int]]:
        """Numbers of the regions of each kind."""
        kinds: dict[RegionKind, list[int]] = {}
        for index in range(len(self.regions)):
            kinds.setdefault(self.region_kind(index), []).append(index)
        return kinds


def code_size(rows: AxisRegions, columns: AxisRegions, taps: int) -> int:
    """Multiply-adds on all kinds of tiles, of ``taps`` in all patterns; about."""
    size = taps
    for axis in (rows, columns):
        # Of a gradient with a stride, each position of a tile takes part of the taps.
        size *= len(axis.kinds) * max(kind.size for kind in axis.kinds) // axis.direction.step
    return size
