"""Copies of a region's rows into a buffer: at once, or a few at a time while another region is computed.

A region is copied so that its windows are one compact block, with zeros where they reach over the edge of
the image. Copied at once, every line moves through the first-level cache three times (read, allocated,
written back) while the vector units wait. A row now and then costs them little, if it has been fetched
before: each row fetches its place in the next plane. That takes a second buffer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from clicktrain.kernels.sparse_conv2d.blocked.shared.template import Code

CASES = 4
"""Ways of copying a row that get code of their own: at either edge of an image, between them."""

TYPE = """
// Rows still to be copied: of `rows` each of the planes, the i-th of them next, from p to o. Of the columns,
// those from c0 to c1 lie in the source.
typedef struct { const stored *p; cell *o; long left; int i, plane, row, rows, col, c0, c1, cols; } copy_t;
"""


@dataclass(frozen=True, slots=True)
class Copier:
    """What is copied, all of it C expressions or numbers that the text knows.

    Attributes:
        name: of the functions: ``copy_NAME(copy, rows)`` goes on, ``NAME_of(from, to, images, row, rows, col,
            cols)`` begins.
        planes, height, width: of the source.
        row, plane, image: vectors from one row, plane and image of the buffer to the next.
        columns: (first column, columns) of the regions, for code without loops.
        source_width: ``width`` as a number.
    """

    name: str
    planes: str
    height: str
    width: str
    row: int
    plane: int
    image: int
    columns: tuple[tuple[int, int], ...]
    source_width: int

    def write(self, code: Code) -> None:
        """The functions."""
        cases = "\n".join(
            f"  if (a->c0 == {begin} && a->c1 == {end} && a->cols == {columns}) "
            f"{{ copy_{self.name}_rows(a, count, {begin}, {end}, {columns}); return; }}"
            for begin, end, columns in _frequent(self.columns, self.source_width)
        )
        back = f"{self.image}L - {self.planes} * {self.plane}L"
        image = f"if (++a->plane == {self.planes}) {{ a->plane = 0; a->o += {back}; }}"
        code(
            f"""
static inline __attribute__((always_inline))
void copy_{self.name}_rows(copy_t *a, long count, int c0, int c1, int cols) {{
  for (; count > 0 && a->left > 0; --count, --a->left) {{
    const stored *p = a->p;
    cell *o = a->o;
    const int row = a->row + a->i, col = a->col;
    (void)col;
    if (row < 0 || row >= {self.height}) {{
      for (int j = 0; j < cols; ++j) o[j] = (cell){{0}};
    }} else {{
      PACK_ROW(o, p)
      _Pragma("GCC unroll 18")
      for (int j = 0; j < cols + LINE - 1; j += LINE)
        __builtin_prefetch(p + {self.height} * {self.width} + j, 0, 2);
    }}
    a->p += {self.width};
    a->o += {self.row}L;
    if (++a->i == a->rows) {{
      a->i = 0;
      a->p += ({self.height} - a->rows) * {self.width};
      a->o += {self.plane}L - a->rows * {self.row}L;
      {image}
    }}
  }}
}}
static __attribute__((noinline)) void copy_{self.name}(copy_t *a, long count) {{
{cases}
  copy_{self.name}_rows(a, count, a->c0, a->c1, a->cols);
}}
static __attribute__((noinline, unused)) copy_t {self.name}_of(
    const stored *from, cell *to, long images, int row, int rows, int col, int cols) {{
  const int c0 = min64(cols, max64(0, -col)), c1 = max64(c0, min64(cols, {self.width} - col));
  const stored *first = from + (long)row * {self.width} + col;
  return (copy_t){{first, to, images * {self.planes} * rows, 0, 0, row, rows, col, c0, c1, cols}};
}}
"""
        )


def windows(
    window: int, row: int, columns: tuple[tuple[int, int], ...], width: int, images: int = 1
) -> Copier:
    """Of the source of a phase: ``window`` vectors of a plane and image, in rows of ``row``."""
    return Copier("windows", "SOURCES", "SRC_H", "SRC_W", row, window * images, window, columns, width)


def gradients(
    patch: int, row: int, columns: tuple[tuple[int, int], ...], width: int, images: int = 1
) -> Copier:
    """Of the output's gradient: ``patch`` vectors of a plane and image, in rows of ``row``."""
    return Copier("gradients", "RESULTS", "DST_H", "DST_W", row, patch * images, patch, columns, width)


def _frequent(columns: Iterable[tuple[int, int]], width: int) -> list[tuple[int, int, int]]:
    """First and last column inside the source, and columns, of the most frequent regions."""
    cases = []
    for first, count in columns:
        begin = min(max(-first, 0), count)
        cases.append((begin, max(min(count, width - first), begin), count))
    return [case for case, _ in Counter(cases).most_common(CASES)]
