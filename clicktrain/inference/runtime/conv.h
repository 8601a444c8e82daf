// Convolutions: each stored weight is an offset into a region of the input and a number, and is multiplied with a tile
// of positions in registers. The same loops serve both layouts: lanes are positions of one image, or images.
#pragma once
#include "taps.h"

typedef struct {
  const float *source, *values, *bias, *residual;  // residual: NULL without
  const uint16_t *offsets;
  const model_job *jobs;
  float *out;
  int64_t unit, row;                  // floats: of an offset, from row to row of the tile in the region
  int64_t out_plane, out_row;         // floats from filter to filter, from row to row of the tile in the results
  int count, one;                     // jobs; whether only the first lane is a result
  int act;
  float low, high;
} tile;

INLINE void tile_begin(const tile *t, uint32_t first, int filter, const int rows, const int cols, vec *sums) {
  const float *out = t->out + filter * t->out_plane;
  if (first) {
    const vec bias = splat(t->bias[filter]);
    UNROLL for (int k = 0; k < rows * cols; ++k) sums[k] = bias;
  } else if (rows * cols == 1 && t->one) {
    sums[0] = splat(*out);
  } else {
    UNROLL for (int i = 0; i < rows; ++i)
      UNROLL for (int j = 0; j < cols; ++j) sums[i * cols + j] = get(out + i * t->out_row + j * LANES);
  }
}

// Activations other than ReLU, of results that are stored: rare, and long where they are inlined.
NOINLINE void activate_tile(const tile *t, float *out, int rows, int cols) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      float *p = out + i * t->out_row + j * LANES;
      if (t->one) *p = activate(splat(*p), t->act, t->low, t->high)[0];
      else put(p, activate(get(p), t->act, t->low, t->high));
    }
  }
}

INLINE void tile_end(const tile *t, uint32_t last, int filter, const int rows, const int cols, vec *sums) {
  float *out = t->out + filter * t->out_plane;
  if (last) {
    if (t->residual) {
      const float *more = t->residual + filter * t->out_plane;
      if (rows * cols == 1 && t->one) sums[0] += splat(*more);
      else
        UNROLL for (int i = 0; i < rows; ++i)
          UNROLL for (int j = 0; j < cols; ++j) sums[i * cols + j] += get(more + i * t->out_row + j * LANES);
    }
    if (t->act == ACT_RELU) {
      UNROLL for (int k = 0; k < rows * cols; ++k) sums[k] = without(sums[k], sums[k] <= (vec){0});
    }
  }
  if (rows * cols == 1 && t->one) *out = sums[0][0];
  else
    UNROLL for (int i = 0; i < rows; ++i)
      UNROLL for (int j = 0; j < cols; ++j) put(out + i * t->out_row + j * LANES, sums[i * cols + j]);
  if (last && t->act > ACT_RELU) activate_tile(t, out, rows, cols);
}

// One stored weight. The address of each row is kept in a register of its own: compilers would add for each vector.
INLINE void multiply(const float *p, int64_t row, vec weight, const int rows, const int cols, vec *sums) {
  UNROLL for (int i = 0; i < rows; ++i) {
    __asm__("" : "+r"(p));
    UNROLL for (int j = 0; j < cols; ++j) sums[i * cols + j] += weight * get(p + j * LANES);
    p += row;
  }
}

#define AHEAD 3  // jobs

// Filters one by one. Few vectors: several sums of each, or every product would wait for the one before.
INLINE void tile_sparse(const tile *t, const int rows, const int cols) {
  const int size = rows * cols, chains = size == 1 ? 8 : size == 2 ? 4 : size <= 4 ? 2 : 1;
  const float *source = t->source;
  const int64_t unit = t->unit, row = t->row;
  for (int n = 0; n < t->count; ++n) {
    const model_job *job = t->jobs + n;
    const int filter = (int)JOB_FILTER(job);
    const float *values = t->values + job->value;
    const uint16_t *offsets = t->offsets + job->offset;
    if (n + AHEAD < t->count) {  // in passes, weights are not read in the order that they lie in
      FETCH(t->values + job[AHEAD].value);
      FETCH(t->values + job[AHEAD].value + 16);
      FETCH(t->offsets + job[AHEAD].offset);
    }
    vec sums[16];
    tile_begin(t, job->filter & JOB_FIRST, filter, rows, cols, sums);
    uint32_t e = 0;
    if (chains > 1) {
      vec more[16];
      UNROLL for (int k = 0; k < size * (chains - 1); ++k) more[k] = (vec){0};
      for (; e + (uint32_t)chains <= job->count; e += (uint32_t)chains) {
        UNROLL for (int c = 0; c < chains; ++c) {
          const float *p = source + offsets[e + (uint32_t)c] * unit;
          multiply(p, row, splat(values[e + (uint32_t)c]), rows, cols, c ? more + (c - 1) * size : sums);
        }
      }
      UNROLL for (int c = 1; c < chains; ++c)
        UNROLL for (int k = 0; k < size; ++k) sums[k] += more[(c - 1) * size + k];
    }
    for (; e < job->count; ++e)
      multiply(source + offsets[e] * unit, row, splat(values[e]), rows, cols, sums);
    tile_end(t, job->filter & JOB_LAST, filter, rows, cols, sums);
  }
}

