// Which thread computes which regions, of forward and dgrad; what tiles are given.
//
// Of few regions (small images, few of them) each has several parts, some of the results, so that there is work for all
// threads. Regions, or parts, are cut into chunks, CHUNKS for each thread. A thread begins with its own, the same in
// every call, so that what it reads and writes tends to be in its caches and its memory; then it takes what others have
// not begun. A core that is slower, or busy with something else, holds nobody up for long. Results do not depend on
// who computed what, nor do the sums of statistics.h, which are kept by chunk.
#pragma once
#include "kernels/sparse_conv2d/blocked/shared/statistics.h"
#include "kernels/sparse_conv2d/blocked/shared/window_copy.h"

// Where tiles read a region's windows (WINDOWS): in the source itself; in a buffer that the region is copied to when it
// begins; or in one of two, to which it is copied while the region before it is computed.
#define IN_PLACE 1
#define COPIED_AT_ONCE 2
#define COPIED_BESIDE 3
#if WINDOWS == COPIED_BESIDE
typedef copy_t next_t;
#else
typedef ahead_t next_t;
#endif

// A block of results whose sums are ready: it is stored a result at a time while the next is computed. Stored at once,
// as many lines as the core can wait for would hold everything up.
typedef struct ready_t {
  void (*store)(struct ready_t *, long);
  const vec *sums;
  stored *y;
  long f, left;
  int64_t stream;
  int turn;
  vec *moments;
  real *centers;
  int fresh;
} ready_t;

// What a thread's tiles are computed with: results from `first` to `end`, and what is done beside for the next region.
typedef struct {
  const weight *values;
  const real *bias;
  const int32_t *rows;
  const ENTRY *entries;
  vec *sums;
  long first, end;
  int64_t stream;
  next_t ahead;
  ready_t ready;
  statistics_t statistics;
} work_t;

// Chunks of a thread that nobody has taken, on a cache line of their own.
typedef struct {
  int64_t next, end;
} __attribute__((aligned(64))) share_t;

// The next chunk of one's own, or of somebody else's; -1 if all are taken.
NOINLINE int64_t take(share_t *shares, int64_t me, int64_t threads) {
  for (int64_t i = 0; i < threads; ++i) {
    share_t *s = shares + (me + i) % threads;
    if (__atomic_load_n(&s->next, __ATOMIC_RELAXED) >= s->end) continue;
    const int64_t chunk = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
    if (chunk < s->end) return chunk;
  }
  return -1;
}

// Bring a thread's share of `count` weights into their order: `places` of `packed`, of pairs two for each weight. One
// past the last stands for a zero.
NOINLINE void order_each(weight *ordered, const real *packed, const int32_t *order, int64_t count, int64_t places,
                         int64_t me, int64_t all) {
  for (int64_t i = count * me / all; i < count * (me + 1) / all; ++i) {
#if PAIRS == COLUMNS
    const int64_t low = order[2 * i], high = order[2 * i + 1];
    ordered[i] = pair_of(low < places ? packed[low] : 0, high < places ? packed[high] : 0);
#else
    (void)places;
    ordered[i] = packed[order[i]];
#endif
  }
}
