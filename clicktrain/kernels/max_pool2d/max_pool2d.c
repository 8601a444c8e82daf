// Max pooling of activations [B, C, H, W, V]: forward and backward. LANES and DTYPE as in vector.h.
//
// Each result keeps, in one to eight bytes, which tap of its window it comes from. With that the backward pass
// reads neither input nor result: each position of the input collects from the windows that it lies in, and is
// written once. Windows of 2x2 and 3x3 with stride 2 have code that knows them.
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
INLINE void pooled(const stored *restrict x, stored *restrict y, taps_t *restrict taps, SIZES) {
  for (int i = 0; i < oh; ++i) for (int j = 0; j < ow; ++j, ++y, ++taps) {
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
    *y = narrow(most);
    put_taps(taps, tap);
  }
}
// Windows that lie side by side and do not overlap: each writes its own positions.
INLINE void dealt(const stored *restrict gy, const taps_t *restrict taps, stored *restrict gx, int h, int w,
                   int oh, int ow, int kh, int kw) {
  const stored none = narrow((vec){0});
  for (int i = 0; i < oh; ++i) {
    for (int j = 0; j < ow; ++j, ++gy, ++taps) {
      const ivec g = (ivec)widen(*gy), tap = taps_at(taps);
      stored *to = gx + (int64_t)i * kh * w + j * kw;
      // With the rounding up of sizes the last ones reach over the edge.
      const int a1 = min64(kh, h - i * kh), b1 = min64(kw, w - j * kw);
      if (a1 == kh && b1 == kw) {
        for (int a = 0; a < kh; ++a) for (int b = 0; b < kw; ++b)
          to[a * w + b] = narrow((vec)(g & (tap == a * kw + b)));
      } else {
        for (int a = 0; a < a1; ++a) for (int b = 0; b < b1; ++b)
          to[a * w + b] = narrow((vec)(g & (tap == a * kw + b)));
      }
    }
    for (int a = 0; a < kh && i * kh + a < h; ++a)
      for (int c = ow * kw; c < w; ++c) gx[(int64_t)(i * kh + a) * w + c] = none;
  }
  for (int64_t at = (int64_t)oh * kh * w; at < (int64_t)h * w; ++at) gx[at] = none;
}
// Columns of which sums are held at a time: rounded once, wherever they come from.
#define PIECE 256
// Positions of a row that lie sw apart are the same tap of neighboring windows: a plain loop for each tap, over
// results from j0 to j1.
INLINE void collected(const stored *restrict gy, const taps_t *restrict taps, stored *restrict gx, SIZES) {
  vec sums[PIECE];
  for (int r = 0; r < h; ++r) for (int c0 = 0; c0 < w; c0 += PIECE) {
    const int c1 = min64(c0 + PIECE, w);
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
  NOINLINE void pooled_##name(const stored *x, stored *y, taps_t *taps, SIZES) { \
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
KIND(any, WINDOW)
KIND(two, 2, 2, 2, 2, 0, 0, 1, 1)
KIND(three, 3, 3, 2, 2, 1, 1, 1, 1)

// The kind of code for a window: 1 and 2 know it.
static int kind_of(int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw) {
  if (sh != 2 || sw != 2 || dh != 1 || dw != 1) return 0;
  if (kh == 2 && kw == 2 && ph == 0 && pw == 0) return 1;
  return kh == 3 && kw == 3 && ph == 1 && pw == 1 ? 2 : 0;
}
typedef void pooled_t(const stored *, stored *, taps_t *, SIZES);
typedef void collected_t(const stored *, const taps_t *, stored *, SIZES);

int forward(const stored *x, stored *y, taps_t *taps, int64_t h, int64_t w, int64_t oh, int64_t ow,
            int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw,
            int64_t planes, int64_t threads) {
  static pooled_t *const kinds[] = {pooled_any, pooled_two, pooled_three};
  pooled_t *const run = kinds[kind_of(WINDOW)];
  PARALLEL_FOR
  for (int64_t p = 0; p < planes; ++p)
    run(x + p * h * w, y + p * oh * ow, taps + p * oh * ow, h, w, oh, ow, WINDOW);
  return 0;
}
int backward(const stored *gy, const taps_t *taps, stored *gx, int64_t h, int64_t w, int64_t oh, int64_t ow,
             int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw,
             int64_t planes, int64_t threads) {
  static collected_t *const kinds[] = {collected_any, dealt_two, collected_three};
  const int apart = kh == sh && kw == sw && ph == 0 && pw == 0 && dh == 1 && dw == 1;
  const int kind = kind_of(WINDOW);
  collected_t *const run = kind == 0 && apart ? dealt_any : kinds[kind];
  PARALLEL_FOR
  for (int64_t p = 0; p < planes; ++p)
    run(gy + p * oh * ow, taps + p * oh * ow, gx + p * h * w, h, w, oh, ow, WINDOW);
  return 0;
}