// Four filters of a dense layer share each vector of the input.
INLINE void tile_dense(const tile *t, const int rows, const int cols) {
  const int size = rows * cols;
  const float *source = t->source;
  const int64_t unit = t->unit, row = t->row;
  for (int n = 0; n < t->count; ++n) {
    const model_job *job = t->jobs + n;
    const int filter = (int)JOB_FILTER(job), more = JOB_MORE(job);
    const float *values = t->values + job->value;
    const uint16_t *offsets = t->offsets + job->offset;
    vec sums[MODEL_GROUP][MODEL_TILE_DENSE];
    UNROLL for (int g = 0; g < MODEL_GROUP; ++g)
      tile_begin(t, job->filter & JOB_FIRST, filter + least_int(g, more), rows, cols, sums[g]);
    for (uint32_t e = 0; e < job->count; ++e) {
      const float *p = source + offsets[e] * unit, *w = values + MODEL_GROUP * e;
      vec x[MODEL_TILE_DENSE];
      UNROLL for (int i = 0; i < rows; ++i) {
        UNROLL for (int j = 0; j < cols; ++j) x[i * cols + j] = get(p + j * LANES);
        p += row;
      }
      UNROLL for (int g = 0; g < MODEL_GROUP; ++g) {
        const vec weight = splat(w[g]);
        UNROLL for (int k = 0; k < size; ++k) sums[g][k] += weight * x[k];
      }
    }
    UNROLL for (int g = 0; g < MODEL_GROUP; ++g)
      if (g <= more) tile_end(t, job->filter & JOB_LAST, filter + g, rows, cols, sums[g]);
  }
}

