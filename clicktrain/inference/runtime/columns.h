// FORM_COLUMNS (runtime.h): 3x3 convolutions of one image, of stride 1 or 2, with sums of their own for each column of
// the kernel; for AVX-512, with numbers as cells.h has them.
#pragma once
#include "cells.h"

#define MOST 8  // vectors of a strip
typedef struct {
  const float *region, *packed, *bias, *residual;  // residual: NULL without
  const float *scales;       // of filters, for integers
  float unit;                // of inputs, likewise
  const uint16_t *kernels;   // ENTRY numbers each
  const model_filter *filters;
  float *out;
  int64_t plane, width, channel;
  int begin, end, act;
  float low, high;
} strip;

// Taps of a set that see row `y` of a strip, of stride 2.
INLINE int taps_of_row(const int set, const int y, const int rows) {
  int taps = 0;
  UNROLL for (int r = 0; r < 3; ++r)
    if (y >= r && (y - r) % 2 == 0 && y - r < 2 * rows) taps |= set & 7 << (3 * r);
  return taps;
}

// A cell of a kernel's input: the vectors of it that are needed, a bit each.
INLINE void get_cell(const strip *t, const uint16_t *kernel, int64_t number, const int needed, vec *x) {
  vec cells[TOGETHER];
  UNROLL for (int k = 0; k < TOGETHER; ++k) {
    cells[k] = get(t->region + kernel[1 + k] * t->channel + number * LANES);
    x[k] = (vec){0};
  }
  interleave(cells, needed, x);
}

// One kernel, or several: rows of its input are loaded once, for all its taps.
INLINE const float *multiply_set(const strip *t, const uint16_t *kernel, const float *weights, const int set,
                                 const int rows, const int wide, vec sums[3][MOST]) {
  vec x[(MOST + 2) * 2 + TOGETHER];
  UNROLL for (int n = 0; n < (rows + 2) * wide; n += TOGETHER) {
    // Whether any tap needs the row of each.
    int needed = 0;
    UNROLL for (int j = 0; j < TOGETHER; ++j) {
      const int r = (n + j) / wide;
      UNROLL for (int k = 0; k < 3; ++k)
        if (r >= k && r < rows + k && set >> (3 * k) & 7) needed |= 1 << j;
    }
    if (needed) get_cell(t, kernel, n / TOGETHER, needed, x + n);
  }
  UNROLL for (int k = 0; k < 9; ++k) {
    if (!(set >> k & 1)) continue;
    const vec weight = weight_of(weights++);
    UNROLL for (int j = 0; j < rows * wide; ++j)
      sums[k % 3][j] = product(sums[k % 3][j], x[k / 3 * wide + j], weight);
  }
  return weights;
}

// The same for stride 2: of even columns the middle of a kernel takes, of odd ones its sides, of which the right one
// needs no moving and is summed with the middle.
INLINE const float *multiply_set_2(const strip *t, const uint16_t *kernel, const float *weights, const int set,
                                   const int rows, const int wide, vec sums[3][MOST]) {
  const float *weight[9];
  vec x[TOGETHER];
  UNROLL for (int k = 0; k < 9; ++k) {
    weight[k] = weights;
    weights += set >> k & 1;
  }
  UNROLL for (int y = 0; y < 2 * rows + 1; ++y) {
    UNROLL for (int i = 0; i < 2 * wide; ++i) {  // vectors of even and of odd columns take turns
      const int n = y * 2 * wide + i, taps = taps_of_row(set, y, rows) & (i % 2 ? 0555 : 0222);
      if (n % TOGETHER == 0) {
        int needed = 0;
        UNROLL for (int j = 0; j < TOGETHER; ++j)
          if (taps_of_row(set, (n + j) / (2 * wide), rows) & ((n + j) % 2 ? 0555 : 0222)) needed |= 1 << j;
        if (needed) get_cell(t, kernel, n / TOGETHER, needed, x);
      }
      UNROLL for (int k = 0; k < 9; ++k) {
        if (!(taps >> k & 1)) continue;
        const int side = k % 3 ? 1 : 0, j = (y - k / 3) / 2 * wide + i / 2;
        sums[side][j] = product(sums[side][j], x[n % TOGETHER], weight_of(weight[k]));
      }
    }
  }
  return weights;
}

