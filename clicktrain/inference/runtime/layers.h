// Everything but convolutions: linear layers, pooling, sums, copies.
#pragma once
#include "vectors.h"

INLINE float activate_one(float x, const model_op *op) { return activate(splat(x), op->act, op->low, op->high)[0]; }

// Outputs of a dense layer, MODEL_BLOCK side by side: weights are [blocks, inputs, MODEL_BLOCK].
NOINLINE void linear_single(const model_op *op, const float *weights, const float *bias, const float *x, int inputs,
                            int outputs, float *out) {
  enum { VECTORS = MODEL_BLOCK / LANES, CHAINS = VECTORS >= 4 ? 2 : VECTORS == 2 ? 4 : 8 };
  for (int o = 0; o < outputs; o += MODEL_BLOCK, weights += (int64_t)inputs * MODEL_BLOCK) {
    vec sums[CHAINS][VECTORS];
    UNROLL for (int c = 0; c < CHAINS; ++c)
      UNROLL for (int k = 0; k < VECTORS; ++k) sums[c][k] = (vec){0};
    int i = 0;
    for (; i + CHAINS <= inputs; i += CHAINS)
      UNROLL for (int c = 0; c < CHAINS; ++c)
        UNROLL for (int k = 0; k < VECTORS; ++k)
          sums[c][k] += splat(x[i + c]) * get(weights + (int64_t)(i + c) * MODEL_BLOCK + k * LANES);
    for (; i < inputs; ++i)
      UNROLL for (int k = 0; k < VECTORS; ++k)
        sums[0][k] += splat(x[i]) * get(weights + (int64_t)i * MODEL_BLOCK + k * LANES);
    float results[MODEL_BLOCK];
    UNROLL for (int k = 0; k < VECTORS; ++k) {
      UNROLL for (int c = 1; c < CHAINS; ++c) sums[0][k] += sums[c][k];
      put(results + k * LANES, activate(sums[0][k] + get(bias + o + k * LANES), op->act, op->low, op->high));
    }
    memcpy(out + o, results, sizeof(float) * (size_t)least_int(MODEL_BLOCK, outputs - o));
  }
}

NOINLINE void linear_block(const model_op *op, const float *weights, const float *bias, const float *x, int inputs,
                           int outputs, float *out) {
  enum { SIDE = 8 };
  for (int o = 0; o < outputs; o += SIDE) {
    const float *w = weights + (int64_t)(o / MODEL_BLOCK) * inputs * MODEL_BLOCK + o % MODEL_BLOCK;
    vec sums[SIDE];
    UNROLL for (int k = 0; k < SIDE; ++k) sums[k] = splat(bias[o + k]);
    for (int i = 0; i < inputs; ++i) {
      const vec input = get(x + (int64_t)i * LANES);
      UNROLL for (int k = 0; k < SIDE; ++k) sums[k] += splat(w[(int64_t)i * MODEL_BLOCK + k]) * input;
    }
    for (int k = 0; k < least_int(SIDE, outputs - o); ++k)
      put(out + (int64_t)(o + k) * LANES, activate(sums[k], op->act, op->low, op->high));
  }
}

// A pruned linear layer of one image: inputs lie anywhere.
NOINLINE void linear_gathered(const model_op *op, const model_job *jobs, int count, const uint16_t *offsets,
                              const float *values, const float *bias, const float *x, float *out) {
  for (const model_job *job = jobs; job < jobs + count; ++job) {
    const float *w = values + job->value;
    const uint16_t *at = offsets + job->offset;
    float sums[4] = {0, 0, 0, 0};
    uint32_t e = 0;
    for (; e + 4 <= job->count; e += 4)
      UNROLL for (uint32_t k = 0; k < 4; ++k) sums[k] += w[e + k] * x[at[e + k]];
    for (; e < job->count; ++e) sums[0] += w[e] * x[at[e]];
    out[JOB_FILTER(job)] = activate_one(bias[JOB_FILTER(job)] + (sums[0] + sums[1]) + (sums[2] + sums[3]), op);
  }
}

