// Rows that a region reads: fetched ahead, or copied into a buffer, a few at a time while another region is computed.
//
// A copied region's windows are one compact block, with zeros where they reach over the edge of the image. Copied at
// once, every line moves through L1 three times (read, allocated, written back) while the vector units wait. A row now
// and then costs them little, if it has been fetched before: each row fetches its place in the next plane.
#pragma once
#include "kernels/sparse_conv2d/blocked/shared/operand_types.h"

#define LINE (sizeof(stored) < 64 ? 64 / (int)sizeof(stored) : 1)  // vectors of activations in a cache line

// What the next region will read: fetched into L2, a few rows at a time, while this one is computed. Copying alone
// would wait for memory, computing alone would leave it idle. Rows are fetched in the width that most have, which is
// known: code without a loop.
typedef struct {
  const stored *base;
  long stride, plane, left;
  int rows, row;
} ahead_t;

INLINE void fetch(ahead_t *a, int count, int width) {
  for (; count > 0 && a->left > 0; --count, --a->left) {
    _Pragma("GCC unroll 18")
    for (int j = 0; j < width + LINE - 1; j += LINE) __builtin_prefetch(a->base + j, 0, 2);
    a->base += a->stride;
    if (++a->row == a->rows) {
      a->row = 0;
      a->base += a->plane - a->rows * a->stride;
    }
  }
}

NOINLINE ahead_t look(const stored *from, long planes, long h, long w, int row, int rows, int col, int cols) {
  const int r0 = max64(row, 0), r1 = min64(row + rows, h), c0 = max64(col, 0), c1 = min64(col + cols, w);
  ahead_t a = {from + (long)r0 * w + c0, w, h * w, planes * (r1 - r0), r1 - r0, 0};
  if (r1 <= r0 || c1 <= c0) a.left = 0;
  return a;
}

// Rows still to be copied: of `rows` each of the planes, the i-th of them next, from p to o. Of the columns, those
// from c0 to c1 lie in the source.
typedef struct {
  const stored *p;
  cell *o;
  long left;
  int i, plane, row, rows, c0, c1, c2, cols;
} copy_t;

INLINE copy_t begin_copy(const stored *from, cell *to, long images, int row, int rows, int col, int cols, long planes,
                         long width) {
  const int c0 = min64(cols, max64(0, -col)), c1 = max64(c0, min64(cols, width - col));
  const stored *first = from + (long)row * width + col;
  const int c2 = max64(0, min64(cols, width - col - DISTANCE));
  return (copy_t){first, to, images * planes * rows, 0, 0, row, rows, c0, c1, c2, cols};
}

// `planes` of `height` x `width` are the source; `to_row`, `to_plane` and `to_image` are vectors of the buffer from one
// row, plane and image to the next.
INLINE void copy_rows(copy_t *a, long count, int c0, int c1, int c2, int cols, long planes, long height, long width,
                      long to_row, long to_plane, long to_image) {
  for (; count > 0 && a->left > 0; --count, --a->left) {
    const stored *p = a->p;
    cell *o = a->o;
    const int row = a->row + a->i;
    if (row < 0 || row >= height) {
      for (int j = 0; j < cols; ++j) o[j] = (cell){0};
    } else {
      pack_row(o, p, c0, c1, c2, cols);
      _Pragma("GCC unroll 18")
      for (int j = 0; j < cols + LINE - 1; j += LINE) __builtin_prefetch(p + height * width + j, 0, 2);
    }
    a->p += width;
    a->o += to_row;
    if (++a->i == a->rows) {
      a->i = 0;
      a->p += (height - a->rows) * width;
      a->o += to_plane - a->rows * to_row;
      if (++a->plane == planes) {
        a->plane = 0;
        a->o += to_image - planes * to_plane;
      }
    }
  }
}