#if defined(__clang__)
#define BOTH(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BOTH(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
// Lanes of two vectors that follow each other, from the last of the first on; from the second of the first on.
INLINE vec from_last(vec a, vec b) {
  return (vec)BOTH(a, b, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30);
}
INLINE vec evens(vec a, vec b) {
  return (vec)BOTH(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
INLINE vec odds(vec a, vec b) { return (vec)BOTH(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31); }
INLINE vec from_second(vec a, vec b) { return (vec)BOTH(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16); }

INLINE void end_filter(const strip *t, int filter, const int rows, const int wide, const int stride,
                       vec sums[3][MOST]) {
  const vec bias = splat(t->bias[filter]), zero = {0};
  const vec scale = scale_of(t->scales, filter);
  float *out = t->out + filter * t->plane;
  const float *residual = t->residual ? t->residual + filter * t->plane : NULL;
  UNROLL for (int i = 0; i < rows; ++i) {
    UNROLL for (int j = 0; j < wide; ++j) {
      const int n = i * wide + j;
      const vec left = from_last(j > 0 ? sums[0][n - 1] : zero, sums[0][n]);
      const vec right = stride == 1 ? from_second(sums[2][n], j + 1 < wide ? sums[2][n + 1] : zero) : zero;
      const int64_t at = i * t->width + j * LANES, count = t->width - j * LANES;
      vec z = bias + scaled(added(sums[1][n], added(left, right)), scale);
      if (count >= LANES) {
        if (residual) z += get(residual + at);
        put(out + at, activate(z, t->act, t->low, t->high));
      } else {
        if (residual) z += get(residual + at);
        z = activate(z, t->act, t->low, t->high);
        const unsigned lanes = (1u << count) - 1;
        __asm__ volatile("kmovw %2, %%k1\n\tvmovups %1, (%0) %{%%k1%}"
                         : : "r"(out + at), "v"(z), "r"(lanes) : "memory", "k1");
      }
    }
  }
}

INLINE void strip_of(const strip *t, const int rows, const int wide, const int stride) {
  for (int filter = t->begin; filter < t->end; ++filter) {
    const uint16_t *kernel = t->kernels + ENTRY * t->filters[filter].kernel;
    const uint16_t *end = t->kernels + ENTRY * t->filters[filter + 1].kernel;
    const float *weights = t->packed + t->filters[filter].value;
    vec sums[3][MOST];
    UNROLL for (int k = 0; k < rows * wide; ++k) sums[0][k] = sums[1][k] = sums[2][k] = (vec){0};
    for (; kernel < end; kernel += ENTRY) {
      switch (*kernel) {
#define SET(N)                                                                                \
  case N:                                                                                     \
    weights = stride == 1 ? multiply_set(t, kernel, weights, N, rows, wide, sums)             \
                          : multiply_set_2(t, kernel, weights, N, rows, wide, sums);          \
    break;
#include "sets.h"
#undef SET
        default: __builtin_unreachable();
      }
    }
    end_filter(t, filter, rows, wide, stride, sums);
  }
}

#define SET(N)
#include "sets.h"  // which strips are needed
#undef SET
#define STRIPS(DO)                                                                          \
  DO(MODEL_HAS_COLUMNS_1, 6, 1, 1) DO(MODEL_HAS_COLUMNS_1, 4, 1, 1)                         \
  DO(MODEL_HAS_COLUMNS_2, 3, 2, 1) DO(MODEL_HAS_COLUMNS_2, 2, 2, 1)                         \
  DO(MODEL_HAS_COLUMNS_4, 1, 4, 1)                                                          \
  DO(MODEL_HAS_COLUMNS_1_STRIDE_2, 7, 1, 2) DO(MODEL_HAS_COLUMNS_1_STRIDE_2, 4, 1, 2)       \
  DO(MODEL_HAS_COLUMNS_2_STRIDE_2, 4, 2, 2) DO(MODEL_HAS_COLUMNS_2_STRIDE_2, 2, 2, 2)       \
  DO(MODEL_HAS_COLUMNS_4_STRIDE_2, 2, 4, 2) DO(MODEL_HAS_COLUMNS_4_STRIDE_2, 1, 4, 2)
#define FUNCTION(HAS, I, J, S) NOINLINE void strip_##I##_##J##_##S(const strip *t) { strip_of(t, I, J, S); }
STRIPS(FUNCTION)
// [stride - 1][rows][vectors in a row]; what is not needed is not compiled.
#define POINTER(HAS, I, J, S) [S - 1][I][J] = HAS ? strip_##I##_##J##_##S : NULL,
static void (*const strips[2][8][5])(const strip *) = {STRIPS(POINTER)};

// Vector j of a row, zero where it is outside: of stride 2, of its even columns, then of odd ones.
INLINE vec taken(const float *from, int width, int j, const int stride, const int odd) {
  const int count = least_int((stride == 2 ? (width + 1 - odd) / 2 : width) - j * LANES, LANES);
  if (count <= 0) return (vec){0};
  vec x = get(from + stride * j * LANES);
  if (stride == 2) {
    const vec next = get(from + (stride * j + 1) * LANES);
    x = odd ? odds(x, next) : evens(x, next);
  }
  if (count == LANES) return x;
  ivec lanes;
  for (int k = 0; k < LANES; ++k) lanes[k] = k < count ? -1 : 0;
  return only(x, lanes);
}

// Rows y0 .. y0 + rows of all channels, zero outside of the image: whole cells.
INLINE void fill_strip(const model_value *in, const float *image, int64_t plane, int y0, int rows, int wide,
                       const int stride, float unit, float *to) {
  for (int c = 0; c < in->channels; ++c, image += plane) {
    for (int n = 0; n < rows * wide * stride; n += TOGETHER, to += LANES) {
      vec x[TOGETHER];
      for (int j = 0; j < TOGETHER; ++j) {
        const int number = (n + j) / stride, y = y0 + number / wide, inside = number < rows * wide;
        const float *from = image + (int64_t)y * in->width;
        x[j] = inside && y >= 0 && y < in->height ? taken(from, in->width, number % wide, stride, (n + j) % stride)
                                                  : (vec){0};
      }
      put_cell(to, x, unit);
    }
  }
}

static void run_columns(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                       const float *bias, const float *image, const float *residual, float *results, float *region,
                       model_worker worker) {
  const int64_t plane = model_plane(in, SINGLE);
  const int stride = op->stride[0];
  const int count = (out->height + plan->rows - 1) / plan->rows;
  strip t = {.region = region, .packed = plan->packed, .bias = bias, .scales = plan->scales,
             .unit = model_unit(op), .kernels = plan->offsets, .filters = plan->filters,
             .plane = model_plane(out, SINGLE), .width = out->width, .channel = plan->channel, .begin = 0,
             .end = out->channels,
             .act = op->act, .low = op->low, .high = op->high};
  // Threads share strips, if none overlaps another, else filters.
  int first = 0, end = count;
  if (out->height % plan->rows == 0 && (count % worker.count == 0 || count >= 4 * worker.count)) {
    first = count * worker.number / worker.count;
    end = count * (worker.number + 1) / worker.count;
  } else {
    t.begin = (int)((int64_t)out->channels * worker.number / worker.count);
    t.end = (int)((int64_t)out->channels * (worker.number + 1) / worker.count);
  }
  for (int n = first; n < end; ++n) {
    const int y = least_int(n * plan->rows, out->height - plan->rows);
    if (stride == 1) fill_strip(in, image, plane, y - 1, plan->rows + 2, plan->cols, 1, t.unit, region);
    else fill_strip(in, image, plane, 2 * y - 1, 2 * plan->rows + 1, plan->cols, 2, t.unit, region);
    t.out = results + (int64_t)y * out->width;
    t.residual = residual ? residual + (int64_t)y * out->width : NULL;
    strips[stride - 1][plan->rows][plan->cols](&t);
  }
}
