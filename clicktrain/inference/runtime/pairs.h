// Pairs of bfloat16 numbers, for AVX-512: two products and their sum in float32 at once.
#pragma once
#include "vectors.h"

typedef uint32_t halves __attribute__((vector_size(64)));

// Numbers rounded to bfloat16, in the lower halves of lanes and in the upper ones.
INLINE void put_halves(vec x, float *lower, float *upper) {
  const halves b = (halves)x, near = (b + 0x7fff + (b >> 16 & 1)) | (halves)(x != x);
  put(lower, (vec)(near >> 16));
  put(upper, (vec)(near & 0xffff0000u));
}
INLINE vec product(vec sum, vec x, vec weights) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weights);
}

// Two vectors of a channel as bfloat16 numbers: in each 128 bits four numbers of the first, then four of the second.
// So the lower halves of two channels' cells, interleaved as the processor does it, are pairs of the first vector, and
// the upper halves those of the second.
INLINE void put_cell(float *to, const vec *x, float unit) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
  (void)unit;
  put(to, (vec)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), both));
}
INLINE void interleave(const vec *cells, const int needed, vec *x) {
  if (needed & 1) x[0] = (vec)_mm512_unpacklo_epi16((__m512i)cells[0], (__m512i)cells[1]);
  if (needed & 2) x[1] = (vec)_mm512_unpackhi_epi16((__m512i)cells[0], (__m512i)cells[1]);
}
