// The function `run` of forward and dgrad: its threads go through their regions. Before it stand
// `order_weights`, which brings a thread's share of the weights into the kernel's order, and `compute_region`.
#pragma once
#include "kernels/sparse_conv2d/blocked/shared/schedule.h"

#define SOURCE_OF(b) (src + (b) * SOURCES * SRC_H * SRC_W)
#define SPAN_OF(rr, rc) ROW_FIRST[rr], ROW_SPAN[rr], COL_FIRST[rc], COL_SPAN[rc]

// Returns 1 if the tables are for another number of weights. `mean` and `var` are for STATISTICS, of n images.
int run(const stored *src, stored *dst, const real *packed, const int32_t *order, const real *bias,
        const int32_t *rows, const ENTRY *entries, real *mean, real *var, vec *scratch, int64_t n, int64_t count,
        int64_t places, int64_t room, int64_t blocks, int64_t stream, int64_t threads) {
  weight *ordered = (weight *)scratch;
  const weight *values = order ? ordered : (const weight *)packed;
  scratch += room;
  if (order && GROUPS >= 0 && rows[2 * GROUPS + 1] != count) return 1;
  const int64_t regions = blocks * REGION_ROWS * REGION_COLS, wanted = CHUNKS * threads;
  const int64_t parts = threads > 1 ? min64((wanted + regions - 1) / regions, UNITS) : 1;
  const int64_t items = regions * parts, chunks = threads > 1 ? min64(items, wanted) : 1;
  share_t shares[threads];
  for (int64_t t = 0; t < threads; ++t)
    shares[t] = (share_t){chunks * t / threads, chunks * (t + 1) / threads};
  PARALLEL {
    const int64_t me = THREAD, all = THREADS;
    if (order) {
      order_weights(ordered, packed, order, rows, count, places, me, all);
      BARRIER
    }
    vec *sums = scratch + me * SCRATCH;
    cell *buffer = (cell *)(sums + SUM_VECTORS);
    work_t work = {.values = values, .bias = bias, .rows = rows, .entries = entries, .sums = sums, .stream = stream};
#if STATISTICS
    statistics_t *const statistics = &work.statistics;
    statistics->moments = scratch + threads * SCRATCH + me * (2 * RESULTS);
    statistics->all_totals = (double *)(scratch + threads * (SCRATCH + 2 * RESULTS));
#endif
    int64_t chunk = take(shares, me, threads), item = items * chunk / chunks, before = -1;
#if WINDOWS == COPIED_BESIDE
    long turn = 0;
    if (chunk >= 0) {
      const int64_t b = item / parts / (REGION_ROWS * REGION_COLS);
      const int rr = item / parts / REGION_COLS % REGION_ROWS, rc = item / parts % REGION_COLS;
      work.ahead = windows_of(SOURCE_OF(b), buffer, 1, SPAN_OF(rr, rc));
    }
#endif
    while (chunk >= 0) {
      const int64_t last = items * (chunk + 1) / chunks;
      const int64_t following = item + 1 < last ? chunk : take(shares, me, threads);
      const int64_t next = item + 1 < last ? item + 1 : items * following / chunks;
      const int64_t region = item / parts, part = item % parts, b = region / (REGION_ROWS * REGION_COLS);
      const int rr = region / REGION_COLS % REGION_ROWS, rc = region % REGION_COLS;
      work.first = UNITS * part / parts * UNIT;
      work.end = min64(UNITS * (part + 1) / parts * UNIT, RESULTS);
#if WINDOWS == IN_PLACE
      const cell *window = SOURCE_OF(b) + ROW_FIRST[rr] * SRC_W + COL_FIRST[rc];
#elif WINDOWS == COPIED_BESIDE
      const cell *window = buffer + turn * (SOURCES * WIN);
      copy_windows(&work.ahead, work.ahead.left);
#else
      const cell *window = buffer;
      if (before != region) {
        copy_t now = windows_of(SOURCE_OF(b), buffer, 1, SPAN_OF(rr, rc));
        copy_windows(&now, now.left);
      }
#endif
#if WINDOWS != COPIED_BESIDE
      work.ahead = (ahead_t){0};
#endif
      if (following >= 0 && next / parts != region) {
        const int64_t nb = next / parts / (REGION_ROWS * REGION_COLS);
        const int nrr = next / parts / REGION_COLS % REGION_ROWS, nrc = next / parts % REGION_COLS;
#if WINDOWS == COPIED_BESIDE
        turn = !turn;
        work.ahead = windows_of(SOURCE_OF(nb), buffer + turn * (SOURCES * WIN), 1, SPAN_OF(nrr, nrc));
#else
        work.ahead = look(SOURCE_OF(nb), SOURCES, SRC_H, SRC_W, SPAN_OF(nrr, nrc));
#endif
      }
#if STATISTICS
      if (item == items * chunk / chunks) begin_chunk(statistics, chunk);
      if (parts > 1) statistics->fresh = statistics->totals[2 * RESULTS + work.first] == 0;
#endif
      compute_region(window, dst + b * RESULTS * DST_H * DST_W, rr, rc, &work);
      if (work.ready.left) work.ready.store(&work.ready, work.ready.left);
#if STATISTICS
      // Add up where sums get long, and where the last block begins.
      statistics->held += ROW_SIZE[rr] * COL_SIZE[rc];
      if (parts > 1 || statistics->held >= PIECE || item + 1 == last ||
          item + 1 == (blocks - 1) * REGION_ROWS * REGION_COLS) {
        add_up(statistics->moments, statistics->totals, work.first, work.end, statistics->held,
               b == blocks - 1 ? n - b * LANES : LANES);
        statistics->held = 0;
      }
#endif
      before = region;
      item = next;
      chunk = following;
    }
    if (stream) DRAIN();
    (void)before;
    (void)buffer;
#if STATISTICS
    BARRIER
    combine(statistics->all_totals, chunks, me, all, n, mean, var);
#endif
  }
  (void)mean;
  (void)var;
  (void)n;
  return 0;
}
