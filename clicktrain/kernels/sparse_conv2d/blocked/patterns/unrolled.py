"""Forward and dgrad with code for each tap pattern: tiles, and their sums in registers.

Sums of a tile of positions are in registers over all kernels of a filter; `cache_blocked` keeps them in L1.
"""

from __future__ import annotations

from collections.abc import Hashable

from clicktrain.kernels.sparse_conv2d.blocked.patterns import cache_blocked
from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import TileKind
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code, add_moments, among, store_tile


def write(code: Code, g: Generator, sums: bool) -> None:
    """One function for each kind of tile, and what calls them for each kind of region.

    With ``sums`` mean and variance of each filter's results are computed on the way.
    """
    code.include("shared/schedule.h")
    g.write_copy(code)
    written: dict[Hashable, str] = {}
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
    sums = [[f"a{k}_{i}" for i in range(positions)] for k in range(filters)]
    steps = max(g.rows.region_tiles * g.columns.region_tiles * (g.results // filters), 1)
    open_tile(code, g, name, moments)
    code(f"const weight *v = work->values + rows[2 * (work->first / {filters}) + 1];")
    code(f"for (long f = work->first / {filters}, end = work->end / {filters}; f < end; ++f) {{")
    code(f"fetch(&work->ahead, {-(-g.sources * g.rows.buffer // steps)}, WIN_W);")
    for k in range(filters):
        code(f"const vec start{k} = splat(bias ? bias[f * {filters} + {k}] : 0);")
        code(f"vec {', '.join(f'{one} = start{k}' for one in sums[k])};")
    code("const ENTRY *e = entries + 2L * rows[2 * f], *stop = entries + 2L * rows[2 * f + 2];")
    code("for (; e != stop; e += 2) {")
    code("const cell *p = x + e[0] * WIN;")
    code("switch (e[1]) {")
    for number, taps in enumerate(g.tap_patterns):
        code(f"case {number}: {{  // taps {', '.join(map(str, taps))}")
        code("cell t;")
        triples = list(g.triples(taps, row, column))
        for t in sorted({tap for _, _, tap in triples}):
            for k in range(filters):
                code(f"const vec w{t}_{k} = splat(v[{t * filters + k}]);")
        last = -1
        for position, window, tap in triples:
            if window != last:
                code(f"t = p[{window}]; KEEP(t);")
                last = window
            for k in range(filters):
                code(f"{sums[k][position]} += t * w{tap}_{k};")
        code(f"v += {len(taps) * filters};")
        code("break;")
        code("}")
    code("default: __builtin_unreachable();")
    code("}\n}")
    for k in range(filters):
        code("{")
        store_tile(code, f"y + (f * {filters} + {k}) * (DST_H * DST_W)", sums[k], column.size)
        code("}")
        if moments:
            add_moments(code, f"f * {filters} + {k}", sums[k])
    code("}\n}")


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
