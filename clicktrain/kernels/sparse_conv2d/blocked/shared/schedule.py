"""Which thread computes which regions, and what it copies or fetches on its way from one to the next.

Of few regions (small images, few of them) each has several *parts*, some of the results, so that there is
work for all threads. Regions, or parts, are cut into *chunks*, some for each thread. A thread begins with its
own, the same in every call, so that what it reads and writes tends to be in its caches and its memory; then
it takes what others have not begun. A core that is slower, or busy with something else, holds nobody up for
long. Results do not depend on who computed what, nor do the sums of `statistics`, which are kept by chunk.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from clicktrain.kernels.sparse_conv2d.blocked.shared.template import Code, define, locate, open_threads

CHUNKS = 4
"""Chunks of each thread, if there are several: at the end one waits for a quarter of its work at most."""

_LINE = 64
SUPPORT = f"""
// Chunks of a thread that nobody has taken, on a cache line of their own.
typedef struct {{ int64_t next, end; }} __attribute__((aligned(64))) share_t;
// The next chunk of one's own, or of somebody else's; -1 if all are taken.
static __attribute__((noinline)) int64_t take(share_t *shares, int64_t me, int64_t threads) {{
  for (int64_t i = 0; i < threads; ++i) {{
    share_t *s = shares + (me + i) % threads;
    if (__atomic_load_n(&s->next, __ATOMIC_RELAXED) >= s->end) continue;
    const int64_t chunk = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
    if (chunk < s->end) return chunk;
  }}
  return -1;
}}
#define CHUNKS {CHUNKS}
"""


def ordered_vectors(count: int, weight_bytes: int, vector_bytes: int) -> int:
    """Vectors of scratch memory for so many weights in the order of a kernel: whole cache lines."""
    line = max(_LINE // vector_bytes, 1)
    return -(-count * weight_bytes // (vector_bytes * line)) * line


ORDER_WEIGHTS = (
    "for (int64_t i = count * me / all; i < count * (me + 1) / all; ++i) ordered[i] = packed[order[i]];"
)
"""C text of a thread's share in bringing the weights into their order."""


def open_shares(code: Code, results: int, size: int, order_weights: str = ORDER_WEIGHTS) -> None:
    """Give every thread its chunks, begin the parallel region, and bring the weights into their order.

    Args:
        code: written to.
        results: of a region.
        size: of a unit of results, parts are some of these.
        order_weights: C text of a thread's share in that.
    """
    define(code, {"UNIT": size, "UNITS": -(-results // size)})
    code("const int64_t regions = blocks * REGION_ROWS * REGION_COLS, wanted = CHUNKS * threads;")
    code("const int64_t parts = threads > 1 ? min64((wanted + regions - 1) / regions, UNITS) : 1;")
    code("const int64_t items = regions * parts, chunks = threads > 1 ? min64(items, wanted) : 1;")
    code("share_t shares[threads];")
    code("for (int64_t t = 0; t < threads; ++t)")
    code("  shares[t] = (share_t){chunks * t / threads, chunks * (t + 1) / threads};")
    open_threads(code)
    code("if (order) {")
    code(order_weights)
    code("#ifdef _OPENMP")
    code("#pragma omp barrier")
    code("#endif")
    code("}")


Windows: TypeAlias = Literal["in place", "copied at once", "copied beside"]
"""Where tiles read a region's windows: in the source itself, or in a buffer.

To this the region is copied when it begins, or while the one before it is computed.
"""


def open_regions(code: Code, windows: Windows, span: tuple[str, str, str, str]) -> None:
    """Begin a thread's loop over its regions, or parts of them.

    Afterwards ``window`` is what tiles read, ``to`` the result, of which they compute those from ``first`` to
    ``end``. The ``item`` before ``last`` is the last of its ``chunk``. ``ahead`` is a copy of the next region
    (`window_copy`) that tiles have to go on with, if it is copied beside them; else what they fetch of it
    (`template.FETCH`).

    Args:
        code: written to; ``src``, ``dst`` and ``buffer`` are declared.
        windows: where they are read.
        span: C expressions of a region's first row, rows, first column and columns; ``{0}`` is the prefix of
            `template.locate`.
    """
    beside = windows == "copied beside"
    source = "src + {0}b * SOURCES * SRC_H * SRC_W"
    copy = f"windows_of({source}, {{1}}, 1, {', '.join(span)})"
    code("int64_t chunk = take(shares, me, threads), item = items * chunk / chunks;")
    if beside:
        code("copy_t ahead = {0};")
        code("long turn = 0;")
        code("if (chunk >= 0) {")
        locate(code, "item / parts")
        code(f"ahead = {copy.format('', 'buffer')};")
        code("}")
    code("int64_t before = -1;")
    code("while (chunk >= 0) {")
    _open_item(code)
    code(f"const stored *from = {source.format('')};")
    code("stored *to = dst + b * RESULTS * DST_H * DST_W;")
    code("(void)from; (void)other; (void)before;")
    if not beside:
        code("ahead_t ahead = {0};")
    following = f"look({source.format('n')}, SOURCES, SRC_H, SRC_W, {', '.join(span).format('n')})"
    if windows == "in place":
        code(f"const cell *window = from + {span[0].format('')} * SRC_W + {span[2].format('')};")
    elif beside:
        code("const cell *window = buffer + turn * (SOURCES * WIN);")
        code("copy_windows(&ahead, ahead.left);")
        following = copy.format("n", "buffer + turn * (SOURCES * WIN)")
    else:
        code("const cell *window = buffer;")
        code("if (before != region) {")
        code(f"copy_t now = {copy.format('', 'buffer')};")
        code("copy_windows(&now, now.left);")
        code("}")
    code("if (other) {")
    locate(code, "next / parts", "n")
    if beside:
        code("turn = !turn;")
    code(f"ahead = {following};")
    code("}")


def _open_item(code: Code) -> None:
    """Which region and results are next, and which come after them (``other``: of another region)."""
    code("const int64_t last = items * (chunk + 1) / chunks;")
    code("const int64_t following = item + 1 < last ? chunk : take(shares, me, threads);")
    code("const int64_t next = item + 1 < last ? item + 1 : items * following / chunks;")
    code("const int64_t region = item / parts, part = item % parts;")
    code("const int other = following >= 0 && next / parts != region;")
    code("const long first = UNITS * part / parts * UNIT;")
    code("const long end = min64(UNITS * (part + 1) / parts * UNIT, RESULTS);")
    locate(code, "region")


def close_regions(code: Code) -> None:
    """End the loop, and what has been written around the caches."""
    code("before = region;")
    code("item = next;")
    code("chunk = following;")
    code("}")
    code("if (stream) DRAIN();")