typedef void (*tile_function)(const tile *);
#define SPARSE(I, J) NOINLINE void sparse_##I##_##J(const tile *t) { tile_sparse(t, I, J); }
#define DENSE(I, J) NOINLINE void dense_##I##_##J(const tile *t) { tile_dense(t, I, J); }
SPARSE(1, 1) SPARSE(1, 2) SPARSE(1, 3) SPARSE(1, 4) SPARSE(1, 5) SPARSE(1, 6) SPARSE(1, 7) SPARSE(1, 8)
SPARSE(1, 9) SPARSE(1, 10) SPARSE(1, 11) SPARSE(1, 12) SPARSE(1, 13) SPARSE(1, 14) SPARSE(1, 15) SPARSE(1, 16)
SPARSE(2, 1) SPARSE(2, 2) SPARSE(2, 3) SPARSE(2, 4) SPARSE(2, 5) SPARSE(2, 6) SPARSE(2, 7) SPARSE(2, 8)
SPARSE(3, 1) SPARSE(3, 2) SPARSE(3, 3) SPARSE(3, 4) SPARSE(3, 5) SPARSE(4, 1) SPARSE(4, 2) SPARSE(4, 3)
SPARSE(4, 4) SPARSE(5, 1) SPARSE(5, 2) SPARSE(5, 3) SPARSE(6, 1) SPARSE(6, 2) SPARSE(7, 1) SPARSE(7, 2)
SPARSE(8, 1) SPARSE(8, 2) SPARSE(10, 1) SPARSE(12, 1) SPARSE(14, 1) SPARSE(16, 1)
DENSE(1, 1) DENSE(1, 2) DENSE(1, 3) DENSE(1, 4) DENSE(1, 5) DENSE(1, 6) DENSE(2, 1) DENSE(2, 2) DENSE(2, 3)
DENSE(3, 1) DENSE(3, 2) DENSE(4, 1) DENSE(5, 1) DENSE(6, 1)
// [rows - 1][vectors in a row - 1]; NULL: there is no such tile.
static const tile_function sparse_tiles[MODEL_TILE_ROWS][MODEL_TILE_VECTORS] = {
  {sparse_1_1, sparse_1_2, sparse_1_3, sparse_1_4, sparse_1_5, sparse_1_6, sparse_1_7, sparse_1_8, sparse_1_9,
     sparse_1_10, sparse_1_11, sparse_1_12, sparse_1_13, sparse_1_14, sparse_1_15, sparse_1_16},
    {sparse_2_1, sparse_2_2, sparse_2_3, sparse_2_4, sparse_2_5, sparse_2_6, sparse_2_7, sparse_2_8},
    {sparse_3_1, sparse_3_2, sparse_3_3, sparse_3_4, sparse_3_5},
    {sparse_4_1, sparse_4_2, sparse_4_3, sparse_4_4},
    {sparse_5_1, sparse_5_2, sparse_5_3},
    {sparse_6_1, sparse_6_2},
    {sparse_7_1, sparse_7_2},
    {sparse_8_1, sparse_8_2},
    {NULL},
    {sparse_10_1},
    {NULL},
    {sparse_12_1},
    {NULL},
    {sparse_14_1},
    {NULL},
    {sparse_16_1},
};
static const tile_function dense_tiles[MODEL_TILE_DENSE][MODEL_TILE_DENSE] = {
  {dense_1_1, dense_1_2, dense_1_3, dense_1_4, dense_1_5, dense_1_6},
    {dense_2_1, dense_2_2, dense_2_3},
    {dense_3_1, dense_3_2},
    {dense_4_1},
    {dense_5_1},
    {dense_6_1},
};

INLINE void clear_positions(float *to, int64_t count, const int element) {
  if (element == 1) {
    for (int64_t k = 0; k < count; ++k) to[k] = 0;
  }
  else {
    for (int64_t k = 0; k < count; ++k) put(to + k * LANES, (vec){0});
  }
}

// Positions x0, x0 + step, .. of row y of an image, zero outside of it.
INLINE void copy_row(float *to, const float *image, const model_value *in, int64_t y, int64_t x0, int64_t count,
                     int64_t step, const int element) {
  const int64_t width = in->width;
  if (y < 0 || y >= in->height) {
    clear_positions(to, count, element);
    return;
  }
  const int64_t begin = min64(x0 < 0 ? (-x0 + step - 1) / step : 0, count);
  const int64_t end = max64(begin, min64(count, x0 >= width ? 0 : (width - x0 + step - 1) / step));
  clear_positions(to, begin, element);
  copy_positions(to + begin * element, image + (y * width + x0 + begin * step) * element, end - begin, step, element);
  clear_positions(to + end * element, count - end, element);
}

INLINE void fill_rows(const model_plan *plan, const model_op *op, const model_value *in, const float *image,
                      int64_t plane, int channels, int i0, int j0, float *to, const int element) {
  for (int c = 0; c < channels; ++c, image += plane) {
    for (int r = 0; r < plan->region_rows; ++r) {
      const int64_t y = (int64_t)i0 * op->stride[0] - op->padding[0] + r;
      int found = 0;
      for (int s = 0; found < plan->phases; ++s) {
        const int phase = s * op->dilation[1] % op->stride[1];
        int old = 0;
        for (int before = 0; before < s; ++before) old |= before * op->dilation[1] % op->stride[1] == phase;
        if (old) continue;
        ++found;
        copy_row(to, image, in, y, (int64_t)j0 * op->stride[1] - op->padding[1] + phase, plan->phase_cols,
                 op->stride[1], element);
        to += (int64_t)plan->phase_cols * element;
      }
    }
  }
}

