// FORM_WINDOWS (runtime.h): 3x3 convolutions of blocks of images, 4x4 results at a time, with code of its own for each
// frequent set of taps; with numbers as cells.h has them.
#pragma once
#include "cells.h"

#define SIDE MODEL_WINDOW_SIDE
#define SET(N)
#include "sets.h"  // which loops are needed
#undef SET
typedef struct {
  const float *region, *packed, *bias, *residual;  // residual: NULL without, or before the last pass
  const float *scales;      // of filters, for integers
  float unit;               // of inputs, likewise
  const uint16_t *kernels;  // ENTRY numbers each
  const model_filter *filters;
  float *out;
  int64_t plane, row, channel;  // floats: from filter to filter and row to row of results; of a channel's window
  int begin, end, first, last, act;  // filters; whether this is the first pass, and the last one
  // What the next window has that this one has not, fetched while this one is computed: channels, rows and vectors,
  // where they begin, and floats from channel to channel and row to row; nothing where `ahead` is NULL.
  const float *ahead;
  int channels, rows, vectors;
  int64_t ahead_plane, ahead_row;
  float low, high;
} window;

// Rows of a kernel, a bit each, that see row `y` of a window; and taps of these rows or columns, a bit each.
INLINE int seen_by(const int y, const int stride) {
  return (y >= 0 && y <= (SIDE - 1) * stride && y % stride == 0 ? 1 : 0) |
         (y >= 1 && y - 1 <= (SIDE - 1) * stride && (y - 1) % stride == 0 ? 2 : 0) |
         (y >= 2 && y - 2 <= (SIDE - 1) * stride && (y - 2) % stride == 0 ? 4 : 0);
}
INLINE int taps_of_rows(const int rows) { return (rows & 1 ? 7 : 0) | (rows & 2 ? 56 : 0) | (rows & 4 ? 448 : 0); }
INLINE int taps_of_columns(const int columns) { return columns * 73; }

// One kernel, or several: what its taps read of a row of the window is loaded once. `whole`: the results are the whole
// image, and what lies around it is neither in the region nor computed.
INLINE const float *multiply_window(const window *t, const uint16_t *kernel, const float *weights, const int set,
                                    const int stride, const int whole, vec *sums) {
  const int side = (SIDE - 1) * stride + 3, begin = whole, end = whole ? SIDE * stride + 1 : side;
  const int cells = (end - begin + TOGETHER - 1) / TOGETHER;
  const float *channel[TOGETHER];
  vec weight[9];
  UNROLL for (int k = 0; k < TOGETHER; ++k) channel[k] = t->region + kernel[1 + k] * t->channel;
  UNROLL for (int k = 0; k < 9; ++k) {
    if (set >> k & 1) weight[k] = weight_of(weights++);
    else weight[k] = (vec){0};
  }
  UNROLL for (int y = begin; y < end; ++y) {
    const int rows = seen_by(y, stride), taps = set & taps_of_rows(rows);
    if (!taps) continue;
    vec x[12];
    UNROLL for (int k = 0; k < cells; ++k) {
      const int64_t at = (int64_t)((y - begin) * cells + k) * LANES;
      int needed = 0;
      UNROLL for (int j = 0; j < TOGETHER; ++j) {
        if (taps & taps_of_columns(seen_by(begin + TOGETHER * k + j, stride))) needed |= 1 << j;
        x[TOGETHER * k + j] = (vec){0};
      }
      if (!needed) continue;
      vec one[TOGETHER];
      UNROLL for (int j = 0; j < TOGETHER; ++j) one[j] = get(channel[j] + at);
      interleave(one, needed, x + TOGETHER * k);
    }
    UNROLL for (int r = 0; r < 3; ++r) {
      if (!(rows >> r & 1)) continue;
      UNROLL for (int s = 0; s < 3; ++s) {
        if (!(taps >> (3 * r + s) & 1)) continue;
        UNROLL for (int j = 0; j < SIDE; ++j) {
          const int n = (y - r) / stride * SIDE + j, column = j * stride + s;
          if (column >= begin && column < end) sums[n] = product(sums[n], x[column - begin], weight[3 * r + s]);
        }
      }
    }
  }
  return weights;
}

