// Wgrad with code for tap patterns: its regions, after `compute_region`.
//
// X_IN_PLACE and GY_IN_PLACE say whether windows and the output's gradient are read where they are; else they are
// copied into a buffer, the windows' WINDOW_VECTORS before the gradient. A region has REGION_IMAGES blocks of images,
// the last one fewer.
#include "kernels/sparse_conv2d/blocked/shared/wgrad.h"

INLINE void sum_regions(const work_t *work, int64_t first, int64_t last) {
  int64_t packed = -1;
  for (int64_t item = first; item < last; ++item) {
    const int64_t region = item / work->parts, part = item % work->parts;
    const int64_t b = region / (REGION_ROWS * REGION_COLS) * REGION_IMAGES;
    const int64_t images = min64(REGION_IMAGES, work->blocks - b);
    const int rr = region / REGION_COLS % REGION_ROWS, rc = region % REGION_COLS;
    const stored *x = work->x + b * SOURCES * SRC_H * SRC_W, *gy = work->gy + b * RESULTS * DST_H * DST_W;
#if X_IN_PLACE
    const cell *window = x;
#else
    const cell *window = work->buffer;
    if (region != packed) {
      copy_t rows = windows_of(x, work->buffer, images, ROW_FIRST[rr], ROW_SPAN[rr], COL_FIRST[rc], COL_SPAN[rc]);
      copy_windows(&rows, rows.left);
    }
#endif
#if GY_IN_PLACE
    const cell *patch = gy;
#else
    const cell *patch = work->buffer + WINDOW_VECTORS;
    if (region != packed) {
      copy_t rows = gradients_of(gy, work->buffer + WINDOW_VECTORS, images, ROW_START[rr], ROW_SIZE[rr], COL_START[rc],
                                 COL_SIZE[rc]);
      copy_gradients(&rows, rows.left);
    }
#endif
    packed = region;
    ahead_t next_x = {0}, next_gy = {0};
    if (item + 1 < last && (item + 1) / work->parts != region) {
      const int64_t nb = (region + 1) / (REGION_ROWS * REGION_COLS) * REGION_IMAGES;
      const int nrr = (region + 1) / REGION_COLS % REGION_ROWS, nrc = (region + 1) % REGION_COLS;
      (void)nb, (void)nrr, (void)nrc;
#if !X_IN_PLACE
      next_x = look(work->x + nb * SOURCES * SRC_H * SRC_W, SOURCES, SRC_H, SRC_W, ROW_FIRST[nrr], ROW_SPAN[nrr],
                    COL_FIRST[nrc], COL_SPAN[nrc]);
#endif
#if !GY_IN_PLACE
      next_gy = look(work->gy + nb * RESULTS * DST_H * DST_W, RESULTS, DST_H, DST_W, ROW_START[nrr], ROW_SIZE[nrr],
                     COL_START[nrc], COL_SIZE[nrc]);
#endif
    }
    const int64_t *chunk = FIRST_CHUNK(work, part);
    const ENTRY *e = work->entries + 3 * chunk[0], *end = work->entries + 3 * LAST_CHUNK(work, part)[1];
    compute_region(window, patch, images, work->sums + chunk[2], e, end, &next_x, &next_gy, rr, rc);
  }
  (void)packed;
}

#include "kernels/sparse_conv2d/blocked/shared/wgrad_run.h"
