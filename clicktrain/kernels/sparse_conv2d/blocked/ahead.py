"""Windows of the next region, copied a few rows at a time while this one is computed.

Copying a region at once moves every line through the first-level cache three times (read, allocated, written
back) while the vector units wait. A row now and then costs them little, if it has been fetched before: each
row fetches its place in the next plane. It takes a second buffer, so regions have to be half as large.
"""

from __future__ import annotations

from clicktrain.kernels.sparse_conv2d.blocked.template import Code, locate

SUPPORT = """
typedef struct { const stored *p; cell *o; long left; int i, row, rows, c0, c1, cols; } ahead_t;
static inline __attribute__((always_inline))
void copy_rows(ahead_t *a, long count, int c0, int c1, int cols) {
  for (; count > 0 && a->left > 0; --count, --a->left) {
    const stored *p = a->p;
    cell *o = a->o;
    const int row = a->row + a->i;
    if (row < 0 || row >= SRC_H) {
      for (int j = 0; j < cols; ++j) o[j] = (cell){0};
    } else {
      PACK_ROW(o, p)
      _Pragma("GCC unroll 18")
      for (int j = 0; j < cols + LINE - 1; j += LINE) __builtin_prefetch(p + SRC_H * SRC_W + j, 0, 2);
    }
    a->p += SRC_W;
    a->o += WIN_W;
    if (++a->i == a->rows) {
      a->i = 0;
      a->p += (SRC_H - a->rows) * SRC_W;
      a->o += WIN - a->rows * WIN_W;
    }
  }
}
static __attribute__((noinline)) void copy(ahead_t *a, long count) {
#undef PACK_CASE
#define PACK_CASE(begin, end, width) \\
  if (a->c0 == begin && a->c1 == end && a->cols == width) return copy_rows(a, count, begin, end, width);
  PACK_CASES
  copy_rows(a, count, a->c0, a->c1, a->cols);
}
static __attribute__((noinline, unused))
ahead_t copy_of(const stored *from, cell *to, int row, int rows, int col, int cols) {
  const int c0 = min64(cols, max64(0, -col)), c1 = max64(c0, min64(cols, SRC_W - col));
  return (ahead_t){from + (long)row * SRC_W + col, to, SOURCES * rows, 0, row, rows, c0, c1, cols};
}
"""


def open_regions(code: Code, in_place: bool, span: str) -> None:
    """As `template.open_regions`, but ``ahead`` is what copies the next region, to be finished in its end."""
    code("const int64_t begin = items * me / all, last = items * (me + 1) / all;")
    code("ahead_t ahead = {0};")
    code("for (int64_t item = begin; item < last; ++item) {")
    locate(code, "item")
    code("const stored *from = src + b * SOURCES * SRC_H * SRC_W;")
    code("stored *to = dst + b * RESULTS * DST_H * DST_W;")
    if in_place:
        code("const cell *window = from;")
        return
    code("cell *window = buffer + ((item - begin) & 1) * (SOURCES * WIN);")
    code(f"if (item == begin) ahead = copy_of(from, window, {span.format('')});")
    code("copy(&ahead, ahead.left);")
    code("if (item + 1 < last) {")
    locate(code, "item + 1", "n")
    code("cell *other = buffer + ((item + 1 - begin) & 1) * (SOURCES * WIN);")
    code(f"ahead = copy_of(src + nb * SOURCES * SRC_H * SRC_W, other, {span.format('n')});")
    code("}")