// Results of a filter and what is added to them lie far from those of the filter before: fetched ahead, like a share of
// the next window.
INLINE void fetch_ahead(const window *t, int filter) {
  const float *out = t->out + filter * t->plane;
  UNROLL for (int k = 0; k < SIDE * SIDE; ++k) __builtin_prefetch(out + k / SIDE * t->row + k % SIDE * LANES, 1, 3);
  if (t->residual) {
    const float *more = t->residual + filter * t->plane;
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k) __builtin_prefetch(more + k / SIDE * t->row + k % SIDE * LANES, 0, 3);
  }
  if (!t->ahead) return;
  const int64_t count = t->end - t->begin, number = filter - t->begin;
  for (int64_t c = number * t->channels / count; c < (number + 1) * t->channels / count; ++c) {
    const float *from = t->ahead + c * t->ahead_plane;
    for (int r = 0; r < t->rows; ++r, from += t->ahead_row)
      for (int k = 0; k < t->vectors; ++k) __builtin_prefetch(from + k * LANES, 0, 2);
  }
}

INLINE void begin_window(const window *t, int filter, vec *sums) {
  const float *out = t->out + filter * t->plane;
  const vec bias = splat(t->bias[filter]);
  if (t->first) {
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k) sums[k] = begun(bias);
  } else {
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k) sums[k] = begun(get(out + k / SIDE * t->row + k % SIDE * LANES));
  }
}

INLINE void end_window(const window *t, int filter, vec *sums) {
  float *out = t->out + filter * t->plane;
  const vec bias = splat(t->bias[filter]);
  const vec scale = scale_of(t->scales, filter);
  if (t->first) {
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k) sums[k] = ended(sums[k], scale, bias);
  } else {
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k)
      sums[k] = ended(sums[k], scale, get(out + k / SIDE * t->row + k % SIDE * LANES));
  }
  if (t->residual) {
    const float *more = t->residual + filter * t->plane;
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k) sums[k] += get(more + k / SIDE * t->row + k % SIDE * LANES);
  }
  if (t->last && t->act == ACT_RELU) {
    UNROLL for (int k = 0; k < SIDE * SIDE; ++k) sums[k] = without(sums[k], sums[k] <= (vec){0});
  }
  UNROLL for (int k = 0; k < SIDE * SIDE; ++k) put(out + k / SIDE * t->row + k % SIDE * LANES, sums[k]);
  if (t->last && t->act > ACT_RELU) {
    for (int k = 0; k < SIDE * SIDE; ++k) {
      float *one = out + k / SIDE * t->row + k % SIDE * LANES;
      put(one, activate(get(one), t->act, t->low, t->high));
    }
  }
}

INLINE void window_of(const window *t, const int stride, const int whole) {
  for (int filter = t->begin; filter < t->end; ++filter) {
    const uint16_t *kernel = t->kernels + ENTRY * (int64_t)t->filters[filter].kernel;
    const uint16_t *end = t->kernels + ENTRY * (int64_t)t->filters[filter + 1].kernel;
    const float *weights = t->packed + t->filters[filter].value;
    vec sums[SIDE * SIDE];
    fetch_ahead(t, filter);
    begin_window(t, filter, sums);
    for (; kernel < end; kernel += ENTRY) {
      switch (*kernel) {
#define SET(N) case N: weights = multiply_window(t, kernel, weights, N, stride, whole, sums); break;
#include "sets.h"
#undef SET
        default: __builtin_unreachable();
      }
    }
    end_window(t, filter, sums);
  }
}

NOINLINE void window_1(const window *t) { window_of(t, 1, 0); }
NOINLINE void window_1_whole(const window *t) { window_of(t, 1, 1); }
NOINLINE void window_2(const window *t) { window_of(t, 2, 0); }
NOINLINE void window_2_whole(const window *t) { window_of(t, 2, 1); }
// [stride - 1][whole]; what is not needed is not compiled, and plans have none of it.
static void (*const windows[2][2])(const window *) = {
  [0][0] = MODEL_HAS_WINDOWS_1 ? window_1 : NULL, [0][1] = MODEL_HAS_WINDOWS_1_WHOLE ? window_1_whole : NULL,
    [1][0] = MODEL_HAS_WINDOWS_2 ? window_2 : NULL, [1][1] = MODEL_HAS_WINDOWS_2_WHOLE ? window_2_whole : NULL,
};