// Where rows of the image are as long as those of the results, they lie one after another there as here, moved by some
// positions, and all that differs is what falls off the edges.
INLINE void fill_at_once(const model_plan *plan, const model_op *op, const model_value *in, const float *image,
                         int64_t plane, int channels, int i0, float *to) {
  const int64_t width = in->width, top = i0 - op->padding[0];
  const int vectors = (plan->phase_cols + LANES - 1) / LANES;
  ivec inside[MODEL_TAPS][MODEL_MASKS];
  for (int s = 0; s < op->kernel[1]; ++s) {
    const int64_t shift = s * op->dilation[1] - op->padding[1];
    int32_t *lanes = (int32_t *)inside[s];
    int64_t row = top, column = shift;
    for (int k = 0; k < vectors * LANES; ++k) {
      lanes[k] = row >= 0 && row < in->height && column >= 0 && column < width ? -1 : 0;
      if (++column == width + shift) column = shift, ++row;
    }
  }
  for (int c = 0; c < channels; ++c, image += plane) {
    for (int s = 0; s < op->kernel[1]; ++s, to += plan->phase_cols) {
      const float *from = image + top * width + s * op->dilation[1] - op->padding[1];
      // Rows below the image need not be there: what is beyond this memory is not read.
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = top * width + (int64_t)k * LANES;
        put(to + k * LANES, at < plane ? only(get(from + k * LANES), inside[s][k]) : (vec){0});
      }
    }
  }
}

// A copy for each tap.
INLINE void fill_taps(const model_plan *plan, const model_op *op, const model_value *in, const float *image,
                      int64_t plane, int channels, float *to) {
  const int taps = plan->region_rows, columns = op->kernel[1];
  ivec inside[MODEL_TAPS][MODEL_TILE_VECTORS];
  int64_t moved[MODEL_TAPS];
  for (int t = 0; t < taps; ++t) {
    const int64_t down = t / columns * op->dilation[0] - op->padding[0];
    const int64_t right = t % columns * op->dilation[1] - op->padding[1];
    int32_t *lanes = (int32_t *)inside[t];
    moved[t] = down * in->width + right;
    int64_t row = down, column = right;
    for (int64_t k = 0; k < plan->cols * LANES; ++k) {
      lanes[k] = row - down < in->height && row >= 0 && row < in->height && column >= 0 && column < in->width ? -1 : 0;
      if (++column == in->width + right) column = right, ++row;
    }
  }
  for (int c = 0; c < channels; ++c, image += plane) {
    for (int t = 0; t < taps; ++t) {
      for (int k = 0; k < plan->cols; ++k, to += LANES) put(to, only(get(image + moved[t] + k * LANES), inside[t][k]));
    }
  }
}

INLINE void fill_flat(const model_plan *plan, const model_op *op, const model_value *in, const model_value *out,
                      const float *image, int64_t plane, int channels, int i0, int64_t length, float *to) {
  const int64_t width = out->width, shift = (int64_t)(op->kernel[0] - 1) * op->dilation[0] / op->stride[0];
  const int64_t lines = min64((length + width - 1) / width, out->height - i0 + shift);
  for (int c = 0; c < channels; ++c, image += plane) {
    for (int s = 0; s < op->kernel[1]; ++s) {
      int found = 0;
      for (int r = 0; found < plan->phases; ++r) {
        const int phase = r * op->dilation[0] % op->stride[0];
        int old = 0;
        for (int before = 0; before < r; ++before) old |= before * op->dilation[0] % op->stride[0] == phase;
        if (old) continue;
        ++found;
        for (int64_t m = 0; m < lines; ++m) {
          const int64_t y = (i0 + m) * op->stride[0] + phase - op->padding[0];
          const int64_t count = min64(width, plan->phase_cols - m * width);
          copy_row(to + m * width, image, in, y, (int64_t)s * op->dilation[1] - op->padding[1],
                   count, op->stride[1], 1);
        }
        to += plan->phase_cols;
      }
    }
  }
}

// The first job of a pass for filters from `filter` on.
INLINE int job_of(const model_plan *plan, int pass, int filter) {
  uint32_t low = plan->begin[pass], high = plan->begin[pass + 1];
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if ((int)JOB_FILTER(plan->jobs + middle) < filter) low = middle + 1;
    else high = middle;
  }
  return (int)low;
}

