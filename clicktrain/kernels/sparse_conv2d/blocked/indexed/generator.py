"""What the kernels that take offsets of taps as data share: numbers, constants, the order of the weights.

Code of its own for each tap set wants few sets and many registers. These kernels know nothing of sets: each
weight is an offset and a value, every result position one multiply-add with its operand in the first-level
cache. There is no jump to mispredict and no load to share, so it does not matter where the kept positions
lie; what matters is that windows stay in the first-level cache: the source is gone through in *passes* of a
few channels (or filters, for the gradient of the input), over all results, with the sums kept in between.
"""

from __future__ import annotations

import torch

from clicktrain.kernels.native import preamble
from clicktrain.kernels.sparse_conv2d.blocked.indexed.strided_phase import StridedAxis
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared import operand_types, schedule, window_copy
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Forward
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import (
    FETCH,
    SUPPORT,
    Code,
    define,
    join,
    planes,
)

OFFSETS = 1 << 16
"""Vectors that the windows of one pass may have, so that an offset takes two bytes."""
BESIDE_VECTORS = 16384
"""Vectors of a region that is copied while another is computed: two of them fill a second-level cache."""
FILTER_VECTORS = 8192
"""Vectors of the output's gradient that are gone through before the next: half of a second-level cache."""


class IndexedGenerator:
    """Numbers that the code and the order of the weights are made from; names as in ``Generator``."""

    def __init__(self, phase: Phase, problem: ConvProblem, tiling: Tiling, dtype: torch.dtype) -> None:
        self.phase, self.dtype = phase, dtype
        self.operands = operand_types.support(phase, problem, tiling.pairs)
        direction = Backward if phase == "dgrad" else Forward
        self.rows = StridedAxis(direction(problem.rows), tiling.tile[0], tiling.region[0])
        self.columns = StridedAxis(direction(problem.columns), tiling.tile[1], tiling.region[1])
        backward = phase == "dgrad"
        self.sources = problem.filters if backward else problem.channels
        self.results = problem.channels if backward else problem.filters
        self.taps = problem.rows.taps, problem.columns.taps
        self.window = self.rows.buffer * self.columns.buffer
        as_stored = operand_types.as_stored(phase, tiling.pairs, dtype) and phase != "wgrad"
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
        """Of regions (gradient of the weight): two, if small, one of which is computed, the next copied."""
        both = (self.sources * self.window + self.results * self.patch) * self.images
        return 2 if both <= BESIDE_VECTORS else 1

    @property
    def scratch(self) -> int:
        """Vectors that each thread needs, beside the sums of the gradient of the weight."""
        window = 0 if self.in_place else self.sources * self.window * self.images
        if self.phase == "wgrad":
            return self.buffers * (window + self.results * self.patch * self.images)
        return window + self.results * self.rows.tile * self.columns.tile

    def offset(self, tap: int) -> tuple[int, int]:
        """(strided_phase, vectors from the beginning of a tile's window) of a tap, 0 to R*S - 1."""
        r, s = divmod(tap, self.taps[1])
        (a, down), (b, right) = _hit(self.rows, r), _hit(self.columns, s)
        return a * len(self.columns.strided_phases) + b, down * self.columns.buffer + right

    def begin(self, lanes: int) -> Code:
        """The text up to the first function of the kernel's own."""
        code = Code()
        code(preamble(self.dtype, lanes))
        numbers = {
            **planes(self.sources, self.results, self.rows.direction, self.columns.direction),
            "WIN_H": self.rows.buffer,
            "WIN_W": self.columns.buffer,
            "WIN": self.window * self.images,
            "PASS": self.per_pass * self.window * self.images,
            "SCRATCH": self.scratch,
            "REGION_ROWS": self.rows.regions,
            "REGION_COLS": self.columns.regions,
        }
        define(code, numbers)
        for name, axis in (("ROW", self.rows), ("COL", self.columns)):
            code(f"#define {name}_FIRST(region) ((region) * {axis.positions * axis.reach}L + {axis.low}L)")
            starts = join(strided_phase.start for strided_phase in axis.strided_phases)
            counts = join(strided_phase.count for strided_phase in axis.strided_phases)
            code(f"static __attribute__((unused)) const int {name}_START[] = {{{starts}}};")
            code(f"static __attribute__((unused)) const int {name}_COUNT[] = {{{counts}}};")
        code(self.operands)
        code(SUPPORT)
        if self.phase != "wgrad":
            code(FETCH)
        code(window_copy.TYPE)
        if self.phase != "wgrad":
            code(schedule.SUPPORT)
        spans = tuple((self.columns.first(n), self.columns.buffer) for n in range(self.columns.regions))
        width = self.columns.direction.source
        window_copy.windows(self.window, self.columns.buffer, spans, width, self.images).write(code)
        return code


def window_vectors(phase: Phase, problem: ConvProblem, tiling: Tiling) -> int:
    """Vectors that a region reads of one channel (of the gradient of the input: of one filter)."""
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
