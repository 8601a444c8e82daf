"""Gradient of the weight at the kept positions: sums of the taps of a kernel, over tiles of positions."""

from __future__ import annotations

from typing import NamedTuple

from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import RegionKind, TileKind
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.shared import window_copy
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import (
    CHUNK,
    Code,
    add_threads,
    among,
    locate,
    open_threads,
    open_weights,
)

_CHAINS = 8
"""Sums that are built side by side: a multiply-add takes several cycles, and more than one starts in each."""


def write(code: Code, g: Generator) -> None:
    """One function for each kind of region, and ``run``, which shares regions and kernels out to threads.

    Each thread sums into its own array; the arrays are added at the end. Few regions (small images, few of
    them) are shared out by chunks of the kernels instead: packing twice is cheaper than idle threads.
    """
    kinds = [
        (row_kind, rows, column_kind, columns)
        for row_kind, rows in g.rows.region_kinds().items()
        for column_kind, columns in g.columns.region_kinds().items()
    ]
    if not g.patch_in_place:
        starts = [region[0].start for region in g.columns.regions]
        sizes = [sum(t.size for t in region) for region in g.columns.regions]
        spans = tuple(zip(starts, sizes, strict=True))
        patch = g.patch_rows * g.patch_columns
        window_copy.gradients(patch, g.patch_columns, spans, g.columns.direction.length).write(code)
    for number, (row_kind, _, column_kind, _) in enumerate(kinds):
        _region(code, g, number, row_kind, column_kind)
    open_weights(code, g.entry)
    code("const int64_t items = blocks * REGION_ROWS * REGION_COLS * parts;")
    open_threads(code)
    code("cell *buffer = (cell *)(scratch + me * own);")
    code("real *sums = (real *)(scratch + me * own + SCRATCH);")
    code("memset(sums, 0, nnz * sizeof(real));")
    code("int64_t packed = -1;")
    code("const int64_t last = items * (me + 1) / all;")
    code("for (int64_t item = items * me / all; item < last; ++item) {")
    code("const int64_t region = item / parts, part = item % parts;")
    locate(code, "region")
    code("const stored *from = x + b * SOURCES * SRC_H * SRC_W, *other = gy + b * RESULTS * DST_H * DST_W;")
    _pack(code, g)
    code(CHUNK)
    code(f"const {g.entry} *e = entries + 3 * chunk[0], *end = entries + 3 * stop[1];")
    code("real *to = sums + chunk[2];")
    for number, (_, rows, _, columns) in enumerate(kinds):
        code(f"if ({among('rr', rows)} && {among('rc', columns)})")
        code(f"  region_{number}(window, patch, to, e, end, &next_x, &next_gy);")
    code("}")
    add_threads(code)
    code("}")
    code("return 0;")
    code("}")


def _pack(code: Code, g: Generator) -> None:
    """Copy the windows and the output's gradient of a region, unless they can be read where they are."""
    code(f"const cell *window = {'from' if g.in_place else 'buffer'};")
    code(f"const cell *patch = {'other' if g.patch_in_place else f'buffer + {g.window_vectors}L'};")
    code("(void)from; (void)other;")
    if not g.in_place:
        code("if (region != packed) {")
        code(
            "copy_t rows = windows_of(from, buffer, 1, "
            "ROW_FIRST[rr], ROW_SPAN[rr], COL_FIRST[rc], COL_SPAN[rc]);"
        )
        code("copy_windows(&rows, rows.left);")
        code("}")
    if not g.patch_in_place:
        code("if (region != packed) {")
        code(
            f"copy_t rows = gradients_of(other, buffer + {g.window_vectors}L, 1, "
            "ROW_START[rr], ROW_SIZE[rr], COL_START[rc], COL_SIZE[rc]);"
        )
        code("copy_gradients(&rows, rows.left);")
        code("}")
    code("packed = region;")
    code("ahead_t next_x = {0}, next_gy = {0};")
    code("if (item + 1 < last && (item + 1) / parts != region) {")
    locate(code, "region + 1", "n")
    if not g.in_place:
        code(
            "next_x = look(x + nb * SOURCES * SRC_H * SRC_W, SOURCES, SRC_H, SRC_W, "
            "ROW_FIRST[nrr], ROW_SPAN[nrr], COL_FIRST[nrc], COL_SPAN[nrc]);"
        )
    if not g.patch_in_place:
        code(
            "next_gy = look(gy + nb * RESULTS * DST_H * DST_W, RESULTS, DST_H, DST_W, "
            "ROW_START[nrr], ROW_SIZE[nrr], COL_START[nrc], COL_SIZE[nrc]);"
        )
    code("}")