INLINE vec pooled(vec v, vec one, int mode) {
  return mode == POOL_MAX ? either((v > one) | (v != v), v, one) : v + one;
}

// Windows of one channel of a block.
INLINE void pool_block(const model_op *op, const model_value *in, const model_value *out, const float *x, float *y) {
  for (int i = 0; i < out->height; ++i) {
    for (int j = 0; j < out->width; ++j, y += LANES) {
      const int top = i * op->stride[0] - op->padding[0], left = j * op->stride[1] - op->padding[1];
      int found = 0;
      vec v = splat(op->mode == POOL_MAX ? -INFINITY : 0);
      for (int r = 0; r < op->kernel[0]; ++r) {
        const int row = top + r * op->dilation[0];
        if (row < 0 || row >= in->height) continue;
        for (int s = 0; s < op->kernel[1]; ++s) {
          const int col = left + s * op->dilation[1];
          if (col < 0 || col >= in->width) continue;
          const vec one = get(x + ((int64_t)row * in->width + col) * LANES);
          v = pooled(v, one, op->mode);
          ++found;
        }
      }
      if (op->mode == POOL_AVERAGE) {
        // Padding counts, but not what rounding up adds beyond it.
        const int rows = least_int(top + op->kernel[0], in->height + op->padding[0]) - top;
        const int cols = least_int(left + op->kernel[1], in->width + op->padding[1]) - left;
        v = v / splat(op->divisor ? op->divisor : (float)(op->counts_padding ? rows * cols : found));
      }
      put(y, activate(v, op->act, op->low, op->high));
    }
  }
}

// Windows of one channel of one image: first over rows, with lanes along the row, then over columns. `line`: the
// former, with padding on both sides.
NOINLINE void pool_single(const model_op *op, const model_value *in, const model_value *out, const float *x, float *y,
                          float *line) {
  const int step = op->stride[1];
  const int wide = op->mode == POOL_MAX && step <= 2 && op->padding[1] >= 0 && out->width >= LANES;
  float *row = line + (wide ? op->padding[1] : 0);
  // What is right of the image, as far as windows reach, is as what is left of it.
  const int reach = (out->width - 1) * step + (op->kernel[1] - 1) * op->dilation[1] + 1 - op->padding[1];
  for (int k = 0; wide && k < op->padding[1]; ++k) line[k] = -INFINITY;
  for (int i = 0; i < out->height; ++i) {
    const int top = i * op->stride[0] - op->padding[0];
    int found_rows = 0;
    for (int r = 0; r < op->kernel[0]; ++r) {
      const int at = top + r * op->dilation[0];
      if (at < 0 || at >= in->height) continue;
      const float *from = x + (int64_t)at * in->width;
      for (int k = 0; k < in->width; k += LANES) {
        const vec one = get(from + k);
        put(row + k, found_rows ? pooled(get(row + k), one, op->mode) : one);
      }
      ++found_rows;
    }
    if (wide && found_rows) {
      for (int k = in->width; k < reach; ++k) row[k] = -INFINITY;
      // The last vector computes some results again.
      for (int j = 0; j < out->width; j += LANES) {
        const int first = least_int(j, out->width - LANES);
        const float *from = line + (int64_t)first * step;
        vec v = splat(-INFINITY);
        for (int s = 0; s < op->kernel[1]; ++s, from += op->dilation[1]) {
          float taken[LANES];
          copy_positions(taken, from, LANES, step, 1);
          v = pooled(v, get(taken), POOL_MAX);
        }
        put(y + first, v);
      }
      y += out->width;
      continue;
    }
    for (int j = 0; j < out->width; ++j) {
      const int left = j * op->stride[1] - op->padding[1];
      int found = 0;
      float v = op->mode == POOL_MAX ? -INFINITY : 0;
      for (int s = 0; s < op->kernel[1]; ++s) {
        const int col = left + s * op->dilation[1];
        if (col < 0 || col >= in->width || !found_rows) continue;
        v = op->mode == POOL_MAX ? (v > row[col] || v != v ? v : row[col]) : v + row[col];
        ++found;
      }
      if (op->mode == POOL_AVERAGE) {
        const int rows = least_int(top + op->kernel[0], in->height + op->padding[0]) - top;
        const int cols = least_int(left + op->kernel[1], in->width + op->padding[1]) - left;
        v /= op->divisor ? op->divisor : (float)(op->counts_padding ? rows * cols : found * found_rows);
      }
      *y++ = v;
    }
  }
}

