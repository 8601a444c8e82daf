"""Forward and dgrad with code for each tap pattern: tiles, and their sums in registers.

Sums of a tile of positions are in registers over all kernels of a filter; `cache_blocked` keeps them in L1.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from clicktrain.kernels.sparse_conv2d.blocked.patterns import cache_blocked
from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.pairs import REGISTERS, Place, Use, schedule
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import TileKind
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code, add_moments, among, store_tile


def write(code: Code, g: Generator, sums: bool) -> None:
    """One function for each kind of tile, and what calls them for each kind of region.

    With ``sums`` mean and variance of each filter's results are computed on the way.
    """
    code.include("shared/schedule.h")
    g.write_copy(code)
    written: dict[Hashable, str] = {}
    if not g.cache_blocked:
        labels = [f"&&taps_{number}" for number in range(len(g.tap_patterns))]
        code(f"#define LABELS {', '.join([*labels, '&&done'])}")
        code.include("patterns/jumps.h")
    if g.cache_blocked and g.in_place:
        code("NOINLINE void fetch_windows(ahead_t *ahead, int count) {")
        code(f"fetch(ahead, count, {g.columns.span_most});")
        code("}")
    for a, row in enumerate(g.rows.kinds):
        for b, column in enumerate(g.columns.kinds):
            if g.cache_blocked:
                cache_blocked.write_tile(code, g, f"tile_{a}_{b}", row, column, sums, written)
            else:
                _tile(code, g, f"tile_{a}_{b}", row, column, sums)
    code("INLINE void compute_region(const cell *window, stored *to, int rr, int rc, work_t *work) {")
    for row_kind, rows in g.rows.region_kinds().items():
        for column_kind, columns in g.columns.region_kinds().items():
            code(f"if ({among('rr', rows)} && {among('rc', columns)}) {{")
            for row, y, down in row_kind:
                for column, x, right in column_kind:
                    name = f"tile_{g.rows.kinds.index(row)}_{g.columns.kinds.index(column)}"
                    to = f"to + (ROW_START[rr] + {down}) * DST_W + COL_START[rc] + {right}"
                    code(f"{name}(window + {y * g.columns.buffer + x}, {to}, work);")
                    if sums:
                        code("work->statistics.fresh = 0;")
            code("}")
    code("}")
    cache_blocked.order_weights(code, g)
    code.include("shared/run.h")


def _tile(code: Code, g: Generator, name: str, row: TileKind, column: TileKind, moments: bool) -> None:
    positions, filters = row.size * column.size, g.filters_per_tile
    groups = g.results // filters
    sums = [[f"a{k}_{i}" for i in range(positions)] for k in range(filters)]
    every = [one for group in sums for one in group]
    steps = max(g.rows.region_tiles * g.columns.region_tiles * groups * g.passes, 1)
    open_tile(code, g, name, moments)
    code(f"for (long pass = 0; pass < {g.passes}; ++pass, rows += {2 * groups}) {{")
    code(f"const weight *v = work->values + rows[2 * (work->first / {filters}) + 1];")
    code(f"for (long f = work->first / {filters}, end = work->end / {filters}; f < end; ++f) {{")
    code(f"fetch(&work->ahead, {-(-g.sources * g.rows.buffer // steps)}, WIN_W);")
    if g.passes > 2:
        code(f"if (pass > 0 && pass < {g.passes - 1} && rows[2 * f] == rows[2 * f + 2]) continue;")
    code(f"vec {', '.join(every)}, *kept = work->sums + f * {len(every)};")
    code("if (pass > 0) {")
    for number, one in enumerate(every):
        code(f"{one} = kept[{number}];")
    code("} else {")
    for k in range(filters):
        code(f"const vec start{k} = splat(bias ? bias[f * {filters} + {k}] : 0);")
        code(" ".join(f"{one} = start{k};" for one in sums[k]))
    code("}")
    _kernels(code, g, row, column, sums)
    code(f"if (pass < {g.passes - 1}) {{")
    for number, one in enumerate(every):
        code(f"kept[{number}] = {one};")
    code("continue;")
    code("}")
    for k in range(filters):
        code("{")
        store_tile(code, f"y + (f * {filters} + {k}) * (DST_H * DST_W)", sums[k], column.size)
        code("}")
        if moments:
            add_moments(code, f"f * {filters} + {k}", sums[k])
    code("}\n}\n}")


def _kernels(code: Code, g: Generator, row: TileKind, column: TileKind, sums: list[list[str]]) -> None:
    """All kernels of a filter, see ``jumps.h``."""
    code("const ENTRY *e = entries + 2L * rows[2 * f], *stop = entries + 2L * rows[2 * f + 2];")
    code(f"static const ENTRY none[] = {{0, {len(g.tap_patterns)}}};")
    code("BEGIN_KERNELS")
    for number, taps in enumerate(g.tap_patterns):
        code(f"KERNEL({number}): {{  // {', '.join(map(str, taps))}")
        code("const cell *p = x + e[0] * WIN;")
        code("e += 2;")
        code("FIND_NEXT")
        if g.multiplies_pairs:
            _write_pairs(code, g, number, row, column, sums)
        else:
            _write_taps(code, g, taps, row, column, sums)
        code(f"v += {g.weights_of(number) * g.filters_per_tile};")
        code("JUMP")
        code("}")
    code("END_KERNELS")


def _write_taps(
    code: Code, g: Generator, taps: Taps, row: TileKind, column: TileKind, sums: list[list[str]]
) -> None:
    """Multiply-adds of one kernel, window after window."""
    filters = range(g.filters_per_tile)
    code("cell t;")
    triples = list(g.triples(taps, row, column))
    for t in sorted({tap for _, _, tap in triples}):
        for k in filters:
            code(f"const vec w{t}_{k} = splat(v[{t * g.filters_per_tile + k}]);")
    last = -1
    for position, window, tap in triples:
        if window != last:
            code(f"t = p[{window}]; KEEP(t);")
            last = window
        for k in filters:
            code(f"{sums[k][position]} += t * w{tap}_{k};")


def _write_pairs(
    code: Code, g: Generator, number: int, row: TileKind, column: TileKind, sums: list[list[str]]
) -> None:
    """The same with pairs: one of them at a time on one position of the tile."""
    filters = range(g.filters_per_tile)
    found = g.uses(number, row, column)
    pairs = sorted({use.pair for use in found})
    for pair in pairs:
        for k in filters:
            code(f"const cell w{pair}_{k} = all_lanes(v[{pair * g.filters_per_tile + k}]);")
    room = REGISTERS - row.size * column.size * len(filters) - len(pairs) * len(filters) - 2
    names: dict[Place, str] = {}
    unused = (f"t{i}" for i in itertools.count())
    for step in schedule(found, room, column.size):
        if not isinstance(step, Use):
            names[step] = next(unused)
            code(f"cell {names[step]} = p[{g.place(step)}]; KEEP({names[step]});")
            continue
        low, high = (None if half is None else names[half] for half in (step.low, step.high))
        operand = low if low == high else f"blend({low or '(cell){0}'}, {high or '(cell){0}'})"
        if len(filters) > 1 and low != high:
            code(f"{{ const cell both = {operand};")
            operand = "both"
        for k in filters:
            code(f"MULTIPLY_ADD({sums[k][step.position]}, w{step.pair}_{k}, {operand});")
        if operand == "both":
            code("}")


def open_tile(code: Code, g: Generator, name: str, moments: bool) -> None:
    """Begin the function of a kind of tile."""
    code(f"NOINLINE void {name}(const cell *restrict x, stored *restrict y, work_t *work) {{")
    code("const real *restrict bias = work->bias;")
    code("const int32_t *restrict rows = work->rows;")
    code("const ENTRY *restrict entries = work->entries;")
    code("const int64_t stream = work->stream;")
    if moments:
        code("vec *restrict moments = work->statistics.moments;")
        code("real *restrict centers = work->statistics.centers;")
        code("const int fresh = work->statistics.fresh;")
