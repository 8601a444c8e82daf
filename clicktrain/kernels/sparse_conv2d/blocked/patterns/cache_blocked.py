"""Forward and gradient of the input: sums of many filters' tiles, in the caches.

`accumulate` keeps the sums of one tile in registers over all kernels of a filter: each kernel may have
another tap set, whose code is jumped to; with 16 registers the tile is small, its windows overlap, and they
are too many for the first-level cache. Here the sums of a *block* of results lie in the caches instead,
beside the windows of a *pass* of so few sources that they stay in the first-level one. All kernels of a
block and a pass that have the same tap set are one loop without a jump. It sweeps over the tile once: a
window position is loaded once for all taps, a sum is loaded before its first tap and stored after its last,
so that only the sums of a column (or row) and its neighbours are in registers, and the tile need not fit
them. Of four taps on a tile of 4x4, 64 multiply-adds come with 45 to 56 loads and 16 stores. It wants
kernels of several taps, and few sets.

Windows are read from the source itself where its numbers are those that are computed with: a copy of a region
goes through the second-level cache twice, and costs as much as a tenth of the multiply-adds. Tiles at the
edges of the image then have code that leaves out what lies in the padding.
"""

from __future__ import annotations

from collections.abc import Hashable

from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import TileKind
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.shared import schedule, statistics
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import Code, join, store_tile


def support(code: Code, g: Generator, moments: bool) -> None:
    """The type of a block whose sums are ready: it is stored a result at a time while the next is computed.

    Stored at once, as many lines as the core can wait for would hold everything up.
    """
    extra = " vec *moments; real *centres; int fresh;" if moments else ""
    code(
        "typedef struct ready_t { void (*store)(struct ready_t *, long); const vec *sums; stored *y; "
        f"long f, left; int64_t stream; int turn;{extra} }} ready_t;"
    )
    if g.in_place:
        code("static __attribute__((noinline)) void fetch_windows(ahead_t *ahead, int count) {")
        code(f"fetch(ahead, count, {g.columns.span_most});")
        code("}")


def order_weights(g: Generator) -> str:
    """C text of a thread's share in bringing the weights into their order, a run of kernels at a time."""
    sets = len(g.tap_patterns)
    if not sets:
        return schedule.ORDER_WEIGHTS
    runs = g.blocks * g.passes * sets
    sizes = [len(taps) for taps in g.tap_patterns]
    return f"""if (places == count) {{ {schedule.ORDER_WEIGHTS} }}
else {{
  static const int sizes[] = {{{join(sizes)}}};
  for (int64_t r = {runs}L * me / all; r < {runs}L * (me + 1) / all; ++r) {{
    weight *to = ordered + rows[2 * r + 1];
    const int size = {sizes[0] if len(set(sizes)) == 1 else f"sizes[r % {sets}]"};
    (void)sizes;
    for (int64_t e = rows[2 * r]; e < rows[2 * r + 2]; ++e, to += size)
      for (int t = 0; t < size; ++t) to[t] = packed[order[e] + t];
  }}
}}"""


def write_tile(
    code: Code,
    g: Generator,
    name: str,
    row: TileKind,
    column: TileKind,
    moments: bool,
    written: dict[Hashable, str],
) -> None:
    """All filters of one tile of positions, and before it the loops over kernels of one tap set each.

    ``written`` are the functions that there are, for kinds of tiles to share: what they compute, their names.
    """
    positions = row.size * column.size
    store = _store(code, row, column, moments, written)
    loops = [_kernels(code, g, taps, row, column, written) for taps in g.tap_patterns]
    low = row.low * g.columns.buffer + column.low
    code(
        f"static __attribute__((noinline)) void {name}(const cell *restrict x, stored *restrict y, "
        "vec *sums, const weight *restrict values, const real *restrict bias, "
        f"const int32_t *restrict rows, const {g.entry} *restrict entries, long first, long end, "
        f"int64_t stream, {_ahead(g)} *ahead, ready_t *ready"
        f"{statistics.TILE_PARAMETERS if moments else ''}) {{"
    )
    runs = 2 * g.passes * len(g.tap_patterns)
    code(f"rows += first / {g.block} * {runs};")
    code("const weight *v = values + rows[1];")
    code(f"for (long f = first; f < end; f += {g.block}) {{")
    code(f"const long count = min64({g.block}, RESULTS - f);")
    code("const int turn = !ready->turn;")
    code(f"vec *own = turn ? sums + {g.sum_vectors // 2} : sums;")
    code("for (long k = 0; k < count; ++k) {")
    code("const vec start = splat(bias ? bias[f + k] : 0);")
    code(f"for (long i = 0; i < {positions}; ++i) own[k * {positions} + i] = start;")
    code("}")
    code(f"for (long p = 0; p < {g.passes}; ++p, rows += {2 * len(g.tap_patterns)}) {{")
    for number, loop in enumerate(loops):
        code(
            f"v = {loop}(x, {low}, own, v, entries + 2L * rows[{2 * number}], "
            f"entries + 2L * rows[{2 * number + 2}], ahead, ready);"
        )
    code("}")
    code("if (ready->left) ready->store(ready, ready->left);")
    extra = ", moments, centres, fresh" if moments else ""
    code(f"*ready = (ready_t){{{store}, own, y + f * (DST_H * DST_W), f, count, stream, turn{extra}}};")
    code("}")
    code("}")


