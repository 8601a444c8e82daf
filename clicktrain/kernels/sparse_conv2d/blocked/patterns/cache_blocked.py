"""Forward and dgrad with the sums of many filters' tiles in the caches.

`unrolled` keeps the sums of one tile in registers over all kernels of a filter and jumps to the code of each
kernel's tap pattern; with 16 registers the tile is small, its windows overlap, and they are too many for L1.
Here the sums of a *block* of results lie in the caches instead, beside the windows of a *pass* of so few
sources that they stay in L1. All kernels of a block and a pass that have the same tap pattern are one loop
without a jump. It goes over the tile once: a window position is loaded once for all taps, a sum is loaded
before its first tap and stored after its last, so only the sums of a column (or row) and its neighbors are in
registers, and the tile need not fit them. Of four taps on a tile of 4x4, 64 multiply-adds come with 45 to 56
loads and 16 stores. It wants kernels of several taps, and few patterns.

Windows are read from the source itself where activations have the computed dtype: a copy of a region goes
through L2 twice and costs up to a tenth of the multiply-adds. Tiles at the edges of the image then have code
that leaves out the padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import TileKind
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code, add_moments, store_tile


def order_weights(code: Code, g: Generator) -> None:
    """The function that brings a thread's share of the weights into their order (see ``run.h``).

    Of cache-blocked code ``order`` may have the place of each kernel's first weight only.
    """
    parameters = (
        "const int32_t *order, const int32_t *rows, int64_t count, int64_t places, int64_t me, int64_t all"
    )
    code(f"NOINLINE void order_weights(weight *ordered, const real *packed, {parameters}) {{")
    sizes = [len(taps) for taps in g.tap_patterns]
    runs = g.blocks * g.passes * len(sizes)
    if g.cache_blocked and sizes:
        code("if (places != count) {")
        code.array("sizes", sizes)
        code(f"for (int64_t r = {runs}L * me / all; r < {runs}L * (me + 1) / all; ++r) {{")
        code("weight *to = ordered + rows[2 * r + 1];")
        code(f"const int size = {sizes[0] if len(set(sizes)) == 1 else f'sizes[r % {len(sizes)}]'};")
        code("for (int64_t e = rows[2 * r]; e < rows[2 * r + 2]; ++e, to += size) {")
        code("for (int t = 0; t < size; ++t) to[t] = packed[order[e] + t];")
        code("}\n}")
        code("return;")
        code("}")
    code("order_each(ordered, packed, order, count, places, me, all);")
    code("}")


def write_tile(
    code: Code,
    g: Generator,
    name: str,
    row: TileKind,
    column: TileKind,
    moments: bool,
    written: dict[Hashable, str],
) -> None:
    """Write all filters of one tile, and before it the loops over kernels of one tap pattern each.

    ``written`` are the functions that there are, for kinds of tiles to share: what they compute, their names.
    """
    positions = row.size * column.size
    store = _store(code, row, column, moments, written)
    loops = [_kernels(code, g, taps, row, column, written) for taps in g.tap_patterns]
    low = row.low * g.columns.buffer + column.low
    code(f"NOINLINE void {name}(const cell *restrict x, stored *restrict y, work_t *work) {{")
    code("const real *restrict bias = work->bias;")
    code("const ENTRY *restrict entries = work->entries;")
    code("ready_t *ready = &work->ready;")
    runs = 2 * g.passes * len(g.tap_patterns)
    code(f"const int32_t *restrict rows = work->rows + work->first / {g.block} * {runs};")
    code("const weight *v = work->values + rows[1];")
    code(f"for (long f = work->first, end = work->end; f < end; f += {g.block}) {{")
    code(f"const long count = min64({g.block}, RESULTS - f);")
    code("const int turn = !ready->turn;")
    code(f"vec *own = turn ? work->sums + {g.sum_vectors // 2} : work->sums;")
    code("for (long k = 0; k < count; ++k) {")
    code("const vec start = splat(bias ? bias[f + k] : 0);")
    code(f"for (long i = 0; i < {positions}; ++i) own[k * {positions} + i] = start;")
    code("}")
    code(f"for (long p = 0; p < {g.passes}; ++p, rows += {2 * len(g.tap_patterns)}) {{")
    for number, loop in enumerate(loops):
        code(
            f"v = {loop}(x, {low}, own, v, entries + 2L * rows[{2 * number}], "
            f"entries + 2L * rows[{2 * number + 2}], work);"
        )
    code("}")
    code("if (ready->left) ready->store(ready, ready->left);")
    code("const statistics_t *s = &work->statistics;")
    done = f"{store}, own, y + f * (DST_H * DST_W), f, count, work->stream, turn"
    code(f"*ready = (ready_t){{{done}, s->moments, s->centers, s->fresh}};")
    code("}\n}")


def _store(code: Code, row: TileKind, column: TileKind, moments: bool, written: dict[Hashable, str]) -> str:
    positions = row.size * column.size
    name = f"store_{row.size}_{column.size}"
    if name in written:
        return name
    written[name] = name
    sums = [f"s[{i}]" for i in range(positions)]
    code(f"NOINLINE void {name}(ready_t *ready, long count) {{")
    code("const int64_t stream = ready->stream;")
    if moments:
        code("vec *moments = ready->moments;")
        code("real *centers = ready->centers;")
        code("const int fresh = ready->fresh;")
    code("for (; count > 0 && ready->left > 0; --count, --ready->left) {")
    code("const vec *s = ready->sums;")
    store_tile(code, "ready->y", sums, column.size)
    if moments:
        add_moments(code, "ready->f", sums)
    code(f"ready->sums += {positions};")
    code("ready->y += DST_H * DST_W;")
    code("++ready->f;")
    code("// Stores retire in their order: one that waits for its line would hold up those of the sums.")
    code("if (!stream) {")
    code(f"for (int i = 0; i < {row.size}; ++i) {{")
    code('_Pragma("GCC unroll 18")')
    prefetch = "__builtin_prefetch(ready->y + i * DST_W + j, 1, 3)"
    code(f"for (int j = 0; j < {column.size} + LINE - 1; j += LINE) {prefetch};")
    code("}\n}\n}\n}")
    return name


def _kernels(
    code: Code, g: Generator, taps: Taps, row: TileKind, column: TileKind, written: dict[Hashable, str]
) -> str:
    """The loop over the kernels of a block and a pass with one tap pattern; it returns the next weight.

    Window positions count from where they would begin if there were no padding, ``low`` before ``x``: so taps
    that do not reach it have the same code at an edge of the image as inside.
    """
    positions = row.size * column.size
    low = row.low * g.columns.buffer + column.low
    uses = [
        (window + low, tuple(users))
        for window, users in _schedule_windows(list(g.triples(taps, row, column)), g.columns.buffer)
    ]
    key = positions, len(taps), tuple(uses)
    if key in written:
        return written[key]
    name = written[key] = f"kernels_{len(written)}"
    calls = g.rows.region_tiles * g.columns.region_tiles * g.blocks * g.passes * len(g.tap_patterns)
    code(f"// Kernels with the taps {', '.join(map(str, taps))}.")
    parameters = (
        "const cell *restrict x, long low, vec *restrict sums, const weight *restrict v, "
        "const ENTRY *restrict e, const ENTRY *end, work_t *work"
    )
    code(f"NOINLINE const weight *{name}({parameters}) {{")
    rows = -(-g.sources * g.rows.span_most // calls)
    code(f"if (work->ahead.left) {'fetch' if g.in_place else 'copy'}_windows(&work->ahead, {rows});")
    left_to_store = -(-g.block // (g.passes * len(g.tap_patterns)))
    code(f"if (work->ready.left) work->ready.store(&work->ready, {left_to_store});")
    code(f"for (; e != end; e += 2, v += {len(taps)}) {{")
    code("const long p = e[0] * WIN - low;")
    code(f"vec *s = sums + e[1] * {positions}L;")
    code("(void)p; (void)s;")
    for t in sorted({tap for _, users in uses for _, tap in users}):
        code(f"vec w{t} = splat(v[{t}]); KEEP(w{t});")
    left = [0] * positions
    for use in uses:
        for position, _ in use[1]:
            left[position] += 1
    begun = set()
    for window, users in uses:
        for position, _ in users:
            if position not in begun:
                begun.add(position)
                code(f"vec a{position} = s[{position}];")
        if len(users) > 1:
            code("{")
            code(f"vec t = x[p + {window}]; KEEP(t);")
            for position, tap in users:
                code(f"a{position} += t * w{tap};")
            code("}")
        else:
            ((position, tap),) = users
            code(f"a{position} += x[p + {window}] * w{tap};")
        for position, _ in users:
            left[position] -= 1
            if not left[position]:
                code(f"s[{position}] = a{position};")
    code("}")
    code("return v;")
    code("}")
    return name


_Uses = list[tuple[int, list[tuple[int, int]]]]


def _schedule_windows(triples: list[tuple[int, int, int]], width: int) -> _Uses:
    """Windows and what uses them, (result position, tap), row after row or column after column.

    Whichever order has fewer sums begun and not finished: those are in registers.
    """
    by_window: dict[int, list[tuple[int, int]]] = {}
    for position, window, tap in triples:
        by_window.setdefault(window, []).append((position, tap))
    rows: _Uses = sorted(by_window.items())
    columns: _Uses = sorted(by_window.items(), key=lambda item: (item[0] % width, item[0] // width))
    return min(rows, columns, key=_open_sums)


def _open_sums(uses: _Uses) -> int:
    """Most sums that are begun and not finished at any time."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for time, (_, users) in enumerate(uses):
        for position, _ in users:
            first.setdefault(position, time)
            last[position] = time
    changes = [0] * (len(uses) + 1)
    for position, time in first.items():
        changes[time] += 1
        changes[last[position] + 1] -= 1
    return max(itertools.accumulate(changes))
