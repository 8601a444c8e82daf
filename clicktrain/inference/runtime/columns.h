// FORM_COLUMNS (runtime.h): 3x3 convolutions of one image, with sums of their own for each column of the kernel; for
// AVX-512, with numbers of float32 or PAIRS of bfloat16.
#pragma once
#include "taps.h"

#define MOST 6  // vectors of a strip
typedef struct {
  const float *region, *uppers, *packed, *bias, *residual;  // uppers: of pairs, the region again, in the upper halves
  const uint16_t *kernels;   // ENTRY numbers each: set of taps, channel; of a pair, the second channel
  const model_filter *filters;
  float *out;
  int64_t plane, width, channel;
  int begin, end, act;
  float low, high;
} strip;

#ifdef PAIRS
#define ENTRY 3
INLINE vec input(const strip *t, const uint16_t *kernel, int64_t at) {
  return (vec)((ivec)get(t->region + kernel[1] * t->channel + at) | (ivec)get(t->uppers + kernel[2] * t->channel + at));
}
#else
#define ENTRY 2
INLINE vec input(const strip *t, const uint16_t *kernel, int64_t at) {
  return get(t->region + kernel[1] * t->channel + at);
}
#endif

// One kernel, or a pair: rows of its input are loaded once, for all its taps.
INLINE const float *multiply_set(const strip *t, const uint16_t *kernel, const float *weights, const int set,
                                 const int rows, const int wide, vec sums[3][MOST]) {
  vec x[(MOST + 2) * 2];
  UNROLL for (int r = 0; r < rows + 2; ++r) {
    // Whether any tap needs this row.
    int needed = 0;
    UNROLL for (int k = 0; k < 3; ++k) needed |= r >= k && r < rows + k && set >> (3 * k) & 7;
    UNROLL for (int j = 0; j < wide; ++j) {
      x[r * wide + j] = needed ? input(t, kernel, (r * wide + j) * LANES) : (vec){0};
    }
  }
  UNROLL for (int k = 0; k < 9; ++k) {
    if (!(set >> k & 1)) continue;
    UNROLL for (int j = 0; j < rows * wide; ++j)
      sums[k % 3][j] = multiplied(sums[k % 3][j], x[k / 3 * wide + j], weights);
    ++weights;
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
INLINE vec from_second(vec a, vec b) { return (vec)BOTH(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16); }

INLINE void end_filter(const strip *t, int filter, const int rows, const int wide, vec sums[3][MOST]) {
  const vec bias = splat(t->bias[filter]), zero = {0};
  float *out = t->out + filter * t->plane;
  const float *residual = t->residual ? t->residual + filter * t->plane : NULL;
  UNROLL for (int i = 0; i < rows; ++i) {
    UNROLL for (int j = 0; j < wide; ++j) {
      const int n = i * wide + j;
      const vec left = from_last(j > 0 ? sums[0][n - 1] : zero, sums[0][n]);
      const vec right = from_second(sums[2][n], j + 1 < wide ? sums[2][n + 1] : zero);
      const int64_t at = i * t->width + j * LANES, count = t->width - j * LANES;
      vec z = bias + sums[1][n] + (left + right);
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

INLINE void strip_of(const strip *t, const int rows, const int wide) {
  for (int filter = t->begin; filter < t->end; ++filter) {
    const uint16_t *kernel = t->kernels + ENTRY * t->filters[filter].kernel;
    const uint16_t *end = t->kernels + ENTRY * t->filters[filter + 1].kernel;
    const float *weights = t->packed + t->filters[filter].value;
    vec sums[3][MOST];
    UNROLL for (int k = 0; k < rows * wide; ++k) sums[0][k] = sums[1][k] = sums[2][k] = (vec){0};
    for (; kernel < end; kernel += ENTRY) {
      switch (*kernel) {
#define SET(N) case N: weights = multiply_set(t, kernel, weights, N, rows, wide, sums); break;
#include "sets.h"
#undef SET
        default: __builtin_unreachable();
      }
    }
    end_filter(t, filter, rows, wide, sums);
  }
}

#define STRIP(I, J) NOINLINE void strip_##I##_##J(const strip *t) { strip_of(t, I, J); }
#define SET(N)
#include "sets.h"  // which strips are needed
#undef SET
#ifdef MODEL_HAS_COLUMNS_1
STRIP(6, 1) STRIP(4, 1)
#endif
#ifdef MODEL_HAS_COLUMNS_2
STRIP(3, 2) STRIP(2, 2)
#endif
#ifdef MODEL_HAS_COLUMNS_4
STRIP(1, 4)
#endif
static void (*const strips[7][5])(const strip *) = {
  [0][0] = NULL,
#ifdef MODEL_HAS_COLUMNS_1
    [6][1] = strip_6_1, [4][1] = strip_4_1,
#endif
#ifdef MODEL_HAS_COLUMNS_2
    [3][2] = strip_3_2, [2][2] = strip_2_2,
#endif
#ifdef MODEL_HAS_COLUMNS_4
    [1][4] = strip_1_4,
#endif
};

// Rows y0 .. y0 + rows of all channels, zero outside of the image.
static void fill_strip(const model_value *in, const float *image, int64_t plane, int y0, int rows, int wide, float *to,
                       float *upper) {
  (void)upper;
  for (int c = 0; c < in->channels; ++c, image += plane) {
    for (int r = 0; r < rows; ++r) {
      const int y = y0 + r;
      const float *from = image + (int64_t)y * in->width;
      for (int j = 0; j < wide; ++j, to += LANES) {
        const int count = y < 0 || y >= in->height ? 0 : least_int(in->width - j * LANES, LANES);
        ivec lanes;
        for (int k = 0; k < LANES; ++k) lanes[k] = k < count ? -1 : 0;
        const vec x = count == LANES ? get(from + j * LANES) : count ? only(get(from + j * LANES), lanes) : (vec){0};
#ifdef PAIRS
        put_halves(x, to, upper);
        upper += LANES;
#else
        put(to, x);
#endif
      }
    }
  }
}

static void run_columns(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                       const float *bias, const float *image, const float *residual, float *results, float *region,
                       model_worker worker) {
  const int64_t plane = model_plane(in, SINGLE);
  const int count = (out->height + plan->rows - 1) / plan->rows;
  float *upper = region + in->channels * plan->channel;
  strip t = {.region = region, .uppers = upper, .packed = plan->packed, .bias = bias,
             .kernels = plan->offsets, .filters = plan->filters, .plane = plane,
             .width = out->width, .channel = plan->channel, .begin = 0, .end = out->channels,
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
    fill_strip(in, image, plane, y - 1, plan->rows + 2, plan->cols, region, upper);
    t.out = results + (int64_t)y * out->width;
    t.residual = residual ? residual + (int64_t)y * out->width : NULL;
    strips[plan->rows][plan->cols](&t);
  }
}
