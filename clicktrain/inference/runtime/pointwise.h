// FORM_POINTWISE (runtime.h): 1x1 convolutions of several kernels at once (cells.h), of single images and of blocks.
#pragma once
#include "cells.h"

typedef struct {
  const float *region, *packed, *bias, *residual;  // residual: NULL without, or before the last pass
  const float *scales;                             // of filters, for integers
  float unit;                                      // of inputs, likewise
  const uint16_t *channels;                        // TOGETHER at a time
  const model_filter *filters;
  float *out;
  int64_t plane;                                   // floats from filter to filter
  int begin, end, first, last, act;                // filters; whether this is the first pass, and the last one
  float low, high;
} points;

INLINE void multiply_points(const points *t, const uint16_t *channels, const float *weights, const int vectors,
                            vec *sums) {
  const int cells = (vectors + TOGETHER - 1) / TOGETHER;
  const float *from[TOGETHER];
  const vec weight = weight_of(weights);
  UNROLL for (int j = 0; j < TOGETHER; ++j) from[j] = t->region + channels[j] * cells * LANES;
  UNROLL for (int k = 0; k < cells; ++k) {
    const int left = vectors - TOGETHER * k, count = left < TOGETHER ? left : TOGETHER;
    vec one[TOGETHER], x[TOGETHER];
    UNROLL for (int j = 0; j < TOGETHER; ++j) one[j] = get(from[j] + k * LANES);
    interleave(one, (1 << count) - 1, x);
    UNROLL for (int j = 0; j < count; ++j) sums[TOGETHER * k + j] = product(sums[TOGETHER * k + j], x[j], weight);
  }
}

INLINE void points_of(const points *t, const int vectors) {
  // Enough sums at once, or every product would wait for the one before.
  const int chains = vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1;
  for (int filter = t->begin; filter < t->end; ++filter) {
    const int64_t at = filter * t->plane;
    const uint32_t end = t->filters[filter + 1].kernel;
    uint32_t e = t->filters[filter].kernel;
    vec sums[MODEL_TILE_VECTORS];
    // Results of the next filter, and what is added to them, lie far from these.
    UNROLL for (int k = 0; k < vectors; ++k) {
      __builtin_prefetch(t->out + at + t->plane + k * LANES, 1, 3);
      if (t->residual) __builtin_prefetch(t->residual + at + t->plane + k * LANES, 0, 3);
    }
    const vec bias = splat(t->bias[filter]);
    const vec scale = scale_of(t->scales, filter);
    UNROLL for (int k = 0; k < vectors; ++k) sums[k] = begun(t->first ? bias : get(t->out + at + k * LANES));
    if (chains > 1) {
      vec more[MODEL_TILE_VECTORS];
      UNROLL for (int k = 0; k < vectors * (chains - 1); ++k) more[k] = (vec){0};
      for (; e + (uint32_t)chains <= end; e += (uint32_t)chains) {
        UNROLL for (int c = 0; c < chains; ++c)
          multiply_points(t, t->channels + TOGETHER * (e + (uint32_t)c), t->packed + e + c, vectors,
                          c ? more + (c - 1) * vectors : sums);
      }
      UNROLL for (int k = 0; k < vectors * (chains - 1); ++k) sums[k % vectors] = added(sums[k % vectors], more[k]);
    }
    for (; e < end; ++e) multiply_points(t, t->channels + TOGETHER * e, t->packed + e, vectors, sums);
    UNROLL for (int k = 0; k < vectors; ++k) {
      sums[k] = ended(sums[k], scale, t->first ? bias : get(t->out + at + k * LANES));
      if (t->residual) sums[k] += get(t->residual + at + k * LANES);
      if (t->last && t->act == ACT_RELU) sums[k] = without(sums[k], sums[k] <= (vec){0});
      put(t->out + at + k * LANES, sums[k]);
    }
    if (t->last && t->act > ACT_RELU) {
      for (int k = 0; k < vectors; ++k) {
        float *one = t->out + at + k * LANES;
        put(one, activate(get(one), t->act, t->low, t->high));
      }
    }
  }
}