def _store(code: Code, row: TileKind, column: TileKind, moments: bool, written: dict[Hashable, str]) -> str:
    """The function that stores some results of a block."""
    positions = row.size * column.size
    name = f"store_{row.size}_{column.size}"
    if name in written:
        return name
    written[name] = name
    sums = [f"s[{i}]" for i in range(positions)]
    code(f"static __attribute__((noinline)) void {name}(ready_t *ready, long count) {{")
    code("const int64_t stream = ready->stream;")
    if moments:
        code("vec *moments = ready->moments;")
        code("real *centres = ready->centres;")
        code("const int fresh = ready->fresh;")
    code("for (; count > 0 && ready->left > 0; --count, --ready->left) {")
    code("const vec *s = ready->sums;")
    store_tile(code, "ready->y", sums, row.size, column.size)
    if moments:
        statistics.add_tile(code, "ready->f", sums)
    code(f"ready->sums += {positions}; ready->y += DST_H * DST_W; ++ready->f;")
    # Stores retire in their order: one that waits for its line would hold up those of the sums.
    code("if (!stream) {")
    code(f"for (int i = 0; i < {row.size}; ++i) {{")
    code('_Pragma("GCC unroll 18")')
    code(f"for (int j = 0; j < {column.size} + LINE - 1; j += LINE)")
    code("  __builtin_prefetch(ready->y + i * DST_W + j, 1, 3);")
    code("}")
    code("}")
    code("}")
    code("}")
    return name


def _kernels(
    code: Code, g: Generator, taps: Taps, row: TileKind, column: TileKind, written: dict[Hashable, str]
) -> str:
    """The loop over those kernels of a block and a pass that have one tap set; it returns the next weight.

    Window positions count from where they would begin if there were no padding, ``low`` before ``x``: so taps
    that do not reach it have the same code at an edge of the image as inside.
    """
    positions = row.size * column.size
    low = row.low * g.columns.buffer + column.low
    uses = [
        (window + low, tuple(found))
        for window, found in _sweep(list(g.triples(taps, row, column)), g.columns.buffer)
    ]
    key = positions, len(taps), tuple(uses)
    if key in written:
        return written[key]
    name = written[key] = f"kernels_{len(written)}"
    calls = g.rows.region_tiles * g.columns.region_tiles * g.blocks * g.passes * len(g.tap_patterns)
    code(
        f"static __attribute__((noinline)) const weight *{name}(const cell *restrict x, long low, "
        f"vec *restrict sums, const weight *restrict v, const {g.entry} *restrict e, "
        f"const {g.entry} *end, {_ahead(g)} *ahead, ready_t *ready) {{"
    )
    rows = -(-g.sources * g.rows.span_most // calls)
    code(f"if (ahead->left) {'fetch' if g.in_place else 'copy'}_windows(ahead, {rows});")
    code(f"if (ready->left) ready->store(ready, {-(-g.block // (g.passes * len(g.tap_patterns)))});")
    code(f"for (; e != end; e += 2, v += {len(taps)}) {{")
    code("const long p = e[0] * WIN - low;")
    code(f"vec *s = sums + e[1] * {positions}L;")
    code("(void)p; (void)s;")
    for t in range(len(taps)):
        code(f"vec w{t} = splat(v[{t}]); KEEP(w{t});")
    left = [0] * positions
    for use in uses:
        for position, _ in use[1]:
            left[position] += 1
    begun = set()
    for window, found in uses:
        for position, _ in found:
            if position not in begun:
                begun.add(position)
                code(f"vec a{position} = s[{position}];")
        if len(found) > 1:
            code(f"{{ vec t = x[p + {window}]; KEEP(t);")
            for position, tap in found:
                code(f"  a{position} += t * w{tap};")
            code("}")
        else:
            ((position, tap),) = found
            code(f"a{position} += x[p + {window}] * w{tap};")
        for position, _ in found:
            left[position] -= 1
            if not left[position]:
                code(f"s[{position}] = a{position};")
    code("}")
    code("return v;")
    code("}")
    return name


def _ahead(g: Generator) -> str:
    """The type of what is done for the next region: rows of it are fetched, or copied."""
    return "ahead_t" if g.in_place else "copy_t"


_Uses = list[tuple[int, list[tuple[int, int]]]]


def _sweep(triples: list[tuple[int, int, int]], width: int) -> _Uses:
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
    for time, (_, found) in enumerate(uses):
        for position, _ in found:
            first.setdefault(position, time)
            last[position] = time
    changes = [0] * (len(uses) + 1)
    for position, time in first.items():
        changes[time] += 1
        changes[last[position] + 1] -= 1
    most = open_now = 0
    for change in changes:
        open_now += change
        most = max(most, open_now)
    return most
