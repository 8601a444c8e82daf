// What is multiplied: one number of float32 in a lane, PAIRS of bfloat16 or FOURS of int8, of as many kernels. What
// such a kernel reads lies in cells of as many vectors, rounded, in the space of one.
#pragma once
#include "vectors.h"
#if defined(FOURS)
#define TOGETHER 4
#include "fours.h"
#elif defined(PAIRS)
#define TOGETHER 2
#include "pairs.h"
#else
#define TOGETHER 1
INLINE vec weight_of(const float *weight) { return splat(*weight); }
INLINE vec product(vec sum, vec x, vec weight) { return sum + weight * x; }
INLINE void put_cell(float *to, const vec *x, float unit) {
  (void)unit;
  put(to, *x);
}
INLINE void interleave(const vec *cells, const int needed, vec *x) {
  (void)needed;
  x[0] = cells[0];
}
#endif
#if TOGETHER > 1
// As an integer: by itself an entry may look like a float that is no normal one.
INLINE vec weight_of(const float *entry) {
  int32_t all;
  memcpy(&all, entry, sizeof all);
  return (vec)_mm512_set1_epi32(all);
}
#endif
#define ENTRY (1 + TOGETHER)  // numbers of a kernel, or several: set of taps, channels

// Sums in float32. They begin with what is there already; integers begin at zero, and it is added in the end.
#ifdef FOURS
INLINE vec scale_of(const float *scales, int filter) { return splat(scales[filter]); }
INLINE vec begun(vec before) {
  (void)before;
  return (vec){0};
}
INLINE vec scaled(vec sum, vec scale) { return numbers_of(sum) * scale; }
INLINE vec ended(vec sum, vec scale, vec before) { return scaled(sum, scale) + before; }
INLINE vec added(vec a, vec b) { return (vec)((ivec)a + (ivec)b); }
#else
INLINE vec scale_of(const float *scales, int filter) {
  (void)scales;
  (void)filter;
  return (vec){0};
}
INLINE vec begun(vec before) { return before; }
INLINE vec scaled(vec sum, vec scale) {
  (void)scale;
  return sum;
}
INLINE vec ended(vec sum, vec scale, vec before) {
  (void)scale;
  (void)before;
  return sum;
}
INLINE vec added(vec a, vec b) { return a + b; }
#endif