#define POINTS(N) NOINLINE void points_##N(const points *t) { points_of(t, N); }
POINTS(1) POINTS(2) POINTS(3) POINTS(4) POINTS(5) POINTS(6) POINTS(7) POINTS(8)
POINTS(9) POINTS(10) POINTS(11) POINTS(12) POINTS(13) POINTS(14) POINTS(15) POINTS(16)
static void (*const points_functions[MODEL_TILE_VECTORS])(const points *) = {
  points_1, points_2, points_3, points_4, points_5, points_6, points_7, points_8, points_9, points_10, points_11,
    points_12, points_13, points_14, points_15, points_16,
};

// What positions from vector `first` of the results on read of one channel, one after another.
INLINE const float *strided(const model_op *op, const model_value *in, const model_value *out, const float *image,
                            int64_t first, int vectors, const int element, float *to) {
  const int64_t across = out->width, step = op->stride[1];
  if (op->stride[0] == 1 && step == 1) return image + first * LANES;
  const int64_t wanted = vectors * LANES / element;
  int64_t position = first * LANES / element;
  for (int64_t done = 0, run; done < wanted; done += run, position += run) {
    const int64_t row = position / across, column = position % across;
    run = min64(wanted - done, across - column);
    if (row >= out->height) run = 0;
    if (!run) break;
    const float *from = image + (row * op->stride[0] * in->width + column * step) * element;
    copy_positions(to + done * element, from, run, step, element);
  }
  return to;
}

INLINE void run_points(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                       const float *bias, const float *images, const float *residual, float *results, float *region,
                       model_worker worker, const int element) {
  const int layout = element == 1 ? SINGLE : BLOCK;
  const int64_t plane = model_plane(in, layout) * element, size = (int64_t)out->height * out->width;
  const int64_t vectors = (size * element + LANES - 1) / LANES, tiles = (vectors + plan->cols - 1) / plan->cols;
  points t = {.region = region, .packed = plan->packed, .bias = bias, .scales = plan->scales,
              .unit = model_unit(op), .channels = plan->offsets,
              .plane = model_plane(out, layout) * element, .begin = 0, .end = out->channels, .act = op->act,
              .low = op->low, .high = op->high};
  // Threads share tiles, if none overlaps another, else filters.
  int64_t tile = 0, end = tiles;
  if (vectors % plan->cols == 0 && (tiles % worker.count == 0 || tiles >= 4 * worker.count)) {
    tile = tiles * worker.number / worker.count;
    end = tiles * (worker.number + 1) / worker.count;
  } else {
    t.begin = (int)((int64_t)out->channels * worker.number / worker.count);
    t.end = (int)((int64_t)out->channels * (worker.number + 1) / worker.count);
  }
  float gathered[(MODEL_TILE_VECTORS + 1) * LANES] = {0};
  for (; tile < end; ++tile) {
    // The last one is whole: it computes some results again.
    const int64_t first = min64(tile * plan->cols, vectors - plan->cols);
    t.out = results + first * LANES;
    for (int pass = 0; pass < plan->passes; ++pass) {
      const int channel = pass * plan->pass_channels;
      const int channels = least_int(plan->pass_channels, in->channels - channel);
      float *to = region;
      for (int c = 0; c < channels; ++c) {
        const float *image = images + (channel + c) * plane;
        const float *from = strided(op, in, out, image, first, plan->cols, element, gathered);
        for (int k = 0; k < plan->cols; k += TOGETHER, to += LANES) {
          vec x[TOGETHER];
          UNROLL for (int j = 0; j < TOGETHER; ++j) x[j] = k + j < plan->cols ? get(from + (k + j) * LANES) : (vec){0};
          put_cell(to, x, t.unit);
        }
      }
      t.first = pass == 0;
      t.last = pass == plan->passes - 1;
      t.residual = t.last && residual ? residual + first * LANES : NULL;
      t.filters = plan->filters + (int64_t)pass * out->channels;
      points_functions[plan->cols - 1](&t);
    }
  }
}

static void run_pointwise(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                          const float *bias, const float *images, const float *residual, float *results,
                          float *region, model_worker worker) {
  if (plan->unit == 1) run_points(op, plan, in, out, bias, images, residual, results, region, worker, 1);
  else run_points(op, plan, in, out, bias, images, residual, results, region, worker, LANES);
}
