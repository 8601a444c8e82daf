"""Wgrad with code for each tap pattern: sums of the taps of a kernel, over tiles of positions."""

from __future__ import annotations

from typing import NamedTuple

from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import RegionKind, TileKind
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import write_copy
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code, among

_CHAINS = 8
"""Sums that are built side by side: a multiply-add takes several cycles, and more than one starts in each."""
_PAIR_CHAINS = 12
"""As many of pairs: two of them start in a cycle, and each takes six."""
_PARAMETERS = (
    "const cell *restrict x, const cell *restrict gy, long images, real *restrict out, "
    "const ENTRY *restrict e, const ENTRY *end, ahead_t *next_x, ahead_t *next_gy"
)


def write(code: Code, g: Generator) -> None:
    """One function for each kind of region, and what calls them; ``wgrad.h`` goes through the regions."""
    code.include("shared/wgrad.h")
    g.write_copy(code)
    starts = [region[0].start for region in g.columns.regions]
    sizes = [sum(t.size for t in region) for region in g.columns.regions]
    patch = g.patch_rows * g.patch_columns
    steps = g.patch_columns, patch, g.results * patch
    write_copy(
        code, "gradients", steps, list(zip(starts, sizes, strict=True)), g.columns.direction.length, g.apart
    )
    kinds = [
        (row_kind, rows, column_kind, columns)
        for row_kind, rows in g.rows.region_kinds().items()
        for column_kind, columns in g.columns.region_kinds().items()
    ]
    for number, (row_kind, _, column_kind, _) in enumerate(kinds):
        _region(code, g, number, row_kind, column_kind)
    code(f"INLINE void compute_region({_PARAMETERS}, int rr, int rc) {{")
    for number, (_, rows, _, columns) in enumerate(kinds):
        call = f"region_{number}(x, gy, images, out, e, end, next_x, next_gy);"
        code(f"if ({among('rr', rows)} && {among('rc', columns)}) {call}")
    code("}")
    code.include("patterns/wgrad.h")


def _region(code: Code, g: Generator, number: int, rows: RegionKind, columns: RegionKind) -> None:
    code(f"NOINLINE void region_{number}({_PARAMETERS}) {{")
    code("const long kernels = max64((end - e) / 3, 1);")
    if g.images == 1:
        code("images = 1;")
    code("const int share_x = next_x->left / kernels + 1, share_gy = next_gy->left / kernels + 1;")
    code("for (; e != end; e += 3) {")
    code("fetch(next_x, share_x, WIN_W);")
    code("fetch(next_gy, share_gy, PATCH_W);")
    code("const cell *xc = x + e[0] * WIN, *gc = gy + e[1] * PATCH;")
    code("switch (e[2]) {")
    for case, taps in enumerate(g.tap_patterns):
        code(f"case {case}: {{  // taps {', '.join(map(str, taps))}")
        _kernel(code, g, taps, rows, columns)
        code("break;")
        code("}")
    code("default: __builtin_unreachable();")
    code("}\n}\n}")


def _kernel(code: Code, g: Generator, taps: Taps, rows: RegionKind, columns: RegionKind) -> None:
    count = len(taps) * g.filters_per_tile
    chains = max(1, (_PAIR_CHAINS if g.operands["PAIRS"] == "IMAGES" else _CHAINS) // count)
    names = [[f"s{i}_{c}" for c in range(chains)] for i in range(count)]
    code(f"sums_t {', '.join(f'{one} = {{0}}' for group in names for one in group)};")
    code("for (long n = 0; n < images; ++n) {")
    code("const cell *xi = xc + n * (SOURCES * WIN), *gi = gc + n * (RESULTS * PATCH);")
    for row in _runs(rows):
        for column in _runs(columns):
            _tiles(code, g, taps, row, column, names)
    code("}")
    sums = [" + ".join(group) for group in names]
    whole = count - count % 4
    for first in range(0, whole, 4):
        code(f"ADD_LANE_SUMS4(out + {first}, {', '.join(sums[first : first + 4])});")
    for i in range(whole, count):
        code(f"out[{i}] += LANE_SUM({sums[i]});")
    code(f"out += {count};")


def _tiles(code: Code, g: Generator, taps: Taps, row: _Run, column: _Run, sums: list[list[str]]) -> None:
    """A loop over tiles of one kind. The output's gradient stays in registers, each input is loaded once."""
    code(f"for (int i = 0; i < {row.tiles}; ++i) {{")
    code(f"for (int j = 0; j < {column.tiles}; ++j) {{")
    first = row.window * g.columns.buffer + column.window
    code(
        f"const cell *p = xi + {first} + i * {row.window_step * g.columns.buffer} + j * {column.window_step};"
    )
    code(f"const cell *q = gi + ({row.start} + i * {row.start_step}) * PATCH_W;")
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
    code("}\n}")


class _Run(NamedTuple):
    """Neighboring tiles of one kind: how many, where they begin, how far they lie apart."""

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
