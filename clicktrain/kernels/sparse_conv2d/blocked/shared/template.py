"""Writing C text: lines with their indentation, and the parts that all kernels share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Direction


class Code:
    """Lines of C with their indentation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def __call__(self, line: str) -> None:
        """Add a line; braces at its ends change the depth."""
        if line.startswith("}"):
            self.depth -= 1
        self.lines.append("  " * self.depth + line)
        if line.endswith("{"):
            self.depth += 1

    def text(self) -> str:
        """All lines."""
        return "\n".join(self.lines) + "\n"


def planes(sources: int, results: int, rows: Direction, columns: Direction) -> dict[str, int]:
    """The constants that say what is read and written: planes, rows and columns of both."""
    return {
        "SOURCES": sources,
        "RESULTS": results,
        "SRC_H": rows.source,
        "SRC_W": columns.source,
        "DST_H": rows.length,
        "DST_W": columns.length,
    }


def define(code: Code, numbers: Mapping[str, int]) -> None:
    """Name numbers in the C text."""
    for name, value in numbers.items():
        code(f"#define {name} {value}L")


def join(numbers: Iterable[int]) -> str:
    """The elements of a C array."""
    return ", ".join(str(number) for number in numbers)


def among(name: str, numbers: list[int]) -> str:
    """A C condition: the variable is one of these numbers (a run of them is two comparisons)."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"({name} >= {numbers[0]} && {name} <= {numbers[-1]})"
    return "(" + " || ".join(f"{name} == {number}" for number in numbers) + ")"


def open_threads(code: Code) -> None:
    """Begin a parallel region; afterwards ``me`` of ``all`` threads runs what follows."""
    code("#ifdef _OPENMP")
    code("#pragma omp parallel num_threads(threads) if (threads > 1)")
    code("#endif")
    code("{")
    code("#ifdef _OPENMP")
    code("const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();")
    code("#else")
    code("const int64_t me = 0, all = 1;")
    code("#endif")


def open_weights(code: Code, entries: str) -> None:
    """Begin ``run`` of a gradient of the weight whose entries are of that type.

    Afterwards a region's kernels are computed in ``parts``, and each thread needs ``own`` vectors.
    """
    code(
        "int run(const stored *x, const stored *gy, real *grad, const int32_t *rows, "
        f"const {entries} *entries, const int64_t *chunks, const int32_t *found, vec *scratch, "
        "int64_t nnz, int64_t blocks, int64_t whole, int64_t threads) {"
    )
    code("if (chunks[1] != nnz) return 1;")
    code("if (!nnz) return 0;")
    code("const int64_t parts = whole ? 1 : chunks[0];")
    code("const int64_t own = SCRATCH + (nnz + LANES - 1) / LANES;")
    code("(void)rows; (void)threads;")


CHUNK = """const int64_t *chunk = chunks + 2 + 3 * part;
const int64_t *stop = whole ? chunks + 2 + 3 * (chunks[0] - 1) : chunk;"""
"""C text that finds the first and last chunk of a part: (first entry, last entry, first value)."""


def add_threads(code: Code) -> None:
    """Add all threads' sums (``nnz``, behind ``SCRATCH`` of each one's ``own`` vectors) into ``grad``."""
    code("#ifdef _OPENMP")
    code("#pragma omp barrier")
    code("#endif")
    code("for (int64_t i = nnz * me / all; i < nnz * (me + 1) / all; ++i) {")
    code("const int64_t place = found ? found[i] : i;")
    code("real s = 0;")
    code("for (int64_t t = 0; t < all; ++t) s += ((const real *)(scratch + t * own + SCRATCH))[place];")
    code("grad[i] = s;")
    code("}")


def locate(code: Code, region: str, prefix: str = "") -> None:
    """Take a region's number apart: block of images ``b``, and its row and column ``rr``, ``rc``."""
    code(f"const int64_t {prefix}b = ({region}) / (REGION_ROWS * REGION_COLS);")
    code(f"const int {prefix}rr = ({region}) / REGION_COLS % REGION_ROWS;")
    code(f"const int {prefix}rc = ({region}) % REGION_COLS;")
    code(f"(void){prefix}b; (void){prefix}rr; (void){prefix}rc;")


def store_tile(
    code: Code, where: str, sums: list[str], rows: int, columns: int, steps: tuple[int, int] = (1, 1)
) -> None:
    """Write a tile, every ``steps``-th row and column from where the C expression says on.

    Through the caches or around them.
    """
    places = [f"o[{i * steps[0]} * DST_W + {j * steps[1]}]" for i in range(rows) for j in range(columns)]
    code("{")
    code(f"stored *o = {where};")
    code("if (stream) {")
    for place, value in zip(places, sums, strict=True):
        code(f"STREAM(&{place}, narrow({value}));")
    code("} else {")
    for place, value in zip(places, sums, strict=True):
        code(f"{place} = narrow({value});")
    code("}")
    code("}")


SUPPORT = """
#ifdef _OPENMP
#include <omp.h>
#endif
// Activations in a cache line.
#define LINE (sizeof(stored) < 64 ? 64 / (int)sizeof(stored) : 1)
"""


FETCH = """
// What the next region will read: fetched into the second-level cache, a few rows at a time, while this one
// is computed. Copying alone would wait for memory, computing alone would leave it idle. Rows are fetched in
// the width that most have, which is known: code without a loop.
typedef struct { const stored *base; long stride, plane, left; int rows, row; } ahead_t;
static inline __attribute__((always_inline, unused)) void fetch(ahead_t *a, int count, int width) {
  for (; count > 0 && a->left > 0; --count, --a->left) {
    _Pragma("GCC unroll 18")
    for (int j = 0; j < width + LINE - 1; j += LINE) __builtin_prefetch(a->base + j, 0, 2);
    a->base += a->stride;
    if (++a->row == a->rows) { a->row = 0; a->base += a->plane - a->rows * a->stride; }
  }
}
static __attribute__((noinline, unused))
ahead_t look(const stored *from, long planes, long h, long w, int row, int rows, int col, int cols) {
  const int r0 = max64(row, 0), r1 = min64(row + rows, h), c0 = max64(col, 0), c1 = min64(col + cols, w);
  ahead_t a = {from + (long)r0 * w + c0, w, h * w, planes * (r1 - r0), r1 - r0, 0};
  if (r1 <= r0 || c1 <= c0) a.left = 0;
  return a;
}
"""
