// What windows are made of while they are computed with: the type `cell`, and the multiply-add on it.
//
// - No PAIRS: `cell` is `vec`, which bfloat16 is widened to.
// - PAIRS of bfloat16: AVX512_BF16's vdpbf16ps multiplies pairs of numbers and adds both products to a float32. Forward
//   and dgrad pair COLUMNS of the source that lie DISTANCE apart, side by side once a region is copied: taps that are
//   neighbors in a row become one instruction, a tap without a neighbor has a zero for the other. Wgrad pairs two
//   IMAGES, which lie side by side anyway. Without the instruction a pair is two multiply-adds: for tests, and slower.
#pragma once
#include "kernels/native/vector.h"

#define NONE 0
#define COLUMNS 1
#define IMAGES 2
#ifndef PAIRS
#define PAIRS NONE
#endif
#ifndef DISTANCE
#define DISTANCE 1L
#endif

#if PAIRS == COLUMNS
typedef bits cell;
typedef uint32_t weight;
#elif PAIRS == IMAGES
typedef stored cell;
typedef real weight;
#else
typedef vec cell;
typedef real weight;
#endif

#if PAIRS == IMAGES
typedef float sums_t __attribute__((vector_size(2 * LANES), aligned(2 * LANES), may_alias));
typedef uint32_t pair_bits __attribute__((vector_size(2 * LANES), aligned(2 * LANES), may_alias));
#define HALF_4 2
#define HALF_8 4
#define HALF_16 8
#define ADD_LANE_SUMS4 PASTE(add_sums4_, PASTE(HALF_, LANES))
#define LANE_SUM PASTE(sum, PASTE(HALF_, LANES))
#if LANES < 8  // Clang holds no operand of less than 16 bytes in a vector register.
#undef KEEP
#define KEEP(x) ((void)(x))
#endif
#else
typedef vec sums_t;
#if PAIRS == COLUMNS
typedef bits pair_bits;
#endif
#define ADD_LANE_SUMS4 add_lane_sums4
#define LANE_SUM lane_sum
#endif

#if PAIRS == NONE
#define MULTIPLY_ADD(sum, w, x) ((sum) += (w) * (x))
#elif defined(__AVX512BF16__) && LANES == 16
#define MULTIPLY_ADD(sum, w, x) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(x))
#else
#define LOW_HALVES(v) ((sums_t)((pair_bits)(v) << 16))
#define HIGH_HALVES(v) ((sums_t)((pair_bits)(v) & 0xffff0000))
#define MULTIPLY_ADD(sum, w, x) \
  ((sum) += LOW_HALVES(w) * LOW_HALVES(x), (sum) += HIGH_HALVES(w) * HIGH_HALVES(x))
#endif

#if PAIRS != IMAGES
INLINE cell all_lanes(weight w) { return w - (cell){0}; }
#endif

#if PAIRS == COLUMNS
// The low half of each lane from one cell, the high half from another.
INLINE cell blend(cell low, cell high) {
#if defined(__AVX512BW__) && LANES == 16
  cell both;
  __asm__("vpblendmw %2, %1, %0%{%3%}" : "=v"(both) : "v"(low), "v"(high), "Yk"(0xaaaaaaaau));
  return both;
#else
  return (low & 0xffff) | (high & 0xffff0000);
#endif
}
INLINE weight pair_of(float low, float high) { return round_bits(low) | (uint32_t)round_bits(high) << 16; }
#endif

// One row of a window of `cols` columns. Those from c0 to c1 lie in the source, zeros stand for the others. Of pairs,
// the second columns end with that of column c2.
INLINE void pack_row(cell *o, const stored *p, int c0, int c1, int c2, int cols) {
#if PAIRS == COLUMNS
  const int begin = c0 > DISTANCE ? c0 - DISTANCE : 0, both = c2 < c0 ? c0 : c2 < c1 ? c2 : c1;
  for (int j = 0; j < begin; ++j) o[j] = (cell){0};
  _Pragma("GCC unroll 18")
  for (int j = begin; j < c0; ++j) o[j] = j < c2 ? spread(p[j + DISTANCE]) << 16 : (cell){0};
  _Pragma("GCC unroll 18")
  for (int j = c0; j < both; ++j) o[j] = spread(p[j]) | spread(p[j + DISTANCE]) << 16;
  _Pragma("GCC unroll 18")
  for (int j = both; j < c1; ++j) o[j] = spread(p[j]);
#else
  (void)c2;
  for (int j = 0; j < c0; ++j) o[j] = (cell){0};
  _Pragma("GCC unroll 18")
  for (int j = c0; j < c1; ++j) {
#if PAIRS == IMAGES
    o[j] = p[j];
#else
    o[j] = widen(p[j]);
#endif
  }
#endif
  for (int j = c1; j < cols; ++j) o[j] = (cell){0};
}
