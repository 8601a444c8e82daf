// Fours of int8 numbers, for AVX-512 with VNNI: four products and their sum in int32 at once. Inputs are numbers from 0
// to 255 in steps of 1 / `unit`, weights from -127 to 127.
#pragma once
#include "vectors.h"

INLINE vec product(vec sum, vec x, vec weights) {
  return (vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weights);
}
INLINE vec numbers_of(vec sum) { return (vec)_mm512_cvtepi32_ps((__m512i)sum); }

// Four vectors of a channel: in each 128 bits four numbers of the first, then four of the second, and so on. What is
// beyond the largest number, or none, becomes the largest.
INLINE void put_cell(float *to, const vec *x, float unit) {
  __m512i n[4];
  UNROLL for (int k = 0; k < 4; ++k)
    n[k] = _mm512_cvtps_epi32(_mm512_min_ps((__m512)(x[k] * unit), _mm512_set1_ps(255)));
  put(to, (vec)_mm512_packus_epi16(_mm512_packus_epi32(n[0], n[1]), _mm512_packus_epi32(n[2], n[3])));
}
// Of four channels' cells, the four vectors with numbers of all channels side by side, as far as they are needed, a bit
// each.
INLINE void interleave(const vec *cells, const int needed, vec *x) {
  const __m512i a = (__m512i)cells[0], b = (__m512i)cells[1], c = (__m512i)cells[2], d = (__m512i)cells[3];
  if (needed & 3) {
    const __m512i both = _mm512_unpacklo_epi8(a, b), others = _mm512_unpacklo_epi8(c, d);
    if (needed & 1) x[0] = (vec)_mm512_unpacklo_epi16(both, others);
    if (needed & 2) x[1] = (vec)_mm512_unpackhi_epi16(both, others);
  }
  if (needed & 12) {
    const __m512i both = _mm512_unpackhi_epi8(a, b), others = _mm512_unpackhi_epi8(c, d);
    if (needed & 4) x[2] = (vec)_mm512_unpacklo_epi16(both, others);
    if (needed & 8) x[3] = (vec)_mm512_unpackhi_epi16(both, others);
  }
}
