// Windows of max pooling on one plane [H, W, V]: their maxima, and gradients back to where these come from.
//
// Each result keeps, in one to eight bytes, which tap of its window it comes from. With that the backward pass
// reads neither input nor result: each position of the input collects from the windows that it lies in, and is
// written once. Windows of 2x2 and 3x3 with stride 2 have code that knows them.
#pragma once
#include "kernels/native/vector.h"

// The narrowest integers that fill 128 bits: conversions to less than that are made lane by lane.
#if LANES >= 16
typedef int8_t tap_t;
#elif LANES == 8
typedef int16_t tap_t;
#elif LANES == 4
typedef int32_t tap_t;
#else
typedef int64_t tap_t;
#endif
typedef tap_t taps_t __attribute__((vector_size(LANES * sizeof(tap_t))));

// Two rows that are read side by side end before the processor has learned how they go on: the next ones are fetched
// by hand, after the last rows of a plane those of the one that comes `next`.
#define ROWS_AHEAD 4

#define WINDOW kh, kw, sh, sw, ph, pw, dh, dw
#define SIZES int h, int w, int oh, int ow, int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw

#if defined(__clang__) || __GNUC__ >= 9
INLINE void put_taps(taps_t *to, ivec taps) { *to = __builtin_convertvector(taps, taps_t); }
INLINE ivec taps_at(const taps_t *from) { return __builtin_convertvector(*from, ivec); }
#else
INLINE void put_taps(taps_t *to, ivec taps) { for (int l = 0; l < LANES; ++l) (*to)[l] = taps[l]; }
INLINE ivec taps_at(const taps_t *from) {
  ivec taps;
  for (int l = 0; l < LANES; ++l) taps[l] = (*from)[l];
  return taps;
}
#endif

