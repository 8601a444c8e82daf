// Convolutions of one small image with sums of their own for each tap: FORM_TAPS of runtime.h. Of every kernel, inputs
// are loaded once, and multiplied with up to MODEL_SUMS_TAPS weights. What a tap has summed up is then moved as a
// whole, through memory: a load from where its positions begin, without what falls off the edges.
#pragma once
#include "cells.h"

typedef struct {
  const float *images, *uppers, *packed;  // of pairs and an odd number of vectors, images are there twice: the second
                                          // time in the upper halves
  const uint16_t *channels;
  const model_stretch *stretches;
  const int32_t *inside;
  float *sums, *out;   // sums: [MODEL_STRETCHES, taps, cols] vectors
  int64_t shift[MODEL_SUMS_TAPS];
  int tap[MODEL_SUMS_TAPS], count;
} taps_job;

INLINE void move_sums(const taps_job *t, const model_stretch *stretches, int count, const int taps, const int cols) {
  const int64_t plane = (cols * LANES + 15) / 16 * 16;
  for (int n = 0; n < count; ++n) {
    const float *from = t->sums + (int64_t)n * taps * cols * LANES;
    float *to = t->out + stretches[n].filter * plane;
    vec results[MODEL_SUMS_WIDE];
    UNROLL for (int j = 0; j < cols; ++j) results[j] = get(to + j * LANES);
    UNROLL for (int k = 0; k < taps; ++k) {
      const float *moved = from + k * cols * LANES + t->shift[k];
      const float *inside = (const float *)t->inside + t->tap[k] * cols * LANES;
      UNROLL for (int j = 0; j < cols; ++j)
        results[j] += only(get(moved + j * LANES), (ivec)get(inside + j * LANES));
    }
    UNROLL for (int j = 0; j < cols; ++j) put(to + j * LANES, results[j]);
  }
}

#ifdef PAIRS
// Two kernels with the same taps at once: their inputs and weights are bfloat16 numbers side by side.
#define CHANNELS 2
INLINE void load_inputs(const taps_job *t, const uint16_t *channels, const int cols, vec *x) {
  const int64_t first = channels[0] * (int64_t)cols, second = channels[1] * (int64_t)cols;
  if (cols % 2 == 0) {  // cells (pairs.h)
    UNROLL for (int j = 0; j < cols; j += 2) {
      const vec cells[] = {get(t->images + (first + j) / 2 * LANES), get(t->images + (second + j) / 2 * LANES)};
      interleave(cells, 3, x + j);
    }
    return;
  }
  UNROLL for (int j = 0; j < cols; ++j)
    x[j] = (vec)((ivec)get(t->images + (first + j) * LANES) | (ivec)get(t->uppers + (second + j) * LANES));
}
#else
#define CHANNELS 1
INLINE void load_inputs(const taps_job *t, const uint16_t *channels, const int cols, vec *x) {
  const float *p = t->images + *channels * (int64_t)((cols * LANES + 15) / 16 * 16);
  UNROLL for (int j = 0; j < cols; ++j) x[j] = get(p + j * LANES);
}
#endif

INLINE void taps_of(const taps_job *t, const int taps, const int cols) {
  // Enough sums at once, or every product would wait for the one before.
  const int size = taps * cols, chains = size <= 2 ? 4 : size <= 4 ? 2 : 1;
  const uint16_t *channels = t->channels;
  const float *weights = t->packed;
  for (int first = 0; first < t->count; first += MODEL_STRETCHES) {
    const model_stretch *stretches = t->stretches + first;
    const int count = least_int(MODEL_STRETCHES, t->count - first);
    for (int n = 0; n < count; ++n) {
      vec sums[MODEL_SUMS_TOTAL], x[MODEL_SUMS_WIDE];
      UNROLL for (int k = 0; k < size * chains; ++k) sums[k] = (vec){0};
      uint32_t e = 0;
      for (; e + (uint32_t)chains <= stretches[n].kernels; e += (uint32_t)chains) {
        UNROLL for (int c = 0; c < chains; ++c) {
          load_inputs(t, channels + c * CHANNELS, cols, x);
          UNROLL for (int k = 0; k < size; ++k)
            sums[c * size + k] = product(sums[c * size + k], x[k % cols], weight_of(weights + c * taps + k / cols));
        }
        channels += chains * CHANNELS;
        weights += chains * taps;
      }
      for (; e < stretches[n].kernels; ++e, channels += CHANNELS, weights += taps) {
        load_inputs(t, channels, cols, x);
        UNROLL for (int k = 0; k < size; ++k) sums[k] = product(sums[k], x[k % cols], weight_of(weights + k / cols));
      }
      float *to = t->sums + (int64_t)n * size * LANES;
      UNROLL for (int c = 1; c < chains; ++c)
        UNROLL for (int k = 0; k < size; ++k) sums[k] += sums[c * size + k];
      UNROLL for (int k = 0; k < size; ++k) put(to + k * LANES, sums[k]);
    }
    move_sums(t, stretches, count, taps, cols);
  }
}

