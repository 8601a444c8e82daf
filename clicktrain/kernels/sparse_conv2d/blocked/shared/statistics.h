// Mean and variance of each filter's results, summed up by forward kernels as they store a tile.
//
// A chunk of regions sums x - c and its square, where c is the first result that it has for the filter: sums of plain
// squares would lose the variance where the mean is far from zero. If c is no usual number but d away from the mean of
// k numbers, the variance is at least d * d / k, so what rounding takes of it stays bounded. A tile is summed by
// itself, a run of tiles in `real` and lane by lane, then all in double. Padding lanes of the last block of images are
// dropped, even if they are NaN. Chunks are combined in their order, so that results repeat bit for bit, whichever
// thread took them.
#pragma once
#include "kernels/native/vector.h"

#define PIECE 256              // positions that a lane sums up in `real` before it goes over to double
#define TOTALS (4 * RESULTS)   // of a chunk: sums, sums of squares, how many numbers these are of; the centers (`real`)

// A thread's sums: of `moments` two for each filter.
typedef struct {
  vec *moments;
  real *centers;
  double *all_totals, *totals;
  int64_t held;
  int fresh;
} statistics_t;

// Sums of a filter's tile: it begins with `first`, whose lane 0 is an image also in the last block.
#define OPEN_MOMENTS(number, first)                                \
  vec *m = moments + 2 * (number);                                 \
  if (fresh) {                                                     \
    centers[number] = first[0];                                    \
    m[0] = m[1] = (vec){0};                                        \
  }                                                                \
  const vec c = splat(centers[number]);

// A chunk that begins has sums of its own.
INLINE void begin_chunk(statistics_t *s, int64_t chunk) {
  s->totals = s->all_totals + chunk * TOTALS;
  memset(s->totals, 0, 3 * RESULTS * sizeof(double));
  s->centers = (real *)(s->totals + 3 * RESULTS);
  s->fresh = 1;
}

NOINLINE void add_up(vec *restrict moments, double *restrict totals, long first, long end, int64_t positions,
                     int64_t lanes) {
  for (long f = first; f < end; ++f) {
    real s[2 * LANES];
    double sum = 0, square = 0;
    memcpy(s, moments + 2 * f, sizeof s);
    for (int l = 0; l < lanes; ++l) {
      sum += s[l];
      square += s[LANES + l];
    }
    totals[f] += sum;
    totals[RESULTS + f] += square;
    totals[2 * RESULTS + f] += (double)positions * lanes;
    moments[2 * f] = moments[2 * f + 1] = (vec){0};
  }
}

// The sums of all chunks become mean and variance; `me` of `all` threads takes its share of the filters.
NOINLINE void combine(const double *of, int64_t chunks, int64_t me, int64_t all, int64_t n, real *restrict mean,
                      real *restrict var) {
  const double count = (double)n * (DST_H * DST_W);
  for (long f = RESULTS * me / all; f < RESULTS * (me + 1) / all; ++f) {
    double sum = 0, square = 0, center = 0;
    for (int second = 0; second < 2; ++second) {
      const double *totals = of;
      for (int64_t t = 0; t < chunks; ++t, totals += TOTALS) {
        const double k = totals[2 * RESULTS + f];
        if (k == 0) continue;
        const double c = ((const real *)(totals + 3 * RESULTS))[f], d = c - center;
        if (second) square += totals[RESULTS + f] + d * (2 * totals[f] + k * d);
        else sum += totals[f] + k * c;
      }
      center = sum / count;
    }
    mean[f] = center;
    var[f] = square < 0 ? 0 : square / count;
  }
}
