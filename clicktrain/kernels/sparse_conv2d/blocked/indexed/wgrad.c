// Wgrad with the offsets of taps as data.
//
// Four weights of a filter are taken at a time: they share each load of the output's gradient, wherever in their
// kernels they lie. Filter after filter within a pass of a few channels, whose windows stay in L1. On small images a
// region holds REGION_IMAGES blocks of images, so that the sums over lanes, once a region and weight, stay few.
//
// A region has PATCH_H x PATCH_W positions of the output; TILE_W columns are unrolled: EACH_COLUMN(X) is
// X(column, column % 3). Neighbors read ROW_REACH and COL_REACH apart in the source. Of `rows` each run of one filter
// has [first entry, filter, vectors to the windows of its pass, first value, values].
#include "kernels/sparse_conv2d/blocked/shared/wgrad.h"

#define UNIT 4
#define EACH_WEIGHT(X) X(0) X(1) X(2) X(3)
#define POINTER(u) const cell *p##u = w + e[u];
#define THREE_SUMS(u) sums_t s##u##_0 = {0}, s##u##_1 = {0}, s##u##_2 = {0};
#define TOTAL(u) (s##u##_0 + s##u##_1 + s##u##_2)
#define NEXT_COLUMNS(u) p##u += TILE_W * COL_REACH;
#define NEXT_ROW(u) p##u += ROW_REACH * WIN_W - PATCH_W * COL_REACH;
#define NEXT_IMAGE(u) p##u += WIN_IMAGE - PATCH_H * ROW_REACH * WIN_W;
#define COLUMN(t, chain)                                  \
  {                                                       \
    cell g = d[t];                                        \
    KEEP(g);                                              \
    MULTIPLY_ADD(s0_##chain, g, p0[(t) * COL_REACH]);     \
    MULTIPLY_ADD(s1_##chain, g, p1[(t) * COL_REACH]);     \
    MULTIPLY_ADD(s2_##chain, g, p2[(t) * COL_REACH]);     \
    MULTIPLY_ADD(s3_##chain, g, p3[(t) * COL_REACH]);     \
  }

// All weights of some runs over one region; the next region is copied on the way.
NOINLINE void sum_runs(const cell *restrict x, const cell *restrict gy, real *restrict sums,
                       const ENTRY *restrict entries, const int32_t *restrict rows, const int32_t *end,
                       int64_t images, int64_t parts, copy_t *next_x, copy_t *next_gy) {
  const long runs = max64((end - rows) / 5 * parts, 1);
  const long share_x = next_x->left / runs + 1, share_gy = next_gy->left / runs + 1;
  for (; rows != end; rows += 5) {
    if (next_x->left) copy_windows(next_x, share_x);
    if (next_gy->left) copy_gradients(next_gy, share_gy);
    const ENTRY *e = entries + rows[0];
    const cell *const q = gy + rows[1] * PATCH, *const w = x + rows[2];
    real *out = sums + rows[3];
    for (long left = rows[4]; left > 0; left -= UNIT, e += UNIT, out += UNIT) {
      EACH_WEIGHT(POINTER)
      EACH_WEIGHT(THREE_SUMS)
      const cell *d = q;
      for (long n = 0; n < images; ++n) {
        for (long i = 0; i < PATCH_H; ++i) {
          for (long j = 0; j < PATCH_W / TILE_W; ++j) {
            EACH_COLUMN(COLUMN)
            d += TILE_W;
            EACH_WEIGHT(NEXT_COLUMNS)
          }
          EACH_WEIGHT(NEXT_ROW)
        }
        EACH_WEIGHT(NEXT_IMAGE)
      }
      if (left >= UNIT) {
        ADD_LANE_SUMS4(out, TOTAL(0), TOTAL(1), TOTAL(2), TOTAL(3));
      } else {
        real some[UNIT] = {0};
        ADD_LANE_SUMS4(some, TOTAL(0), TOTAL(1), TOTAL(2), TOTAL(3));
        for (long u = 0; u < left; ++u) out[u] += some[u];
      }
    }
  }
}

// Begin to copy a region's windows and output gradient; there are zeros outside of the latter.
INLINE void begin_copies(const work_t *work, int64_t region, cell *window, copy_t *next_x, copy_t *next_gy) {
  const int64_t begin = region / (REGION_ROWS * REGION_COLS) * REGION_IMAGES;
  const int64_t images = min64(REGION_IMAGES, work->blocks - begin);
  const int rr = region / REGION_COLS % REGION_ROWS, rc = region % REGION_COLS;
  *next_x = windows_of(work->x + begin * SOURCES * SRC_H * SRC_W, window, images, ROW_FIRST[rr], ROW_SPAN[rr],
                       COL_FIRST[rc], COL_SPAN[rc]);
  *next_gy = gradients_of(work->gy + begin * RESULTS * DST_H * DST_W, window + SOURCES * WIN, images, rr * PATCH_H,
                          PATCH_H, rc * PATCH_W, PATCH_W);
}

INLINE void sum_regions(const work_t *work, int64_t first, int64_t last) {
  copy_t next_x = {0}, next_gy = {0};
  int64_t packed = -1;
  for (int64_t item = first; item < last; ++item) {
    const int64_t parts = work->parts, region = item / parts, part = item % parts;
    cell *window = work->buffer + region % BUFFERS * (SOURCES * WIN + RESULTS * PATCH);
    if (region != packed) {
      if (packed < 0 || BUFFERS == 1) begin_copies(work, region, window, &next_x, &next_gy);
      copy_windows(&next_x, next_x.left);
      copy_gradients(&next_gy, next_gy.left);
      packed = region;
      if (BUFFERS > 1 && (region + 1) * parts < last) {
        cell *other = work->buffer + (region + 1) % BUFFERS * (SOURCES * WIN + RESULTS * PATCH);
        begin_copies(work, region + 1, other, &next_x, &next_gy);
      }
    }
    const int64_t begin = region / (REGION_ROWS * REGION_COLS) * REGION_IMAGES;
    sum_runs(window, window + SOURCES * WIN, work->sums, work->entries, work->rows + 5 * FIRST_CHUNK(work, part)[0],
             work->rows + 5 * LAST_CHUNK(work, part)[1], min64(REGION_IMAGES, work->blocks - begin), parts - part,
             &next_x, &next_gy);
  }
}

#include "kernels/sparse_conv2d/blocked/shared/wgrad_run.h"