def _region(code: Code, g: Generator, number: int, rows: RegionKind, columns: RegionKind) -> None:
    """All kernels of one region."""
    code(
        f"static __attribute__((noinline)) void region_{number}(const cell *restrict x, "
        f"const cell *restrict gy, real *restrict out, const {g.entry} *restrict e, "
        f"const {g.entry} *end, ahead_t *next_x, ahead_t *next_gy) {{"
    )
    code("const long kernels = max64((end - e) / 3, 1);")
    code("const int share_x = next_x->left / kernels + 1, share_gy = next_gy->left / kernels + 1;")
    code("for (; e != end; e += 3) {")
    code("fetch(next_x, share_x, WIN_W);")
    code("fetch(next_gy, share_gy, PATCH_W);")
    code("const cell *xc = x + e[0] * WIN, *gc = gy + e[1] * PATCH;")
    code("switch (e[2]) {")
    for case, taps in enumerate(g.tap_patterns):
        code(f"case {case}: {{")
        _kernel(code, g, taps, rows, columns)
        code("break;")
        code("}")
    code("default: __builtin_unreachable();")
    code("}")
    code("}")
    code("}")


def _kernel(code: Code, g: Generator, taps: Taps, rows: RegionKind, columns: RegionKind) -> None:
    """The sums of one kernel's taps over a region."""
    count = len(taps) * g.filters_per_tile
    chains = max(1, _CHAINS // count)
    names = [[f"s{i}_{c}" for c in range(chains)] for i in range(count)]
    code(f"sums_t {', '.join(f'{one} = {{0}}' for group in names for one in group)};")
    for row in _runs(rows):
        for column in _runs(columns):
            _tiles(code, g, taps, row, column, names)
    sums = [" + ".join(group) for group in names]
    whole = count - count % 4
    for first in range(0, whole, 4):
        code(f"ADD_LANE_SUMS4(out + {first}, {', '.join(sums[first : first + 4])});")
    for i in range(whole, count):
        code(f"out[{i}] += LANE_SUM({sums[i]});")
    code(f"out += {count};")


def _tiles(code: Code, g: Generator, taps: Taps, row: _Run, column: _Run, sums: list[list[str]]) -> None:
    """A loop over tiles of one kind. The output's gradient stays in registers, each input is loaded once."""
    code(f"for (int i = 0; i < {row.tiles}; ++i) for (int j = 0; j < {column.tiles}; ++j) {{")
    first = row.window * g.columns.buffer + column.window
    code(
        f"const cell *p = xc + {first} + i * {row.window_step * g.columns.buffer} + j * {column.window_step};"
    )
    code(f"const cell *q = gc + ({row.start} + i * {row.start_step}) * PATCH_W;")
    code(f"q += {column.start} + j * {column.start_step};")
    code("cell t;")
    triples = list(g.triples(taps, row.kind, column.kind))
    for position in sorted({position for position, _, _ in triples}):
        y, x = divmod(position, column.kind.size)
        for k in range(g.filters_per_tile):
            code(f"cell g{k}_{position} = q[{k} * PATCH + {y} * PATCH_W + {x}]; KEEP(g{k}_{position});")
    last = -1
    used = [0] * len(taps)
    for position, window, tap in triples:
        if window != last:
            code(f"t = p[{window}]; KEEP(t);")
            last = window
        for k in range(g.filters_per_tile):
            group = sums[tap * g.filters_per_tile + k]
            code(f"MULTIPLY_ADD({group[used[tap] % len(group)]}, t, g{k}_{position});")
        used[tap] += 1
    code("}")


class _Run(NamedTuple):
    """Neighbouring tiles of one kind: how many, where they begin, how far they lie apart."""

    kind: TileKind
    tiles: int
    window: int
    window_step: int
    start: int
    start_step: int


def _runs(region: RegionKind) -> list[_Run]:
    runs: list[_Run] = []
    for kind, window, start in region:
        if runs and runs[-1].kind == kind:
            last = runs[-1]
            steps = (window - last.window) // last.tiles, (start - last.start) // last.tiles
            runs[-1] = _Run(kind, last.tiles + 1, last.window, steps[0], last.start, steps[1])
        else:
            runs.append(_Run(kind, 1, window, 0, start, 0))
    return runs