// Rows y0 .. and columns x0 .. of some channels, zero outside of the image.
INLINE void fill_window(const model_plan *plan, const model_value *in, const float *image, int64_t plane, int channels,
                        int y0, int x0, float unit, float *to) {
  const int width = in->width, columns = plan->phase_cols;
  for (int c = 0; c < channels; ++c, image += plane) {
    for (int y = y0; y < y0 + plan->region_rows; ++y) {
      const float *from = image + ((int64_t)y * width + x0) * LANES;
      const int inside = y >= 0 && y < in->height;
      for (int k = 0; k < columns; k += TOGETHER, to += LANES) {
        vec x[TOGETHER];
        UNROLL for (int j = 0; j < TOGETHER; ++j) {
          const int has = inside && k + j < columns && x0 + k + j >= 0 && x0 + k + j < width;
          x[j] = has ? get(from + (k + j) * LANES) : (vec){0};
        }
        put_cell(to, x, unit);
      }
    }
  }
}

// What tile number `n` reads, without the columns that the tile before it has read.
INLINE void look_ahead(window *t, const model_plan *plan, const model_op *op, const model_value *in,
                       const model_value *out, const float *images, int n, int across) {
  const int stride = op->stride[0], i0 = least_int(n / across * SIDE, out->height - SIDE);
  const int j0 = least_int(n % across * SIDE, out->width - SIDE);
  const int y = most_int(i0 * stride - op->padding[0], 0), x = most_int(j0 * stride - op->padding[1], 0);
  const int old = n % across ? most_int(3 - stride, 0) : 0;
  t->ahead_row = (int64_t)in->width * LANES;
  t->ahead_plane = in->height * t->ahead_row;
  t->ahead = images + (int64_t)y * t->ahead_row + (x + old) * LANES;
  t->channels = in->channels;
  t->rows = least_int(plan->region_rows, in->height - y);
  t->vectors = least_int(plan->phase_cols - old, in->width - x - old);
}

static void run_windows(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                        const float *bias, const float *images, const float *residual, float *results, float *region,
                        model_worker worker) {
  const int down = (out->height + SIDE - 1) / SIDE, across = (out->width + SIDE - 1) / SIDE, tiles = down * across;
  const int whole = plan->whole, stride = op->stride[0];
  void (*const function)(const window *) = windows[stride - 1][whole];
  const int64_t plane = (int64_t)in->height * in->width * LANES;
  window t = {.region = region, .packed = plan->packed, .bias = bias, .scales = plan->scales,
              .unit = model_unit(op), .kernels = plan->offsets,
              .plane = (int64_t)out->height * out->width * LANES, .row = (int64_t)out->width * LANES,
              .channel = plan->channel * LANES, .begin = 0, .end = out->channels, .act = op->act, .low = op->low,
              .high = op->high};
  // Threads share tiles, if none overlaps another, else filters.
  int first = 0, end = tiles;
  if (out->height % SIDE == 0 && out->width % SIDE == 0 && (tiles % worker.count == 0 || tiles >= 4 * worker.count)) {
    first = tiles * worker.number / worker.count;
    end = tiles * (worker.number + 1) / worker.count;
  } else {
    t.begin = (int)((int64_t)out->channels * worker.number / worker.count);
    t.end = (int)((int64_t)out->channels * (worker.number + 1) / worker.count);
  }
  for (int n = first; n < end; ++n) {
    // The last ones are whole: they compute some results again.
    const int i0 = least_int(n / across * SIDE, out->height - SIDE);
    const int j0 = least_int(n % across * SIDE, out->width - SIDE);
    const int64_t at = ((int64_t)i0 * out->width + j0) * LANES;
    t.out = results + at;
    for (int pass = 0; pass < plan->passes; ++pass) {
      const int channel = pass * plan->pass_channels;
      const int channels = least_int(plan->pass_channels, in->channels - channel);
      t.first = pass == 0;
      t.last = pass == plan->passes - 1;
      t.residual = t.last && residual ? residual + at : NULL;
      t.filters = plan->filters + (int64_t)pass * out->channels;
      t.ahead = NULL;
      if (n + 1 < end && plan->passes == 1) look_ahead(&t, plan, op, in, out, images, n + 1, across);
      fill_window(plan, in, images + channel * plane, plane, channels, i0 * stride - (whole ? 0 : op->padding[0]),
                  j0 * stride - (whole ? 0 : op->padding[1]), t.unit, region);
      function(&t);
    }
  }
}
