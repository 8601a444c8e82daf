// Transposes between [N, C, H, W] and [B, C, H, W, V], in tiles of V x V numbers in registers: block, unblock.
//
// The numbers of an image are seen as `outer` runs of `columns` contiguous ones: one run of C*H*W, or, with
// channels last, H*W runs of C. A tile is V images times V columns: on either side V whole vectors. Its function
// is generated for LANES and the size of a number, and stands before this file (codegen.py):
//
// tile(from, from_row, to, to_row, rows, out): read `rows` vectors `from_row` apart, zeros for the others, and
// write the first `out` vectors of the transpose.
#include "kernels/blocked_layout/shuffles.h"

// Runs and columns of one part: with channels last, lines of 16 runs are used up while they are near.
#define RUNS 16
#define COLUMNS (32 * LANES)

// Runs [o0, o1) by columns [c0, c1) of one block. Number (o, c) of its first image is at plain + o * columns + c,
// vector (o, c) at blocked + (o * by_run + c * by_column) * LANES.
INLINE void convert(number *plain, number *blocked, int64_t image, int64_t columns, int64_t by_run, int64_t by_column,
                    int64_t o0, int64_t o1, int64_t c0, int64_t c1, const int64_t rows, const int to_blocked) {
  const int64_t whole = c0 + (c1 - c0) / LANES * LANES;
  for (int64_t c = c0; c < whole; c += LANES) {
    for (int64_t o = o0; o < o1; ++o) {
      number *p = plain + o * columns + c, *q = blocked + (o * by_run + c * by_column) * LANES;
      if (to_blocked) tile(p, image, q, by_column * LANES, rows, LANES);
      else tile(q, by_column * LANES, p, image, LANES, rows);
    }
  }
  for (int64_t o = o0; o < o1; ++o) {
    for (int64_t c = whole; c < c1; ++c) {
      number *p = plain + o * columns + c, *q = blocked + (o * by_run + c * by_column) * LANES;
      for (int64_t i = 0; i < LANES; ++i) {
        if (to_blocked) q[i] = i < rows ? p[i * image] : 0;
        else if (i < rows) p[i * image] = q[i];
      }
    }
  }
}
// A full block has code of its own, in which the number of images is known.
typedef void part_t(number *, number *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t);
#define PART(name, to_blocked)                                                                                 \
  NOINLINE void name(number *plain, number *blocked, int64_t image, int64_t columns, int64_t by_run,           \
                     int64_t by_column, int64_t o0, int64_t o1, int64_t c0, int64_t c1, int64_t rows) {        \
    if (rows == LANES)                                                                                         \
      convert(plain, blocked, image, columns, by_run, by_column, o0, o1, c0, c1, LANES, to_blocked);           \
    else                                                                                                       \
      convert(plain, blocked, image, columns, by_run, by_column, o0, o1, c0, c1, rows, to_blocked);            \
  }
PART(block_part, 1)
PART(unblock_part, 0)

static int run(part_t *part, number *plain, number *blocked, int64_t n, int64_t blocks, int64_t outer,
               int64_t columns, int64_t by_run, int64_t by_column, int64_t threads) {
  const int64_t image = outer * columns, segments = (columns + COLUMNS - 1) / COLUMNS;
  const int64_t parts = (outer + RUNS - 1) / RUNS * segments;
  PARALLEL_FOR
  for (int64_t item = 0; item < blocks * parts; ++item) {
    const int64_t b = item / parts, o = item % parts / segments * RUNS, c = item % segments * COLUMNS;
    part(plain + b * LANES * image, blocked + b * LANES * image, image, columns, by_run, by_column, o,
         min64(o + RUNS, outer), c, min64(c + COLUMNS, columns), min64(n - b * LANES, LANES));
  }
  return 0;
}
int block(number *plain, number *blocked, int64_t n, int64_t blocks, int64_t outer, int64_t columns, int64_t by_run,
          int64_t by_column, int64_t threads) {
  return run(block_part, plain, blocked, n, blocks, outer, columns, by_run, by_column, threads);
}
int unblock(number *plain, number *blocked, int64_t n, int64_t blocks, int64_t outer, int64_t columns, int64_t by_run,
            int64_t by_column, int64_t threads) {
  return run(unblock_part, plain, blocked, n, blocks, outer, columns, by_run, by_column, threads);
}
