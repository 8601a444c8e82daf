"""Forward and gradient of the input with code for tap sets: the walk over tiles, and sums in registers.

Sums of a tile of positions are in registers over all kernels of a filter; `cache_blocked` keeps them in L1.
"""

from __future__ import annotations

from collections.abc import Hashable

from clicktrain.kernels.sparse_conv2d.blocked.patterns import cache_blocked
from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import TileKind
from clicktrain.kernels.sparse_conv2d.blocked.shared import schedule, statistics
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import Code, among, store_tile


def write(code: Code, g: Generator, sums: bool = False) -> None:
    """One function for each kind of tile, and ``run``, which walks over regions and their tiles.

    With ``sums`` mean and variance of each filter's results are taken on the way.
    """
    extra = ", &ready" if g.sweeps else ""
    extra += statistics.TILE_ARGUMENTS if sums else ""
    if g.sweeps:
        cache_blocked.support(code, g, sums)
    written: dict[Hashable, str] = {}
    for a, row in enumerate(g.rows.kinds):
        for b, column in enumerate(g.columns.kinds):
            if g.sweeps:
                cache_blocked.write_tile(code, g, f"tile_{a}_{b}", row, column, sums, written)
            else:
                _tile(code, g, f"tile_{a}_{b}", row, column, sums)
    statistics.open_run(code, g.entry, sums)
    code("(void)scratch;")
    groups = g.blocks * g.passes * len(g.tap_patterns) if g.sweeps else g.results // g.filters_per_tile
    code(f"if (order && rows[{2 * groups + 1}] != count) return 1;")
    if g.sweeps:
        schedule.open_shares(code, g.results, g.block, cache_blocked.order_weights(g))
    else:
        schedule.open_shares(code, g.results, g.filters_per_tile)
    code("vec *sums = scratch + me * SCRATCH;")
    code(f"cell *buffer = (cell *)(sums + {g.sum_vectors});")
    code("(void)sums; (void)buffer;")
    if g.sweeps:
        code("ready_t ready = {0};")
    if sums:
        statistics.open_sums(code)
    span = ("ROW_FIRST[{0}rr]", "ROW_SPAN[{0}rr]", "COL_FIRST[{0}rc]", "COL_SPAN[{0}rc]")
    schedule.open_regions(code, g.windows, span)
    if sums:
        statistics.open_region(code)
    for row_kind, rows in g.rows.region_kinds().items():
        for column_kind, columns in g.columns.region_kinds().items():
            code(f"if ({among('rr', rows)} && {among('rc', columns)}) {{")
            for row, y, down in row_kind:
                for column, x, right in column_kind:
                    name = f"tile_{g.rows.kinds.index(row)}_{g.columns.kinds.index(column)}"
                    code(
                        f"{name}(window + {y * g.columns.buffer + x}, "
                        f"to + (ROW_START[rr] + {down}) * DST_W + COL_START[rc] + {right}, "
                        f"{'sums, ' if g.sweeps else ''}values, bias, rows, entries, first, end, "
                        f"stream, &ahead{extra});"
                    )
                    if sums:
                        code("fresh = 0;")
            code("}")
    if g.sweeps:
        code("if (ready.left) ready.store(&ready, ready.left);")
    if sums:
        statistics.close_region(code, "ROW_SIZE[rr] * COL_SIZE[rc]")
    schedule.close_regions(code)
    if sums:
        statistics.close_sums(code)
    code("}")
    code("return 0;")
    code("}")


def _tile(code: Code, g: Generator, name: str, row: TileKind, column: TileKind, moments: bool) -> None:
    """All filters of one tile of positions."""
    positions = row.size * column.size
    sums = [[f"a{k}_{i}" for i in range(positions)] for k in range(g.filters_per_tile)]
    steps = max(g.rows.region_tiles * g.columns.region_tiles * (g.results // g.filters_per_tile), 1)
    code(
        f"static __attribute__((noinline)) void {name}(const cell *restrict x, stored *restrict y, "
        "const weight *restrict values, const real *restrict bias, const int32_t *restrict rows, "
        f"const {g.entry} *restrict entries, long first, long end, int64_t stream, ahead_t *ahead"
        f"{statistics.TILE_PARAMETERS if moments else ''}) {{"
    )
    code(f"const weight *v = values + rows[2 * (first / {g.filters_per_tile}) + 1];")
    code(f"for (long f = first / {g.filters_per_tile}; f < end / {g.filters_per_tile}; ++f) {{")
    code(f"fetch(ahead, {-(-g.sources * g.rows.buffer // steps)}, WIN_W);")
    for k in range(g.filters_per_tile):
        code(f"const vec start{k} = splat(bias ? bias[f * {g.filters_per_tile} + {k}] : 0);")
        code(f"vec {', '.join(f'{one} = start{k}' for one in sums[k])};")
    code(f"const {g.entry} *e = entries + 2L * rows[2 * f], *stop = entries + 2L * rows[2 * f + 2];")
    code("for (; e != stop; e += 2) {")
    code("const cell *p = x + e[0] * WIN;")
    code("switch (e[1]) {")
    for number, taps in enumerate(g.tap_patterns):
        code(f"case {number}: {{")
        code("cell t;")
        for t in range(len(taps)):
            for k in range(g.filters_per_tile):
                code(f"const vec w{t}_{k} = splat(v[{t * g.filters_per_tile + k}]);")
        last = -1
        for position, window, tap in g.triples(taps, row, column):
            if window != last:
                code(f"t = p[{window}]; KEEP(t);")
                last = window
            for k in range(g.filters_per_tile):
                code(f"{sums[k][position]} += t * w{tap}_{k};")
        code(f"v += {len(taps) * g.filters_per_tile};")
        code("break;")
        code("}")
    code("default: __builtin_unreachable();")
    code("}")
    code("}")
    for k in range(g.filters_per_tile):
        store_tile(
            code, f"y + (f * {g.filters_per_tile} + {k}) * (DST_H * DST_W)", sums[k], row.size, column.size
        )
        if moments:
            statistics.add_tile(code, f"f * {g.filters_per_tile} + {k}", sums[k])
    code("}")
    code("}")
