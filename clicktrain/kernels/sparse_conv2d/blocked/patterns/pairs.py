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


def uses(
    taps: Taps, pairs: Sequence[Pair], row: TileKind, column: TileKind, rows: AxisRegions, columns: AxisRegions, apart: int
) -> list[Use]:
    """All pairs of a pattern on all positions of a tile, but those that read nothing."""

    def column_of(tap: int, j: int) -> int | None:
        """As `reads`, but also of columns that lie in the padding."""
        x = columns.direction.reads(j, taps[tap] % columns.direction.axis.taps)
        return None if x is None else x - column.low

    result = []
    for i in range(row.size):
        for j in range(column.size):
            for number, pair in enumerate(pairs):
                halves: list[Place | None] = [None, None]
                inside = False
                for half, tap in enumerate(pair):
                    if tap is None:
                        continue
                    y, x = rows.reads(row, i, taps[tap] // columns.direction.axis.taps), column_of(tap, j)
                    if y is not None and x is not None:
                        halves[half] = y, x - half * apart
                        inside |= columns.reads(column, j, taps[tap] % columns.direction.axis.taps) is not None
                low, high = halves
                if pair[1] is None:
                    high = low  # it has no weight
                elif low != high:
                    # Halves of their own: what lies in the padding is left out.
                    low, high = (
                        None if half is None or not _inside(half[1] + number * apart, column) else half
                        for number, half in enumerate((low, high))
                    )
                if inside and (low is not None or high is not None):
                    result.append(Use(i * column.size + j, number, low, high))
    return result


def _inside(x: int, column: TileKind) -> bool:
    return 0 <= x < column.extent - column.high - column.low


@functools.cache
def pair_taps(taps: Taps, phase: Phase, problem: ConvProblem) -> tuple[Pair, ...]:
    """Cut a pattern into pairs: into those with the fewest instructions, and among them the fewest loads."""
    direction = Backward if phase == "dgrad" else Forward
    rows, columns = (AxisRegions(axis, axis.length, 1) for axis in map(direction, (problem.rows, problem.columns)))
    kinds = [TileKind(_TILE * axis.direction.step, 0, 0, _INSIDE) for axis in (rows, columns)]

    @functools.cache
    def cost(pair: Pair) -> tuple[int, int]:
        found = uses(taps, [pair], kinds[0], kinds[1], rows, columns, distance(phase, problem))
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
    return replace(table, rows=torch.from_numpy(rows), order=torch.from_numpy(both.reshape(-1).astype(np.int32)))