// The larger one and its tap. A NaN wins, and the first of equal ones, as for torch.
INLINE void larger(vec *most, ivec *tap, vec v, int number) {
  const ivec take = (ivec)(v > *most) | (ivec)(v != v), own = number - (ivec){0};
  *most = (vec)(((ivec)v & take) | ((ivec)*most & ~take));
  *tap = (own & take) | (*tap & ~take);
}
INLINE void put(stored *y, taps_t *taps, vec most, ivec tap) {
  *y = narrow(most);
  if (taps) put_taps(taps, tap);
}
// The window of result (i, j); `taps` may be null here and below.
INLINE void pooled_one(const stored *restrict x, stored *restrict y, taps_t *restrict taps, int i, int j, SIZES) {
  const int r = i * sh - ph, c = j * sw - pw;
  // Taps inside the image: from a0 to a1 and b0 to b1.
  const int a0 = r < 0 ? (-r + dh - 1) / dh : 0, b0 = c < 0 ? (-c + dw - 1) / dw : 0;
  const int a1 = r + (kh - 1) * dh < h ? kh : (h - r + dh - 1) / dh;
  const int b1 = c + (kw - 1) * dw < w ? kw : (w - c + dw - 1) / dw;
  const stored *from = x + (int64_t)r * w + c;
  vec most = splat(-INFINITY);
  ivec tap = a0 * kw + b0 - (ivec){0};
  if (a0 == 0 && b0 == 0 && a1 == kh && b1 == kw) {
    for (int a = 0; a < kh; ++a) for (int b = 0; b < kw; ++b)
      larger(&most, &tap, widen(from[(int64_t)a * dh * w + b * dw]), a * kw + b);
  } else {
    for (int a = a0; a < a1; ++a) for (int b = b0; b < b1; ++b)
      larger(&most, &tap, widen(from[(int64_t)a * dh * w + b * dw]), a * kw + b);
  }
  put(y, taps, most, tap);
}
INLINE void pooled(const stored *restrict x, stored *restrict y, taps_t *restrict taps, SIZES) {
  for (int i = 0; i < oh; ++i) for (int j = 0; j < ow; ++j) {
    const int64_t at = (int64_t)i * ow + j;
    pooled_one(x, y + at, taps ? taps + at : 0, i, j, h, w, oh, ow, WINDOW);
  }
}
// Four taps one after the other, without loops over them.
INLINE void pooled_fours(const stored *restrict x, const stored *next, stored *restrict y, taps_t *restrict taps,
                         int h, int w, int oh, int ow, const int keep) {
  // With the rounding up of sizes the last ones reach over the edge.
  const int rows = min64(oh, h / 2), columns = min64(ow, w / 2);
  for (int i = 0; i < rows; ++i) {
    const stored *upper = x + (int64_t)i * 2 * w, *lower = upper + w;
    const int far = 2 * i + ROWS_AHEAD;
    const stored *ahead = far < h ? x + (int64_t)far * w : next + (int64_t)min64(far - h, h - 2) * w;
    for (int j = 0; j < columns; ++j) {
      for (int byte = 0; byte < 4 * STORED_BYTES; byte += 64) FETCH((const char *)(ahead + 4 * j) + byte);
      vec most = widen(upper[2 * j]);
      ivec tap = {0};
      larger(&most, &tap, widen(upper[2 * j + 1]), 1);
      larger(&most, &tap, widen(lower[2 * j]), 2);
      larger(&most, &tap, widen(lower[2 * j + 1]), 3);
      put(y + (int64_t)i * ow + j, keep ? taps + (int64_t)i * ow + j : 0, most, tap);
    }
  }
  for (int i = 0; i < oh; ++i) for (int j = i < rows ? columns : 0; j < ow; ++j) {
    const int64_t at = (int64_t)i * ow + j;
    pooled_one(x, y + at, keep ? taps + at : 0, i, j, h, w, oh, ow, 2, 2, 2, 2, 0, 0, 1, 1);
  }
}
// Taps in integers as wide as activations, which are moved as they are.
typedef number_bits bits_of_numbers __attribute__((vector_size(STORED_BYTES), may_alias));
#if defined(__clang__) || __GNUC__ >= 9
INLINE bits_of_numbers narrow_taps(const taps_t *from) { return __builtin_convertvector(*from, bits_of_numbers); }
#else
INLINE bits_of_numbers narrow_taps(const taps_t *from) {
  bits_of_numbers taps;
  for (int l = 0; l < LANES; ++l) taps[l] = (*from)[l];
  return taps;
}
#endif
INLINE void deal(stored *to, bits_of_numbers g, bits_of_numbers tap, int number) {
  *to = (stored)(g & (bits_of_numbers)(tap == (number_bits)number));
}
// Windows that lie side by side and do not overlap: each writes its own positions.
INLINE void dealt(const stored *restrict gy, const taps_t *restrict taps, stored *restrict gx, int h, int w,
                  int oh, int ow, int kh, int kw) {
  const stored none = {0};
  for (int i = 0; i < oh; ++i) {
    for (int j = 0; j < ow; ++j, ++gy, ++taps) {
      const bits_of_numbers g = (bits_of_numbers)*gy, tap = narrow_taps(taps);
      stored *to = gx + (int64_t)i * kh * w + j * kw;
      // With the rounding up of sizes the last ones reach over the edge.
      const int a1 = min64(kh, h - i * kh), b1 = min64(kw, w - j * kw);
      if (kh == 2 && kw == 2 && a1 == 2 && b1 == 2) {
        deal(to, g, tap, 0), deal(to + 1, g, tap, 1), deal(to + w, g, tap, 2), deal(to + w + 1, g, tap, 3);
      } else {
        for (int a = 0; a < a1; ++a) for (int b = 0; b < b1; ++b) deal(to + a * w + b, g, tap, a * kw + b);
      }
    }
    for (int a = 0; a < kh && i * kh + a < h; ++a)
      for (int c = ow * kw; c < w; ++c) gx[(int64_t)(i * kh + a) * w + c] = none;
  }
  for (int64_t at = (int64_t)oh * kh * w; at < (int64_t)h * w; ++at) gx[at] = none;
}
// Columns of which sums are held at a time: rounded once, wherever they come from.
#define COLUMNS_AT_ONCE 256
// Positions of a row that lie sw apart are the same tap of neighboring windows: a plain loop for each tap, over
// results from j0 to j1.
INLINE void collected(const stored *restrict gy, const taps_t *restrict taps, stored *restrict gx, SIZES) {
  vec sums[COLUMNS_AT_ONCE];
  for (int r = 0; r < h; ++r) for (int c0 = 0; c0 < w; c0 += COLUMNS_AT_ONCE) {
    const int c1 = min64(c0 + COLUMNS_AT_ONCE, w);
    for (int c = c0; c < c1; ++c) sums[c - c0] = (vec){0};
    for (int a = 0; a < kh; ++a) {
      const int down = r + ph - a * dh;
      if (down < 0 || down % sh || down / sh >= oh) continue;
      const stored *g = gy + (int64_t)(down / sh) * ow;
      const taps_t *t = taps + (int64_t)(down / sh) * ow;
      for (int b = 0; b < kw; ++b) {
        // Result j reads column j * sw + left.
        const int left = b * dw - pw, number = a * kw + b;
        const int j0 = left < c0 ? (c0 - left + sw - 1) / sw : 0;
        const int j1 = left < c1 ? min64((c1 - left + sw - 1) / sw, ow) : 0;
        // Bits, not products: what goes elsewhere may be a NaN.
        for (int j = j0; j < j1; ++j)
          sums[j * sw + left - c0] += (vec)((ivec)widen(g[j]) & (taps_at(t + j) == number));
      }
    }
    for (int c = c0; c < c1; ++c) gx[(int64_t)r * w + c] = narrow(sums[c - c0]);
  }
}
#define KIND(name, ...) \
  NOINLINE void pooled_##name(const stored *x, const stored *next, stored *y, taps_t *taps, SIZES) { \
    (void)next; \
    pooled(x, y, taps, h, w, oh, ow, __VA_ARGS__); } \
  NOINLINE \
  void collected_##name(const stored *gy, const taps_t *taps, stored *gx, SIZES) { \
    collected(gy, taps, gx, h, w, oh, ow, __VA_ARGS__); }
