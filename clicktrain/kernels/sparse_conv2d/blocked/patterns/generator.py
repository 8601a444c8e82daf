"""What code for tap patterns is written from: numbers of a layer, the triples, the macros of static parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from clicktrain.kernels.native.source import begin_source
from clicktrain.kernels.sparse_conv2d.blocked.patterns.pairs import Place, Use, Window, pair_taps
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import (
    IN_PLACE_CODE,
    AxisRegions,
    TileKind,
    code_size,
)
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import NARROW
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared import headers
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Direction, Forward
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import CHUNKS, write_copy
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code, planes


class Generator:
    """Numbers that accumulating kernels and wgrad are written from.

    *Source* is what windows are read from: the input, or for its gradient the output's gradient. *Result* is
    what tiles are cut from: the output, or for dgrad the input.
    """

    def __init__(
        self,
        phase: Phase,
        problem: ConvProblem,
        tap_patterns: tuple[Taps, ...],
        tiling: Tiling,
        dtype: torch.dtype,
    ) -> None:
        self.phase, self.tap_patterns, self.filters_per_tile = phase, tap_patterns, tiling.filters_per_tile
        self.dtype, self.operands = dtype, headers.operand_macros(phase, problem, tiling.pairs)
        self.kernel_width = problem.columns.taps
        self.cache_blocked = tiling.code == "cache_blocked" and phase != "wgrad"
        """Whether sums are in L1, of a block of results over passes of sources."""
        backward = phase == "dgrad"
        direction = Backward if backward else Forward
        as_stored = headers.as_stored(phase, tiling.pairs, dtype)
        self.rows, self.columns = _axes(direction, problem, tiling, self.cache_blocked and as_stored)
        if (
            self.cache_blocked
            and code_size(self.rows, self.columns, sum(map(len, tap_patterns))) > IN_PLACE_CODE
        ):
            self.rows, self.columns = _axes(direction, problem, tiling, in_place=False)
        self.apart = headers.halves_apart(self.operands)
        """Columns between the two halves of a cell."""
        self.pairs = (
            [pair_taps(taps, phase, problem) for taps in tap_patterns] if self.multiplies_pairs else []
        )
        """Pairs of taps of each pattern, where forward and dgrad multiply pairs."""
        if self.multiplies_pairs and any(column < 0 for use in self._all_uses() for _, column in use.places):
            self.rows, self.columns = _axes(direction, problem, tiling, in_place=False, margin=self.apart)
        self.images = tiling.images if phase == "wgrad" else 1
        """Blocks of images of a region."""
        self.sources = problem.filters if backward else problem.channels
        self.results = problem.channels if backward else problem.filters
        self.entry = "uint16_t" if max(self.sources, self.results) <= NARROW else "int32_t"
        """C type of what a table says of each part."""
        self.window = self.rows.buffer * self.columns.buffer
        self.in_place = as_stored and self.rows.in_place and self.columns.in_place
        """Whether windows are read from the source itself, without a copy."""
        self.patch_in_place = as_stored and len(self.rows.regions) == len(self.columns.regions) == 1
        """As much for the output's gradient (wgrad only)."""
        self.block = max(min(tiling.results or self.results, self.results), 1)
        self.blocks = -(-self.results // self.block)
        self.passes = -(-self.sources // max(min(tiling.sources or self.sources, self.sources), 1))
        self.patch_rows = max(sum(t.size for t in region) for region in self.rows.regions)
        self.patch_columns = max(sum(t.size for t in region) for region in self.columns.regions)

    @property
    def multiplies_pairs(self) -> bool:
        """Whether windows are cells of two columns (forward and dgrad)."""
        return self.operands["PAIRS"] == "COLUMNS"

    def uses(self, number: int, row: TileKind, column: TileKind) -> list[Use]:
        """The operands of a pattern's pairs on a tile."""
        window = Window(row, column, self.rows, self.columns, self.apart)
        return window.uses(self.tap_patterns[number], self.pairs[number])

    def place(self, place: Place) -> int:
        """A cell's number from the beginning of a tile's window."""
        return place[0] * self.columns.buffer + place[1]

    def weights_of(self, number: int) -> int:
        """Weights of a kernel with that pattern, as the loops read them."""
        return len(self.pairs[number] if self.multiplies_pairs else self.tap_patterns[number])

    def _all_uses(self) -> Iterator[Use]:
        numbers = range(len(self.pairs))
        for number, row, column in itertools.product(numbers, self.rows.kinds, self.columns.kinds):
            yield from self.uses(number, row, column)

    @property
    def window_vectors(self) -> int:
        """Vectors of the buffer for windows; of two, where the next region is copied beside this one."""
        return 0 if self.in_place else self.sources * self.window * (2 if self.cache_blocked else self.images)

    @property
    def patch_vectors(self) -> int:
        """Vectors of the buffer for the output's gradient (wgrad only)."""
        if self.phase != "wgrad" or self.patch_in_place:
            return 0
        return self.results * self.patch_rows * self.patch_columns * self.images

    @property
    def sum_vectors(self) -> int:
        """Vectors of sums: of all results between passes; or of two blocks, one is computed, one stored."""
        tile = max(k.size for k in self.rows.kinds) * max(k.size for k in self.columns.kinds)
        if self.cache_blocked:
            return 2 * self.block * tile
        return self.results * tile if self.passes > 1 and self.phase != "wgrad" else 0

    @property
    def scratch(self) -> int:
        """Vectors that each thread needs for all of them."""
        return self.sum_vectors + self.window_vectors + self.patch_vectors

    def begin(self, about: str, lanes: int, sums: bool) -> Code:
        """The source up to the first function of the kernel's own; ``sums`` as of `unrolled.write`."""
        macros = {
            **self.operands,
            **planes(self.sources, self.results, self.rows.direction, self.columns.direction),
            "ENTRY": self.entry,
            "WIN_W": self.columns.buffer,
            "WIN": self.window,
            "SCRATCH": self.scratch,
            "REGION_ROWS": len(self.rows.regions),
            "REGION_COLS": len(self.columns.regions),
            **(self._wgrad_macros() if self.phase == "wgrad" else self._accumulate_macros(sums)),
        }
        code = Code(begin_source(about, self.dtype, lanes, macros))
        for name, axis in (("ROW", self.rows), ("COL", self.columns)):
            spans = [axis.span(region) for region in axis.regions]
            code.array(f"{name}_FIRST", (first for first, _ in spans))
            code.array(f"{name}_SPAN", (span for _, span in spans))
            code.array(f"{name}_START", (region[0].start for region in axis.regions))
            code.array(f"{name}_SIZE", (sum(tile.size for tile in region) for region in axis.regions))
        return code

    def write_copy(self, code: Code) -> None:
        """The copy of a region's windows."""
        columns = [self.columns.span(region) for region in self.columns.regions]
        steps = self.columns.buffer, self.window, self.sources * self.window
        write_copy(code, "windows", steps, columns, self.columns.direction.source, self.apart)

    def _accumulate_macros(self, sums: bool) -> dict[str, int | str]:
        beside = "COPIED_BESIDE" if self.cache_blocked else "COPIED_AT_ONCE"
        unit = self.block if self.cache_blocked else self.filters_per_tile
        runs = self.blocks * self.passes * len(self.tap_patterns)
        return {
            "STATISTICS": int(sums),
            "WINDOWS": "IN_PLACE" if self.in_place else beside,
            "CHUNKS": CHUNKS,
            "GROUPS": runs if self.cache_blocked else self.passes * (self.results // self.filters_per_tile),
            "UNIT": unit,
            "UNITS": -(-self.results // unit),
            "SUM_VECTORS": self.sum_vectors,
        }

    def _wgrad_macros(self) -> dict[str, int | str]:
        return {
            "REGION_IMAGES": self.images,
            "PATCH_W": self.patch_columns,
            "PATCH": self.patch_rows * self.patch_columns,
            "X_IN_PLACE": int(self.in_place),
            "GY_IN_PLACE": int(self.patch_in_place),
            "WINDOW_VECTORS": self.window_vectors,
        }

    def triples(self, taps: Taps, row: TileKind, column: TileKind) -> Iterator[tuple[int, int, int]]:
        """(result position in the tile, window position, which of the taps), window after window."""
        triples = []
        for number, tap in enumerate(taps):
            r, s = divmod(tap, self.kernel_width)
            for i in range(row.size):
                for j in range(column.size):
                    y, x = self.rows.reads(row, i, r), self.columns.reads(column, j, s)
                    if y is not None and x is not None:
                        triples.append((y * self.columns.buffer + x, i * column.size + j, number))
        for window, position, number in sorted(triples):
            yield position, window, number


def _axes(
    direction: type[Direction], problem: ConvProblem, tiling: Tiling, in_place: bool, margin: int = 0
) -> tuple[AxisRegions, AxisRegions]:
    (height, width), (down, across) = tiling.tile, tiling.region
    return (
        AxisRegions(direction(problem.rows), height, down, in_place),
        AxisRegions(direction(problem.columns), width, across, in_place, margin),
    )
