// What both kinds of wgrad share: the work of a thread.
#pragma once
#include "kernels/sparse_conv2d/blocked/shared/window_copy.h"

typedef struct {
  const stored *x, *gy;
  const int32_t *rows;
  const ENTRY *entries;
  const int64_t *chunks;
  cell *buffer;
  real *sums;
  int64_t blocks, whole, parts;
} work_t;

// (first entry, last entry, first value) of a part, and of the last part to be computed with it.
#define FIRST_CHUNK(work, part) ((work)->chunks + 2 + 3 * (part))
#define LAST_CHUNK(work, part) FIRST_CHUNK(work, (work)->whole ? (work)->chunks[0] - 1 : (part))