NOINLINE
void dealt_any(const stored *gy, const taps_t *taps, stored *gx, SIZES) {
  dealt(gy, taps, gx, h, w, oh, ow, kh, kw);
}
NOINLINE
void dealt_two(const stored *gy, const taps_t *taps, stored *gx, SIZES) {
  dealt(gy, taps, gx, h, w, oh, ow, 2, 2);
}
NOINLINE
void pooled_two(const stored *x, const stored *next, stored *y, taps_t *taps, SIZES) {
  if (taps) pooled_fours(x, next, y, taps, h, w, oh, ow, 1);
  else pooled_fours(x, next, y, taps, h, w, oh, ow, 0);
}
KIND(any, WINDOW)
KIND(three, 3, 3, 2, 2, 1, 1, 1, 1)

// The kind of code for a window: 1 and 2 know it.
static int kind_of(int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw) {
  if (sh != 2 || sw != 2 || dh != 1 || dw != 1) return 0;
  if (kh == 2 && kw == 2 && ph == 0 && pw == 0) return 1;
  return kh == 3 && kw == 3 && ph == 1 && pw == 1 ? 2 : 0;
}
typedef void pooled_t(const stored *, const stored *, stored *, taps_t *, SIZES);
typedef void collected_t(const stored *, const taps_t *, stored *, SIZES);

static pooled_t *pooling(int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw) {
  static pooled_t *const kinds[] = {pooled_any, pooled_two, pooled_three};
  return kinds[kind_of(WINDOW)];
}
static collected_t *collecting(int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw) {
  static collected_t *const kinds[] = {collected_any, dealt_two, collected_three};
  const int apart = kh == sh && kw == sw && ph == 0 && pw == 0 && dh == 1 && dw == 1;
  const int kind = kind_of(WINDOW);
  return kind == 0 && apart ? dealt_any : kinds[kind];
}
