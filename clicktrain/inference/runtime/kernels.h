// All kernels, for the instructions that the file which includes this one has switched on.
#pragma once
#include "conv.h"
#include "layers.h"

INLINE float *place(const model_value *value, float *memory, const int layout) {
  return memory + (layout == BLOCK ? value->block * LANES : value->single);
}

// What a thread does of `count` channels.
typedef struct { int begin, end; } share;
INLINE share share_of(int count, model_worker worker) {
  return (share){(int)((int64_t)count * worker.number / worker.count),
                 (int)((int64_t)count * (worker.number + 1) / worker.count)};
}

INLINE void run_linear(const model_op *op, const model_plan *plan, const model_constants *constants, const float *x,
                       float *y, int inputs, int outputs, model_worker worker, const int layout) {
  const float *bias = constants->bias;
  if (layout == SINGLE && !op->dense) {
    const share jobs = share_of((int)plan->begin[1], worker);
    linear_gathered(op, plan->jobs + jobs.begin, jobs.end - jobs.begin, plan->offsets, constants->values, bias, x, y);
    return;
  }
  const share blocks = share_of((outputs + MODEL_BLOCK - 1) / MODEL_BLOCK, worker);
  const int first = blocks.begin * MODEL_BLOCK, count = least_int(blocks.end * MODEL_BLOCK, outputs) - first;
  const float *weights = constants->values + (int64_t)first * inputs;
  if (count <= 0) return;
  if (layout == BLOCK) linear_block(op, weights, bias + first, x, inputs, count, y + (int64_t)first * LANES);
  else linear_single(op, weights, bias + first, x, inputs, count, y + first);
}

INLINE void run_binary(const model_op *op, const model_value *values, const float *a, const float *b, float *y,
                       model_worker worker, const int layout) {
  const model_value *in = values + op->in, *other = values + op->other;
  const int64_t plane = model_plane(in, layout) * (layout == BLOCK ? LANES : 1);
  const int by_channel = other->height * other->width == 1 && in->height * in->width > 1;
  const share channels = share_of(in->channels, worker);
  const int64_t skipped = channels.begin * plane, length = by_channel ? plane : plane * (channels.end - channels.begin);
  a += skipped;
  y += skipped;
  if (!by_channel) b += skipped;
  for (int c = channels.begin; c < (by_channel ? channels.end : channels.begin + 1); ++c, a += length, y += length) {
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

INLINE void run_affine(const model_op *op, const model_constants *constants, const model_value *in, const float *x,
                       float *y, model_worker worker, const int layout) {
  const float *scale = constants->values, *shift = constants->bias;
  const int64_t plane = model_plane(in, layout) * (layout == BLOCK ? LANES : 1);
  const share channels = share_of(in->channels, worker);
  x += channels.begin * plane;
  y += channels.begin * plane;
  for (int c = channels.begin; c < channels.end; ++c, x += plane, y += plane) {
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

INLINE void run_ops(const model_network *network, float *memory, float *region, model_worker worker,
                    const int layout) {
  const model_description *description = &model_network_description;
  const model_value *values = description->values;
  const int64_t element = layout == BLOCK ? LANES : 1;
  for (int n = 0; n < description->ops_count; ++n) {
    const model_op *op = description->ops + n;
    const model_plan *plan = network->plans[layout] + n;
    const model_constants *constants = network->constants + n;
    const model_value *in = values + op->in, *out = values + op->out;
    float *x = place(in, memory, layout), *y = place(out, memory, layout);
    const int64_t from = model_plane(in, layout) * element, to = model_plane(out, layout) * element;
    const share channels = share_of(in->channels, worker);
    const double begin = network->times ? model_seconds() : 0;
    switch (op->kind) {
      case OP_CONV: run_conv(network, op, plan, constants, memory, region, worker, layout); break;
      case OP_LINEAR:
      if (layout == BLOCK && !op->dense) run_conv(network, op, plan, constants, memory, region, worker, layout);
      else run_linear(op, plan, constants, x, y, in->channels, out->channels, worker, layout);
      break;
      case OP_POOL:
      case OP_BINS:
      for (int c = channels.begin; c < channels.end; ++c) {
        if (op->kind == OP_BINS) bins(op, in, out, x + c * from, y + c * to, layout);
        else if (layout == BLOCK) pool_block(op, in, out, x + c * from, y + c * to);
        else pool_single(op, in, out, x + c * from, y + c * to, region);
      }
      if (layout == SINGLE) activate_all(op, y + channels.begin * to, to * (channels.end - channels.begin));
      break;
      case OP_BINARY: run_binary(op, values, x, place(values + op->other, memory, layout), y, worker, layout); break;
      case OP_AFFINE: run_affine(op, constants, in, x, y, worker, layout); break;
      case OP_COPY:
      if (worker.number == 0) run_copy(op, in, out, x, y, layout);
      break;
      case OP_SOFTMAX:
      if (worker.number == 0) softmax(x, y, in->channels, layout);
      break;
    }
    if (worker.count > 1) model_meet(worker.team);
    if (network->times) {
      const double took = model_seconds() - begin;
      if (network->times[n] < 0 || took < network->times[n]) network->times[n] = took;
    }
  }
}

static void run(const model_network *network, int layout, float *memory, float *region, model_worker worker) {
  if (layout == BLOCK) run_ops(network, memory, region, worker, BLOCK);
  else run_ops(network, memory, region, worker, SINGLE);
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