INLINE void run_conv(const model_network *network, const model_op *op, const model_plan *plan,
                     const model_constants *constants, float *memory,
                     float *region, model_worker worker, const int layout) {
  const model_value *values = model_network_description.values;
  const int element = layout == BLOCK ? LANES : 1;
  const model_value *in = values + op->in, *out = values + op->out;
  const int64_t block = layout == BLOCK ? LANES : 1;
  const float *images = memory + (layout == BLOCK ? in->block * block : in->single);
  float *results = memory + (layout == BLOCK ? out->block * block : out->single);
  const float *residual = NULL;
  if (op->other >= 0) {
    const model_value *other = values + op->other;
    residual = memory + (layout == BLOCK ? other->block * block : other->single);
  }
  if (layout == SINGLE && plan->form == FORM_TAPS && plan->together == 1) {
    run_taps(op, plan, in, out, constants->bias, images, residual, results, region, worker);
    return;
  }
  if (plan->form >= FORM_TAPS) {
    model_special_of(network->isa, plan->form, plan->together)(op, plan, in, out, constants->bias, images, residual,
                                                               results, region, worker);
    return;
  }
  const int64_t plane = model_plane(in, layout) * element;
  tile t = {.values = constants->values, .bias = constants->bias,
            .offsets = plan->offsets, .unit = plan->unit, .out_plane = model_plane(out, layout) * element,
            .one = layout == SINGLE && out->height == 1 && out->width == 1, .act = op->act, .low = op->low,
            .high = op->high};
  const tile_function function =
      op->dense ? dense_tiles[plan->rows - 1][plan->cols - 1] : sparse_tiles[plan->rows - 1][plan->cols - 1];
  const int wide = layout == BLOCK ? plan->cols : plan->cols * LANES;
  const int64_t size = (int64_t)out->height * out->width;
  const int flat = plan->form != FORM_ROWS;
  // Positions of tiles: of FORM_ROWS rows and columns, else vectors of positions that follow each other.
  const int64_t vectors = layout == BLOCK ? size : (size + LANES - 1) / LANES;
  const int64_t down = flat ? 1 : (out->height + plan->rows - 1) / plan->rows;
  const int64_t across = flat ? (vectors + plan->cols - 1) / plan->cols : (out->width + wide - 1) / wide;
  t.row = flat ? 0 : (int64_t)op->stride[0] * plan->phases * plan->phase_cols * element;
  t.out_row = flat ? 0 : (int64_t)out->width * element;
  // Threads share tiles, if none overlaps another, else filters.
  const int whole = flat ? vectors % plan->cols == 0 : out->height % plan->rows == 0 && out->width % wide == 0;
  const int64_t tiles = down * across, count = worker.count;
  const int shared = whole && (tiles % count == 0 || tiles >= 4 * count);
  const int64_t begin = shared ? tiles * worker.number / count : 0;
  const int64_t end = shared ? tiles * (worker.number + 1) / count : tiles;
  const int all = shared || count == 1;
  const int filter = (int)(out->channels * (int64_t)worker.number / count);
  const int filter_end = (int)(out->channels * (int64_t)(worker.number + 1) / count);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t a = n / across, b = n % across;
    // The last tile is whole: it computes some results again.
    const int64_t i0 = flat ? 0 : min64(a * plan->rows, out->height - plan->rows);
    const int64_t j0 = flat ? min64(b * plan->cols, vectors - plan->cols) : min64(b * wide, out->width - wide);
    const int64_t first = flat ? j0 * LANES : (i0 * out->width + j0) * element;
    t.out = results + first;
    t.residual = residual ? residual + first : NULL;
    for (int pass = 0; pass < plan->passes; ++pass) {
      const int channel = pass * plan->pass_channels;
      const int channels = least_int(plan->pass_channels, in->channels - channel);
      const int jobs = all ? (int)plan->begin[pass] : job_of(plan, pass, filter);
      t.jobs = plan->jobs + jobs;
      t.count = (all ? (int)plan->begin[pass + 1] : job_of(plan, pass, filter_end)) - jobs;
      if (!t.count) continue;
      const float *from = images + channel * plane;
      if (plan->form == FORM_DIRECT) {
        t.source = from + first;
      } else if (plan->form == FORM_ROWS) {
        fill_rows(plan, op, in, from, plane, channels, (int)i0, (int)j0, region, element);
        t.source = region;
      } else {
        const int64_t line = first / out->width, inside = first % out->width;
        if (plan->moved == MOVED_BY_TAP) fill_taps(plan, op, in, from, plane, channels, region);
        else if (plan->moved) fill_at_once(plan, op, in, from, plane, channels, (int)line, region);
        else fill_flat(plan, op, in, out, from, plane, channels, (int)line, plan->phase_cols, region);
        t.source = region + inside;
      }
      function(&t);
    }
  }
}
