"""Pairs of bfloat16 numbers in code for tap patterns, forward and dgrad: which taps, which operands.

A cell of a window holds a place of the source and the one DISTANCE columns after it (``operand_types.h``).
Neighboring taps of a kernel's row find both of their operands in one cell. Any other two take the low half of
one cell and the high half of another, a blend that the multipliers do not wait for. So four taps, wherever
they are, are two instructions a result position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import AxisRegions, TileKind
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import Table
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Forward
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import distance

Pair = tuple[int, int | None]
"""Which of a pattern's taps the low and the high half of an operand are multiplied with; None: with none."""
Place = tuple[int, int]
"""Row and column in the window of a tile; of cells also columns before it, see `margin`."""
REGISTERS = 32
"""Vector registers of processors that multiply pairs."""
_TILE, _INSIDE = 4, 1 << 20


class Use(NamedTuple):
    """The operand of a pair for one position of a tile.

    Its halves come from the cells ``low`` and ``high``, which are often the same; None is zero.
    """

    position: int
    pair: int
    low: Place | None
    high: Place | None

    @property
    def places(self) -> list[Place]:
        """The cells that have to be loaded."""
        return [place for place in dict.fromkeys((self.low, self.high)) if place is not None]


class Window:
    """Where the taps of a kernel read in the windows of one kind of tile.

    Attributes:
        apart: columns between the halves of a cell.
    """

    def __init__(
        self, row: TileKind, column: TileKind, rows: AxisRegions, columns: AxisRegions, apart: int
    ) -> None:
        self.row, self.column, self.apart = row, column, apart
        self._rows, self._columns = rows, columns
        self._width = columns.direction.axis.taps

    def uses(self, taps: Taps, pairs: Sequence[Pair]) -> list[Use]:
        """All pairs of a pattern on all positions of a tile, but those that read nothing."""
        result = []
        for i in range(self.row.size):
            for j in range(self.column.size):
                for number, pair in enumerate(pairs):
                    low, high = (None if tap is None else self._place(taps[tap], i, j) for tap in pair)
                    if pair[1] is None:
                        cells = low, low  # there is no weight for the other half
                    else:
                        cells = low, None if high is None else (high[0], high[1] - self.apart)
                    if cells[0] != cells[1]:
                        cells = self._filled(cells[0], low), self._filled(cells[1], high)
                    if any(self._filled(half, half) for half in (low, high)):
                        result.append(Use(i * self.column.size + j, number, *cells))
        return result

    def _place(self, tap: int, i: int, j: int) -> Place | None:
        """What a tap reads for a position. Columns in the padding count: cells have zeros there."""
        r, s = divmod(tap, self._width)
        y, x = self._rows.reads(self.row, i, r), self._columns.direction.reads(j, s)
        return None if y is None or x is None else (y, x - self.column.low)

    def _filled(self, cell: Place | None, read: Place | None) -> Place | None:
        """The cell, unless what is read in it lies in the padding."""
        inside = self.column.extent - self.column.low - self.column.high
        return cell if read is not None and 0 <= read[1] < inside else None


@functools.cache
def pair_taps(taps: Taps, phase: Phase, problem: ConvProblem) -> tuple[Pair, ...]:
    """Cut a pattern into pairs: into those with the fewest instructions, and among them the fewest loads."""
    direction = Backward if phase == "dgrad" else Forward
    rows, columns = (
        AxisRegions(direction(axis), direction(axis).length, 1) for axis in (problem.rows, problem.columns)
    )
    row, column = (TileKind(_TILE * axis.direction.step, 0, 0, _INSIDE) for axis in (rows, columns))
    window = Window(row, column, rows, columns, distance(phase, problem))

    @functools.cache
    def cost(pair: Pair) -> tuple[int, int]:
        found = window.uses(taps, [pair])
        blends = sum(one.low != one.high for one in found)
        return len(found), blends + 2 * len({place for one in found for place in one[2:]})

    @functools.cache
    def best(left: tuple[int, ...]) -> tuple[tuple[int, int], tuple[Pair, ...]]:
        if not left:
            return (0, 0), ()
        first, rest = left[0], left[1:]
        choices: list[tuple[Pair, tuple[int, ...]]] = [((first, None), rest)] if len(left) % 2 else []
        for second in rest:
            others = tuple(tap for tap in rest if tap != second)
            choices += [((first, second), others), ((second, first), others)]
        found = []
        for pair, others in choices:
            (products, loads), chosen = best(others)
            own = cost(pair)
            found.append(((products + own[0], loads + own[1]), (pair, *chosen)))
        return min(found, key=lambda one: one[0])

    return best(tuple(range(len(taps))))[1]


def schedule(found: Sequence[Use], room: int, width: int) -> list[Use | Place]:
    """Pairs, and before them the cells to be loaded, of which ``room`` at most are held at a time.

    Position after position, row after row or column after column of a tile of ``width``, whichever has fewer
    loads.
    """
    down = sorted(found, key=lambda use: (use.position % width, use.position // width))
    return min((_with_loads(order, room) for order in (found, down)), key=len)


def _with_loads(order: Sequence[Use], room: int) -> list[Use | Place]:
    """A cell that is needed again and no longer held is loaded again; that used longest ago makes room."""
    held: dict[Place, None] = {}
    steps: list[Use | Place] = []
    for use in order:
        for place in use.places:
            if place not in held:
                steps.append(place)
            held.pop(place, None)
            held[place] = None
        while len(held) > max(room, 2):
            held.pop(next(iter(held)))
        steps.append(use)
    return steps


def in_pairs(table: Table, taps: Sequence[Taps], pairs: Sequence[Sequence[Pair]], tiling: Tiling) -> Table:
    """A table of parts with an entry of `order` for each half of each weight of theirs.

    Args:
        table: of forward or dgrad with that tiling.
        taps, pairs: of each pattern.

    Returns:
        ``order`` is [weights, 2]; a place after the last stands for a zero. ``rows`` count weights.
    """
    order, together = table.order.numpy(), tiling.filters_per_tile
    kinds = table.entries[:, 1].numpy()
    sizes = np.array([len(one) for one in taps] or [0])[kinds] * together
    nothing = len(order)
    begin = np.cumsum(sizes) - sizes
    counts = np.array([len(one) for one in pairs] or [0])[kinds] * together
    first = np.cumsum(counts) - counts
    both = np.full((int(counts.sum()), 2), nothing, np.int64)
    for number, own in enumerate(pairs):
        index = np.nonzero(kinds == number)[0]
        for i, pair in enumerate(own):
            for half, tap in enumerate(pair):
                if tap is not None:
                    for j in range(together):
                        both[first[index] + i * together + j, half] = order[begin[index] + tap * together + j]
    rows = table.rows.numpy().copy()
    rows[:, 1] = np.append(first, counts.sum())[rows[:, 0]]
    return replace(
        table, rows=torch.from_numpy(rows), order=torch.from_numpy(both.reshape(-1).astype(np.int32))
    )
