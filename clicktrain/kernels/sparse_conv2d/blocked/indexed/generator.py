"""A layer's numbers for ``accumulate.c`` and ``wgrad.c``, which read offsets of taps from a table."""

from __future__ import annotations

import torch

from clicktrain.kernels.native.source import begin_source
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared import headers
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Forward, StridedAxis
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import CHUNKS, write_copy
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code, planes

UNIT = 4
"""Weights of a filter that wgrad takes at a time; offsets are filled up to a multiple."""
CHAINS = 3
"""Sums of each of them that are built side by side."""
OFFSETS = 1 << 16
"""Vectors that the windows of one pass may have, so that an offset takes two bytes."""
BESIDE_VECTORS = 16384
"""Vectors of a region that is copied while another is computed: two of them fill L2."""
FILTER_VECTORS = 8192
"""Vectors of the output's gradient that are gone through before the next: half of L2."""


class IndexedGenerator:
    """Numbers that the code and the order of the weights are made from; names as in ``Generator``."""

    def __init__(self, phase: Phase, problem: ConvProblem, tiling: Tiling, dtype: torch.dtype) -> None:
        self.phase, self.dtype = phase, dtype
        self.operands = headers.operand_macros(phase, problem, tiling.pairs)
        direction = Backward if phase == "dgrad" else Forward
        self.rows = StridedAxis(direction(problem.rows), tiling.tile[0], tiling.region[0])
        self.columns = StridedAxis(direction(problem.columns), tiling.tile[1], tiling.region[1])
        backward = phase == "dgrad"
        self.sources = problem.filters if backward else problem.channels
        self.results = problem.channels if backward else problem.filters
        self.taps = problem.rows.taps, problem.columns.taps
        self.window = self.rows.buffer * self.columns.buffer
        as_stored = headers.as_stored(phase, tiling.pairs, dtype) and phase != "wgrad"
        self.in_place = as_stored and self.rows.whole() and self.columns.whole()
        self.images = max(tiling.images, 1) if phase == "wgrad" else 1
        most = OFFSETS // (self.window * self.images)
        if not most:
            raise ValueError(f"windows of {self.window} vectors are too large for offsets of 16 bits")
        self.per_pass = min(tiling.sources or self.sources, self.sources, most)
        self.passes = -(-self.sources // self.per_pass)
        self.strided_phases = len(self.rows.strided_phases) * len(self.columns.strided_phases)
        self.patch = self.rows.positions * self.columns.positions
        self.filters_at_once = max(FILTER_VECTORS // (self.patch * self.images), 1)

    @property
    def buffers(self) -> int:
        """Buffers for regions (wgrad): two, if small, one of which is computed, the next copied."""
        both = (self.sources * self.window + self.results * self.patch) * self.images
        return 2 if both <= BESIDE_VECTORS else 1

    @property
    def scratch(self) -> int:
        """Vectors that each thread needs, beside the sums of wgrad."""
        window = 0 if self.in_place else self.sources * self.window * self.images
        if self.phase == "wgrad":
            return self.buffers * (window + self.results * self.patch * self.images)
        return window + self.results * self.rows.tile * self.columns.tile

    def offset(self, tap: int) -> tuple[int, int]:
        """(strided_phase, vectors from the beginning of a tile's window) of a tap, 0 to R*S - 1."""
        r, s = divmod(tap, self.taps[1])
        (a, down), (b, right) = _hit(self.rows, r), _hit(self.columns, s)
        return a * len(self.columns.strided_phases) + b, down * self.columns.buffer + right

    def source(self, about: str, lanes: int, sums: bool) -> str:
        """The C source, ``accumulate.c`` or ``wgrad.c``, of which only numbers depend on the layer."""
        rows, columns, wgrad = self.rows, self.columns, self.phase == "wgrad"
        macros = {
            **self.operands,
            **planes(self.sources, self.results, rows.direction, columns.direction),
            "ENTRY": "uint16_t",
            "WIN_W": columns.buffer,
            "WIN_IMAGE": self.window,
            "WIN": self.window * self.images,
            "SCRATCH": self.scratch,
            "REGION_ROWS": rows.regions,
            "REGION_COLS": columns.regions,
            "ROW_REACH": rows.reach,
            "COL_REACH": columns.reach,
            "TILE_W": columns.tile,
            **(self._wgrad_macros() if wgrad else self._accumulate_macros(sums)),
        }
        code = Code(begin_source(about, self.dtype, lanes, macros))
        for name, axis in (("ROW", rows), ("COL", columns)):
            starts = [region * axis.positions for region in range(axis.regions)]
            code.array(f"{name}_FIRST", (axis.first(region) for region in range(axis.regions)))
            code.array(f"{name}_SPAN", [axis.buffer] * axis.regions)
            code.array(
                f"{name}_SIZE", (min(axis.positions, axis.direction.length - start) for start in starts)
            )
            code.array(f"PHASE_{name}_START", (phase.start for phase in axis.strided_phases))
            code.array(f"PHASE_{name}_COUNT", (phase.count for phase in axis.strided_phases))
        code.include("shared/window_copy.h")
        apart = headers.halves_apart(self.operands)
        spans = [(columns.first(region), columns.buffer) for region in range(columns.regions)]
        steps = columns.buffer, self.window * self.images, self.window
        write_copy(code, "windows", steps, spans, columns.direction.source, apart)
        if wgrad:
            spans = [(region * columns.positions, columns.positions) for region in range(columns.regions)]
            steps = columns.positions, self.patch * self.images, self.patch
            write_copy(code, "gradients", steps, spans, columns.direction.length, apart)
            code.for_each("EACH_COLUMN", [[(t, t % CHAINS) for t in range(columns.tile)]])
        else:
            tile = [[(i, j) for j in range(columns.tile)] for i in range(rows.tile)]
            numbers = [[(k := i * columns.tile + j, i, j, k % 2) for i, j in row] for row in tile]
            code.for_each("EACH_SUM", numbers)
        code.include("indexed/wgrad.c" if wgrad else "indexed/accumulate.c")
        return code.text()

    def _accumulate_macros(self, sums: bool) -> dict[str, int | str]:
        rows, columns = self.rows, self.columns
        down, right = rows.positions // rows.tile, columns.positions // columns.tile
        calls = max(down * right * self.strided_phases * self.passes * self.results, 1)
        return {
            "STATISTICS": int(sums),
            "WINDOWS": "IN_PLACE" if self.in_place else "COPIED_AT_ONCE",
            "CHUNKS": CHUNKS,
            "GROUPS": -1,
            "UNIT": 1,
            "UNITS": self.results,
            "SUM_VECTORS": self.results * rows.tile * columns.tile,
            "FETCH_ROWS": -(-self.sources * rows.buffer // calls),
            "PASS": self.per_pass * self.window,
            "PASSES": self.passes,
            "TILE_H": rows.tile,
            "TILES_DOWN": down,
            "TILES_RIGHT": right,
            "ROW_STEP": rows.step,
            "COL_STEP": columns.step,
            "ROW_PHASES": len(rows.strided_phases),
            "COL_PHASES": len(columns.strided_phases),
        }

    def _wgrad_macros(self) -> dict[str, int | str]:
        return {
            "REGION_IMAGES": self.images,
            "BUFFERS": self.buffers,
            "PATCH_H": self.rows.positions,
            "PATCH_W": self.columns.positions,
            "PATCH": self.patch * self.images,
        }


def window_vectors(phase: Phase, problem: ConvProblem, tiling: Tiling) -> int:
    """Vectors that a region reads of one channel (of dgrad: of one filter)."""
    direction = Backward if phase == "dgrad" else Forward
    rows = StridedAxis(direction(problem.rows), tiling.tile[0], tiling.region[0])
    columns = StridedAxis(direction(problem.columns), tiling.tile[1], tiling.region[1])
    return rows.buffer * columns.buffer * (tiling.images if phase == "wgrad" else 1)


def _hit(axis: StridedAxis, tap: int) -> tuple[int, int]:
    """The strided_phase that a tap belongs to, and how far from a window's beginning it reads."""
    for number, strided_phase in enumerate(axis.strided_phases):
        shift = strided_phase.shifts[tap]
        if shift is not None:
            return number, shift - axis.low
    raise AssertionError("every tap hits one strided_phase")
