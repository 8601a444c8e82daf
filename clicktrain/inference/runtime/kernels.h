// All kernels, for the instructions that the file which includes this one has switched on.
#pragma once
#include "conv.h"
#include "layers.h"

INLINE float *place(const model_value *value, float *memory, const int layout) {
  return memory + (layout == BLOCK ? value->block * LANES : value->single);
}

INLINE void run_linear(const model_network *network, const model_op *op, const model_plan *plan, const float *x,
                       float *y, int inputs, int outputs, const int layout) {
  const float *weights = (const float *)(network->weights + op->values);
  const float *bias = (const float *)(network->weights + op->bias);
  if (layout == BLOCK) linear_block(op, weights, bias, x, inputs, outputs, y);
  else if (op->dense) linear_single(op, weights, bias, x, inputs, outputs, y);
  else linear_gathered(op, plan, weights, bias, x, y);
}

INLINE void run_binary(const model_op *op, const model_value *values, const float *a, const float *b, float *y,
                       const int layout) {
  const model_value *in = values + op->in, *other = values + op->other;
  const int64_t plane = model_plane(in, layout) * (layout == BLOCK ? LANES : 1);
  const int by_channel = other->height * other->width == 1 && in->height * in->width > 1;
  const int64_t runs = by_channel ? in->channels : 1, length = by_channel ? plane : plane * in->channels;
  for (int64_t c = 0; c < runs; ++c, a += length, y += length) {
    const vec one = layout == BLOCK ? get(b + (by_channel ? c * LANES : 0)) : splat(b[by_channel ? c : 0]);
    int64_t k = 0;
    for (; k + LANES <= length; k += LANES) {
      const vec v = combined(get(a + k), by_channel ? one : get(b + k), op->mode);
      put(y + k, activate(v, op->act, op->low, op->high));
    }
    for (; k < length; ++k)
      y[k] = activate_one(combined(splat(a[k]), by_channel ? one : splat(b[k]), op->mode)[0], op);
  }
}

INLINE void run_affine(const model_network *network, const model_op *op, const model_value *in, const float *x,
                       float *y, const int layout) {
  const float *scale = op->values < 0 ? NULL : (const float *)(network->weights + op->values);
  const float *shift = op->bias < 0 ? NULL : (const float *)(network->weights + op->bias);
  const int64_t plane = model_plane(in, layout) * (layout == BLOCK ? LANES : 1);
  for (int c = 0; c < in->channels; ++c, x += plane, y += plane) {
    const vec times = splat(scale ? scale[c] : 1), plus = splat(shift ? shift[c] : 0);
    int64_t k = 0;
    for (; k + LANES <= plane; k += LANES)
      put(y + k, activate(get(x + k) * times + plus, op->act, op->low, op->high));
    for (; k < plane; ++k) y[k] = activate_one(x[k] * times[0] + plus[0], op);
  }
}

INLINE void run_copy(const model_op *op, const model_value *in, const model_value *out, const float *x, float *y,
                     const int layout) {
  const int64_t element = layout == BLOCK ? LANES : 1;
  const int64_t from = model_plane(in, layout), to = model_plane(out, layout);
  const int64_t size = (int64_t)in->height * in->width, wanted = (int64_t)out->height * out->width;
  const size_t bytes = (size_t)element * sizeof(float);
  if (op->channels < 0) {
    const int64_t all = size * in->channels;
    for (int64_t k = 0, run; k < all; k += run) {
      run = min64(size - k % size, wanted - k % wanted);
      memcpy(y + (k / wanted * to + k % wanted) * element, x + (k / size * from + k % size) * element,
             (size_t)run * bytes);
    }
    return;
  }
  if (op->clears) memset(y, 0, (size_t)(to * out->channels) * bytes);
  x += op->from * from * element;
  y += (op->to * to + (int64_t)op->shift[0] * out->width + op->shift[1]) * element;
  for (int c = 0; c < op->channels; ++c, x += from * element, y += to * element) {
    if (in->width == out->width) {
      memcpy(y, x, (size_t)size * bytes);
      continue;
    }
    for (int r = 0; r < in->height; ++r)
      memcpy(y + (int64_t)r * out->width * element, x + (int64_t)r * in->width * element, (size_t)in->width * bytes);
  }
}

INLINE void run_ops(const model_network *network, float *memory, float *region, const int layout) {
  const model_description *description = &model_network_description;
  const model_value *values = description->values;
  const int64_t element = layout == BLOCK ? LANES : 1;
  for (int n = 0; n < description->ops_count; ++n) {
    const model_op *op = description->ops + n;
    const model_plan *plan = network->plans[layout] + n;
    const model_value *in = values + op->in, *out = values + op->out;
    float *x = place(in, memory, layout), *y = place(out, memory, layout);
    const int64_t from = model_plane(in, layout) * element, to = model_plane(out, layout) * element;
    switch (op->kind) {
      case OP_CONV: run_conv(network, op, plan, values, memory, region, layout); break;
      case OP_LINEAR:
      if (layout == BLOCK && !op->dense) run_conv(network, op, plan, values, memory, region, layout);
      else run_linear(network, op, plan, x, y, in->channels, out->channels, layout);
      break;
      case OP_POOL:
      for (int c = 0; c < in->channels; ++c) {
        if (layout == BLOCK) pool_block(op, in, out, x + c * from, y + c * to);
        else pool_single(op, in, out, x + c * from, y + c * to, region);
      }
      if (layout == SINGLE) activate_all(op, y, to * out->channels);
      break;
      case OP_BINS:
      for (int c = 0; c < in->channels; ++c) bins(op, in, out, x + c * from, y + c * to, layout);
      if (layout == SINGLE) activate_all(op, y, to * out->channels);
      break;
      case OP_BINARY: run_binary(op, values, x, place(values + op->other, memory, layout), y, layout); break;
      case OP_AFFINE: run_affine(network, op, in, x, y, layout); break;
      case OP_COPY: run_copy(op, in, out, x, y, layout); break;
      case OP_SOFTMAX: softmax(x, y, in->channels, layout); break;
    }
  }
}

static void run(const model_network *network, int layout, float *memory, float *region) {
  if (layout == BLOCK) run_ops(network, memory, region, BLOCK);
  else run_ops(network, memory, region, SINGLE);
}

// Images [count, C, H, W] <-> a block; lanes without an image are zero.
static void enter(const float *images, int count, float *memory) {
  const model_value *in = model_network_description.values + model_network_description.input;
  const int64_t size = (int64_t)in->channels * in->height * in->width;
  float *to = memory + in->block * LANES;
  for (int64_t k = 0; k < size; ++k) {
    for (int l = 0; l < LANES; ++l) to[k * LANES + l] = l < count ? images[l * size + k] : 0;
  }
}
static void leave(const float *memory, int count, float *results) {
  const model_value *out = model_network_description.values + model_network_description.output;
  const int64_t size = (int64_t)out->channels * out->height * out->width;
  const float *from = memory + out->block * LANES;
  for (int l = 0; l < count; ++l) {
    for (int64_t k = 0; k < size; ++k) results[l * size + k] = from[k * LANES + l];
  }
}