typedef void (*taps_function)(const taps_job *);
#define TAPS(K, N) NOINLINE void taps_##K##_##N(const taps_job *t) { taps_of(t, K, N); }
TAPS(1, 1) TAPS(1, 2) TAPS(1, 3) TAPS(1, 4) TAPS(2, 1) TAPS(2, 2) TAPS(2, 3) TAPS(2, 4)
TAPS(3, 1) TAPS(3, 2) TAPS(3, 3) TAPS(3, 4) TAPS(4, 1) TAPS(4, 2) TAPS(4, 3) TAPS(4, 4)
static const taps_function taps_functions[MODEL_SUMS_TAPS][MODEL_SUMS_WIDE] = {
  {taps_1_1, taps_1_2, taps_1_3, taps_1_4},
    {taps_2_1, taps_2_2, taps_2_3, taps_2_4},
    {taps_3_1, taps_3_2, taps_3_3, taps_3_4},
    {taps_4_1, taps_4_2, taps_4_3, taps_4_4},
};

INLINE void run_taps(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker) {
  const int64_t plane = model_plane(out, SINGLE);
  const float *uppers = NULL;
#ifdef PAIRS
  float *lower = region + MODEL_STRETCHES * MODEL_SUMS_TOTAL * LANES + MODEL_SLACK;
  float *upper = lower + (int64_t)in->channels * plan->cols * LANES;
  const int cols = plan->cols, together = cols % 2 ? 1 : 2;
  for (int64_t k = 0; k < (int64_t)in->channels * cols; k += together) {
    const float *from = image + k / cols * plane + k % cols * LANES;
    const vec both[] = {get(from), get(from + LANES)};
    if (together == 2) put_cell(lower + k / 2 * LANES, both, 1);
    else put_halves(get(from), lower + k * LANES, upper + k * LANES);
  }
  image = lower;
  uppers = upper;
#endif
  for (int part = worker.number; part < plan->parts; part += worker.count) {
    const int64_t begin = (int64_t)out->channels * part / plan->parts;
    const int64_t end = (int64_t)out->channels * (part + 1) / plan->parts;
    for (int64_t f = begin; f < end; ++f) {
      const vec b = splat(bias[f]);
      for (int64_t k = f * plane; k < (f + 1) * plane; k += LANES)
        put(results + k, residual ? b + get(residual + k) : b);
    }
    for (uint32_t g = plan->begin[part]; g < plan->begin[part + 1]; ++g) {
      const model_group *group = plan->groups + g;
      taps_job job = {.images = image, .uppers = uppers, .packed = plan->packed + group->value,
                      .channels = plan->offsets + group->kernel, .stretches = plan->stretches + group->stretch,
                      .inside = plan->inside, .sums = region, .out = results, .count = (int)group->count};
      for (int k = 0; k < group->taps; ++k) {
        const int64_t down = (int64_t)(group->tap[k] / op->kernel[1]) * op->dilation[0] - op->padding[0];
        const int64_t right = (int64_t)(group->tap[k] % op->kernel[1]) * op->dilation[1] - op->padding[1];
        job.tap[k] = group->tap[k];
        job.shift[k] = down * in->width + right;
      }
      taps_functions[group->taps - 1][plan->cols - 1](&job);
    }
    for (int64_t k = begin * plane; k < end * plane; k += LANES)
      put(results + k, activate(get(results + k), op->act, op->low, op->high));
  }
}