// Adaptive pooling of one channel: bin i of n is from floor(i * size / n) to ceil((i + 1) * size / n).
INLINE void bins(const model_op *op, const model_value *in, const model_value *out, const float *x, float *y,
                 const int layout) {
  for (int i = 0; i < out->height; ++i) {
    for (int j = 0; j < out->width; ++j) {
      const int64_t top = (int64_t)i * in->height / out->height, left = (int64_t)j * in->width / out->width;
      const int64_t bottom = ((int64_t)(i + 1) * in->height + out->height - 1) / out->height;
      const int64_t right = ((int64_t)(j + 1) * in->width + out->width - 1) / out->width;
      const float share = 1.0f / (float)((bottom - top) * (right - left));
      if (layout == BLOCK) {
        vec v = splat(op->mode == POOL_MAX ? -INFINITY : 0);
        for (int64_t r = top; r < bottom; ++r) {
          for (int64_t s = left; s < right; ++s) {
            const vec one = get(x + (r * in->width + s) * LANES);
            v = op->mode == POOL_MAX ? either((v > one) | (v != v), v, one) : v + one;
          }
        }
        put(y, activate(op->mode == POOL_MAX ? v : v * share, op->act, op->low, op->high));
        y += LANES;
      } else {
        float v = op->mode == POOL_MAX ? -INFINITY : 0;
        for (int64_t r = top; r < bottom; ++r) {
          const float *row = x + r * in->width;
          vec sum = {0};
          int64_t s = left;
          if (op->mode == POOL_AVERAGE) {
            for (; s + LANES <= right; s += LANES) sum += get(row + s);
            v += lane_sum(sum);
          }
          for (; s < right; ++s) v = op->mode == POOL_MAX ? (v > row[s] || v != v ? v : row[s]) : v + row[s];
        }
        *y++ = op->mode == POOL_MAX ? v : v * share;
      }
    }
  }
}

// One value by another of its shape, or by one number a channel (`by_channel`).
INLINE vec combined(vec a, vec b, int mode) {
  return mode == BINARY_ADD ? a + b : mode == BINARY_MULTIPLY ? a * b : a - b;
}

// Over channels, lane by lane: of one position of one image all lanes are alike.
INLINE void softmax(const float *x, float *y, int channels, const int layout) {
  const int step = layout == BLOCK ? LANES : 1;
  vec high = splat(-INFINITY), sum = {0};
  for (int c = 0; c < channels; ++c) high = most(high, layout == BLOCK ? get(x + (int64_t)c * step) : splat(x[c]));
  for (int c = 0; c < channels; ++c) {
    const vec v = (layout == BLOCK ? get(x + (int64_t)c * step) : splat(x[c])) - high;
    const vec e = or_nan(exp_of(most(splat(-87), v)), v);
    sum += e;
    if (layout == BLOCK) put(y + (int64_t)c * step, e);
    else y[c] = e[0];
  }
  for (int c = 0; c < channels; ++c) {
    if (layout == BLOCK) put(y + (int64_t)c * step, get(y + (int64_t)c * step) / sum);
    else y[c] /= sum[0];
  }
}

// `count` floats through `op`'s activation, in place; lanes beyond them may change.
INLINE void activate_all(const model_op *op, float *y, int64_t count) {
  if (op->act == ACT_NONE) return;
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) put(y + k, activate(get(y + k), op->act, op->low, op->high));
  for (; k < count; ++k) y[k] = activate_one(y[k], op);
}
