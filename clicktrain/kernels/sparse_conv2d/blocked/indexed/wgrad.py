"""Gradient of the weight with offsets of taps as data: see `generator`.

The weights of one filter are taken a few at a time: they share each load of the output's gradient, wherever
in their kernels they lie. Filter after filter within a pass of a few channels, whose windows stay in the
first-level cache. On small images a region holds several blocks of images, so that the sums over lanes, once
a region and weight, stay few.
"""

from __future__ import annotations

from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import IndexedGenerator
from clicktrain.kernels.sparse_conv2d.blocked.shared import window_copy
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import (
    CHUNK,
    Code,
    add_threads,
    locate,
    open_threads,
    open_weights,
)

UNIT = 4
"""Weights of a filter that are computed together; offsets are filled up to a multiple."""
_CHAINS = 3
"""Sums of each of them that are built side by side."""


def write(code: Code, g: IndexedGenerator) -> None:
    """The function of one region, and ``run``, which shares regions and runs of weights out to threads."""
    code(f"#define PATCH_H {g.rows.positions}L")
    code(f"#define PATCH_W {g.columns.positions}L")
    code(f"#define PATCHES {g.patch * g.images}L")
    columns = tuple((n * g.columns.positions, g.columns.positions) for n in range(g.columns.regions))
    width = g.columns.direction.length
    window_copy.gradients(g.patch, g.columns.positions, columns, width, g.images).write(code)
    _region(code, g)
    open_weights(code, "uint16_t")
    code(f"const int64_t sets = (blocks + {g.images - 1}) / {g.images};")
    code("const int64_t items = sets * REGION_ROWS * REGION_COLS * parts;")
    open_threads(code)
    code("cell *buffer = (cell *)(scratch + me * own);")
    code("real *sums = (real *)(scratch + me * own + SCRATCH);")
    code("memset(sums, 0, nnz * sizeof(real));")
    code("copy_t next_x = {0}, next_gy = {0};")
    code("int64_t packed = -1;")
    code("const int64_t last = items * (me + 1) / all;")
    code("for (int64_t item = items * me / all; item < last; ++item) {")
    code("const int64_t region = item / parts, part = item % parts;")
    code(f"cell *window = buffer + region % {g.buffers} * (SOURCES * WIN + RESULTS * PATCHES);")
    code("cell *patch = window + SOURCES * WIN;")
    code("if (region != packed) {")
    code(f"if (packed < 0 || {g.buffers} == 1) {{")
    _begin_copies(code, g, "region", "window", "patch")
    code("}")
    code("copy_windows(&next_x, next_x.left);")
    code("copy_gradients(&next_gy, next_gy.left);")
    code("packed = region;")
    if g.buffers > 1:
        code("if ((region + 1) * parts < last) {")
        code("cell *other = buffer + (region + 1) % 2 * (SOURCES * WIN + RESULTS * PATCHES);")
        _begin_copies(code, g, "region + 1", "other", "other + SOURCES * WIN")
        code("}")
    code("}")
    code(f"const int64_t begin = region / (REGION_ROWS * REGION_COLS) * {g.images};")
    code(CHUNK)
    code("region_sums(window, patch, sums, entries, rows + 5 * chunk[0], rows + 5 * stop[1],")
    code(f"  min64({g.images}, blocks - begin), parts - part, &next_x, &next_gy);")
    code("}")
    add_threads(code)
    code("}")
    code("return 0;")
    code("}")


def _begin_copies(code: Code, g: IndexedGenerator, region: str, window: str, patch: str) -> None:
    """Begin to copy a region's windows and output gradient; zero outside of the latter."""
    code("{")
    locate(code, region)
    code(f"const int64_t begin = b * {g.images}, images = min64({g.images}, blocks - begin);")
    code(
        f"next_x = windows_of(x + begin * SOURCES * SRC_H * SRC_W, {window}, images, "
        "ROW_FIRST(rr), WIN_H, COL_FIRST(rc), WIN_W);"
    )
    code(
        f"next_gy = gradients_of(gy + begin * RESULTS * DST_H * DST_W, {patch}, images, "
        "rr * PATCH_H, PATCH_H, rc * PATCH_W, PATCH_W);"
    )
    code("}")


def _region(code: Code, g: IndexedGenerator) -> None:
    """All weights of some runs (filters in a pass) over one region."""
    tile = g.columns.tile
    sums = [[f"s{u}_{c}" for c in range(_CHAINS)] for u in range(UNIT)]
    code(
        "static __attribute__((noinline)) void region_sums(const cell *restrict x, const cell *restrict gy, "
        "real *restrict sums, const uint16_t *restrict entries, const int32_t *restrict rows, "
        "const int32_t *end, int64_t images, int64_t parts, "
        "copy_t *next_x, copy_t *next_gy) {"
    )
    code("const long runs = max64((end - rows) / 5 * parts, 1);")
    code("const long share_x = next_x->left / runs + 1, share_gy = next_gy->left / runs + 1;")
    code("for (; rows != end; rows += 5) {")
    code("if (next_x->left) copy_windows(next_x, share_x);")
    code("if (next_gy->left) copy_gradients(next_gy, share_gy);")
    code("const uint16_t *e = entries + rows[0];")
    code("const cell *const q = gy + rows[1] * PATCHES, *const w = x + rows[2];")
    code("real *out = sums + rows[3];")
    code(f"for (long left = rows[4]; left > 0; left -= {UNIT}, e += {UNIT}, out += {UNIT}) {{")
    code("const cell " + ", ".join(f"*p{u} = w + e[{u}]" for u in range(UNIT)) + ";")
    code("const cell *d = q;")
    code(f"sums_t {', '.join(f'{one} = {{0}}' for chains in sums for one in chains)};")
    code("for (long n = 0; n < images; ++n) {")
    code("for (long i = 0; i < PATCH_H; ++i) {")
    code(f"for (long j = 0; j < {g.columns.positions // tile}; ++j) {{")
    for t in range(tile):
        code("{")
        code(f"cell g = d[{t}]; KEEP(g);")
        for u in range(UNIT):
            code(f"MULTIPLY_ADD({sums[u][t % _CHAINS]}, g, p{u}[{t * g.columns.reach}]);")
        code("}")
    code(f"d += {tile};")
    code(" ".join(f"p{u} += {tile * g.columns.reach};" for u in range(UNIT)))
    code("}")
    row = g.rows.reach * g.columns.buffer - g.columns.positions * g.columns.reach
    code(" ".join(f"p{u} += {row};" for u in range(UNIT)))
    code("}")
    image = g.window - g.rows.positions * g.rows.reach * g.columns.buffer
    code(" ".join(f"p{u} += {image};" for u in range(UNIT)))
    code("}")
    totals = [" + ".join(chains) for chains in sums]
    code(f"if (left >= {UNIT}) {{")
    code(f"ADD_LANE_SUMS4(out, {', '.join(totals)});")
    code("} else {")
    code(f"real some[{UNIT}] = {{0}};")
    code(f"ADD_LANE_SUMS4(some, {', '.join(totals)});")
    code("for (long u = 0; u < left; ++u) out[u] += some[u];")
    code("}")
    code("}")
    code("}")
    code("}")
