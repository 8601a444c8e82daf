// Forward and dgrad with the offsets of taps as data.
//
// Each weight is an offset and a value, every result position one multiply-add with its operand in L1. There is no jump
// to mispredict and no load to share, so it does not matter where the kept positions lie. Windows stay in L1: the
// source is gone through in PASSES of a few channels (of dgrad: filters), over all results, with the sums kept between.
//
// A tile is TILE_H x TILE_W positions of one strided phase, TILE_DOWN and TILE_RIGHT of them a region. Neighbors in a
// tile lie ROW_STEP and COL_STEP apart in the result, and read ROW_REACH and COL_REACH apart in the source.
// EACH_SUM(X) is X(number, row, column, number % 2) for each position of a tile.
#include "kernels/sparse_conv2d/blocked/shared/schedule.h"

#define TILE (TILE_H * TILE_W)
#define PLACE(i, j) y[(i) * ROW_STEP * DST_W + (j) * COL_STEP]
#define DECLARE_SUM(k, i, j, odd) vec a##k;
#define BEGIN_SUM(k, i, j, odd) a##k = start;
#define LOAD_SUM(k, i, j, odd) a##k = sums[k];
#define MULTIPLY(k, i, j, odd) MULTIPLY_ADD(a##k, w, p[(i) * ROW_REACH * WIN_W + (j) * COL_REACH]);
#define STREAM_SUM(k, i, j, odd) STREAM(&PLACE(i, j), narrow(a##k));
#define STORE_SUM(k, i, j, odd) PLACE(i, j) = narrow(a##k);
#define SAVE_SUM(k, i, j, odd) sums[k] = a##k;
#define ADD_MOMENTS(k, i, j, odd) d = a##k - c; s##odd += d; q##odd += d * d;

// All results of one tile over the sources of one pass; `down` and `right` are positions from its first on.
NOINLINE void tile(const cell *restrict x, stored *restrict y, vec *restrict sums, const weight *restrict values,
                   const real *restrict bias, const int32_t *restrict rows, const ENTRY *restrict entries,
                   vec *restrict moments, real *restrict centers, long pass, long down, long right, work_t *work) {
  const long first = work->first, end = work->end;
  const int64_t stream = work->stream;
  const int last = pass == PASSES - 1;
#if STATISTICS
  const int fresh = work->statistics.fresh;
#endif
  rows += 2 * first, sums += TILE * first, y += DST_H * DST_W * first;
  for (long f = first; f < end; ++f, rows += 2, sums += TILE, y += DST_H * DST_W) {
#if WINDOWS != IN_PLACE
    fetch(&work->ahead, FETCH_ROWS, WIN_W);
#endif
    EACH_SUM(DECLARE_SUM)
    if (pass == 0) {
      const vec start = splat(bias ? bias[f] : 0);
      EACH_SUM(BEGIN_SUM)
    } else {
      EACH_SUM(LOAD_SUM)
    }
    const ENTRY *e = entries + rows[0], *stop = entries + rows[2];
    const weight *v = values + rows[1];
    for (; e != stop; ++e, ++v) {
      const cell *p = x + *e;
      const cell w = all_lanes(*v);
      EACH_SUM(MULTIPLY)
    }
    if (last && down >= TILE_H && right >= TILE_W) {
      if (stream) {
        EACH_SUM(STREAM_SUM)
      } else {
        EACH_SUM(STORE_SUM)
      }
#if STATISTICS
      OPEN_MOMENTS(f, a0)
      vec d, s0 = {0}, q0 = {0}, s1 = {0}, q1 = {0};
      EACH_SUM(ADD_MOMENTS)
      m[0] += s0 + s1;
      m[1] += q0 + q1;
#endif
    } else {
      EACH_SUM(SAVE_SUM)
      if (last) {
#if STATISTICS
        OPEN_MOMENTS(f, sums[0])
#endif
        for (long i = 0; i < TILE_H && i < down; ++i) {
          for (long j = 0; j < TILE_W && j < right; ++j) {
            PLACE(i, j) = narrow(sums[i * TILE_W + j]);
#if STATISTICS
            const vec d = sums[i * TILE_W + j] - c;
            m[0] += d;
            m[1] += d * d;
#endif
          }
        }
      }
    }
  }
}

INLINE void compute_region(const cell *window, stored *to, int rr, int rc, work_t *work) {
  for (long n = 0; n < TILES_DOWN * TILES_RIGHT; ++n) {
    const long ti = n / TILES_RIGHT, tj = n % TILES_RIGHT;
    for (long phase = 0; phase < ROW_PHASES * COL_PHASES; ++phase) {
      const long lr = phase / COL_PHASES, lc = phase % COL_PHASES;
      const long i = (rr * TILES_DOWN + ti) * TILE_H, j = (rc * TILES_RIGHT + tj) * TILE_W;
      const long down = PHASE_ROW_COUNT[lr] - i, right = PHASE_COL_COUNT[lc] - j;
      if (down <= 0 || right <= 0) continue;
      const cell *x = window + ti * TILE_H * ROW_REACH * WIN_W + tj * TILE_W * COL_REACH;
      stored *y = to + (PHASE_ROW_START[lr] + i * ROW_STEP) * DST_W + PHASE_COL_START[lc] + j * COL_STEP;
      const int32_t *rows = work->rows + phase * PASSES * 2 * RESULTS;
      for (long pass = 0; pass < PASSES; ++pass, rows += 2 * RESULTS, x += PASS)
        tile(x, y, work->sums, work->values, pass ? NULL : work->bias, rows, work->entries, work->statistics.moments,
             work->statistics.centers, pass, down, right, work);
      work->statistics.fresh = 0;
    }
  }
}

NOINLINE void order_weights(weight *ordered, const real *packed, const int32_t *order, const int32_t *rows,
                            int64_t count, int64_t places, int64_t me, int64_t all) {
  order_each(ordered, packed, order, count, places, me, all);
}

#include "kernels/sparse_conv2d/blocked/shared/run.h"
