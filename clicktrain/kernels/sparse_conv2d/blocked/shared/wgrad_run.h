// The function `run` of wgrad, after `sum_regions`, which adds the sums of some regions (or parts of them) to `sums`.
//
// Each thread sums into its own array; the arrays are added at the end. Few regions (small images, few of them) are
// shared out by chunks of the kernels instead: copying twice is cheaper than idle threads. Shares are fixed: who sums
// what is what makes results repeat. `chunks` are [parts, nnz, (first entry, last entry, first value) of each part]; if
// `whole`, all of them are computed at once. `places` has the place in the kernel's order of each packed value.
#pragma once

// Returns 1 if the tables are for another number of weights.
int run(const stored *x, const stored *gy, real *grad, const int32_t *rows, const ENTRY *entries,
        const int64_t *chunks, const int32_t *places, vec *scratch, int64_t nnz, int64_t blocks, int64_t whole,
        int64_t threads) {
  if (chunks[1] != nnz) return 1;
  if (!nnz) return 0;
  const int64_t parts = whole ? 1 : chunks[0], own = SCRATCH + (nnz + LANES - 1) / LANES;
  const int64_t items = (blocks + REGION_IMAGES - 1) / REGION_IMAGES * REGION_ROWS * REGION_COLS * parts;
  (void)threads;
  PARALLEL {
    const int64_t me = THREAD, all = THREADS;
    real *sums = (real *)(scratch + me * own + SCRATCH);
    memset(sums, 0, nnz * sizeof(real));
    const work_t work = {x, gy, rows, entries, chunks, (cell *)(scratch + me * own), sums, blocks, whole, parts};
    sum_regions(&work, items * me / all, items * (me + 1) / all);
    BARRIER
    for (int64_t i = nnz * me / all; i < nnz * (me + 1) / all; ++i) {
      const int64_t place = places ? places[i] : i;
      real s = 0;
      for (int64_t t = 0; t < all; ++t) s += ((const real *)(scratch + t * own + SCRATCH))[place];
      grad[i] = s;
    }
  }
  return 0;
}
