"""Forward and gradient of the input with offsets of taps as data: see `generator`."""

from __future__ import annotations

from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import IndexedGenerator
from clicktrain.kernels.sparse_conv2d.blocked.shared import schedule, statistics
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import Code, store_tile


def write(code: Code, g: IndexedGenerator, sums: bool = False) -> None:
    """The function of one tile, and ``run``, which walks over regions, tiles, strided phases and passes.

    With ``sums`` (forward only) mean and variance of each filter's results are taken on the way.
    """
    _tile(code, g, sums)
    rows, columns = g.rows, g.columns
    statistics.open_run(code, "uint16_t", sums)
    schedule.open_shares(code, g.results, 1)
    code("vec *sums = scratch + me * SCRATCH;")
    code(f"cell *buffer = (cell *)(sums + RESULTS * {rows.tile * columns.tile});")
    code("(void)buffer;")
    if sums:
        statistics.open_sums(code)
    span = ("ROW_FIRST({0}rr)", "WIN_H", "COL_FIRST({0}rc)", "WIN_W")
    schedule.open_regions(code, "in place" if g.in_place else "copied at once", span)
    if sums:
        statistics.open_region(code)
    code(f"for (long ti = 0; ti < {rows.positions // rows.tile}; ++ti)")
    code(f"for (long tj = 0; tj < {columns.positions // columns.tile}; ++tj)")
    code(f"for (long lr = 0; lr < {len(rows.strided_phases)}; ++lr)")
    code(f"for (long lc = 0; lc < {len(columns.strided_phases)}; ++lc) {{")
    code(f"const long i = rr * {rows.positions}L + ti * {rows.tile};")
    code(f"const long j = rc * {columns.positions}L + tj * {columns.tile};")
    code("const long down = ROW_COUNT[lr] - i, right = COL_COUNT[lc] - j;")
    code("if (down <= 0 || right <= 0) continue;")
    code(
        f"const cell *x = window + ti * {rows.tile * rows.reach} * WIN_W "
        f"+ tj * {columns.tile * columns.reach};"
    )
    code(f"stored *y = to + (ROW_START[lr] + i * {rows.step}) * DST_W + COL_START[lc] + j * {columns.step};")
    code(f"const int32_t *n = rows + (lr * {len(columns.strided_phases)} + lc) * {g.passes} * 2 * RESULTS;")
    code(f"for (long p = 0; p < {g.passes}; ++p, n += 2 * RESULTS, x += PASS)")
    code(f"  tile(x, y, sums, values, p ? NULL : bias, n, entries, first, end, p == 0, p == {g.passes - 1},")
    code(f"    down, right, stream, &ahead{statistics.TILE_ARGUMENTS if sums else ''});")
    if sums:
        code("fresh = 0;")
    code("}")
    if sums:
        sizes = [
            f"min64({axis.positions}, {name}_COUNT[0] - {place} * {axis.positions})"
            for axis, name, place in ((rows, "ROW", "rr"), (columns, "COL", "rc"))
        ]
        statistics.close_region(code, " * ".join(sizes))
    schedule.close_regions(code)
    if sums:
        statistics.close_sums(code)
    code("}")
    code("return 0;")
    code("}")


def _tile(code: Code, g: IndexedGenerator, moments: bool) -> None:
    """All results of one tile of positions, over the sources of one pass."""
    height, width = g.rows.tile, g.columns.tile
    places = [(i, j) for i in range(height) for j in range(width)]
    names = [f"a{k}" for k in range(len(places))]
    calls = max(
        (g.rows.positions // height)
        * (g.columns.positions // width)
        * g.strided_phases
        * g.passes
        * g.results,
        1,
    )
    code(
        "static __attribute__((noinline)) void tile(const cell *restrict x, stored *restrict y, "
        "vec *restrict sums, const weight *restrict values, const real *restrict bias, "
        "const int32_t *restrict rows, const uint16_t *restrict entries, long first, long end, int begin, "
        "int last, long down, long right, int64_t stream, "
        f"ahead_t *ahead{statistics.TILE_PARAMETERS if moments else ''}) {{"
    )
    code(f"rows += 2 * first, sums += {len(places)} * first, y += DST_H * DST_W * first;")
    code(f"for (long f = first; f < end; ++f, rows += 2, sums += {len(places)}, y += DST_H * DST_W) {{")
    if not g.in_place:
        code(f"fetch(ahead, {-(-g.sources * g.rows.buffer // calls)}, WIN_W);")
    code(f"vec {', '.join(names)};")
    code("if (begin) {")
    code("const vec start = splat(bias ? bias[f] : 0);")
    code(" ".join(f"{name} = start;" for name in names))
    code("} else {")
    code(" ".join(f"{name} = sums[{k}];" for k, name in enumerate(names)))
    code("}")
    code("const uint16_t *e = entries + rows[0], *stop = entries + rows[2];")
    code("const weight *v = values + rows[1];")
    code("for (; e != stop; ++e, ++v) {")
    code("const cell *p = x + *e;")
    code("const cell w = all_lanes(*v);")
    for (i, j), name in zip(places, names, strict=True):
        code(f"MULTIPLY_ADD({name}, w, p[{i * g.rows.reach} * WIN_W + {j * g.columns.reach}]);")
    code("}")
    code(f"if (last && down >= {height} && right >= {width}) {{")
    store_tile(code, "y", names, height, width, (g.rows.step, g.columns.step))
    if moments:
        statistics.add_tile(code, "f", names)
    code("} else {")
    code(" ".join(f"sums[{k}] = {name};" for k, name in enumerate(names)))
    code("if (last) {")
    if moments:
        statistics.open_tile(code, "f", "sums[0]")
    code(
        f"for (long i = 0; i < {height} && i < down; ++i) for (long j = 0; j < {width} && j < right; ++j) {{"
    )
    code(f"y[i * {g.rows.step} * DST_W + j * {g.columns.step}] = narrow(sums[i * {width} + j]);")
    if moments:
        code(f"const vec d = sums[i * {width} + j] - c;")
        code("m[0] += d; m[1] += d * d;")
    code("}")
    code("}")
    code("}")
    code("}")
    code("}")
