// Tables of FORM_COLUMNS and FORM_WINDOWS: kernels of each filter as sets of taps that there is code for.
#include <stdlib.h>
#include <string.h>

#include "plan.h"

#define WINDOW_BYTES 655360  // of all channels of a pass
#define STRIP_BYTES 786432   // of all channels, which fit L2

static const unsigned char has_code[512] = {
#define SET(N) [N] = 1,
#include "sets.h"
#undef SET
};

static const uint16_t coded[] = {
#define SET(N) N,
#include "sets.h"
#undef SET
};
#define CODED (sizeof coded / sizeof *coded)
#define FREQUENT (CODED > 9 ? (double)CODED - 9 : 1)  // without those of one tap

// Loops over sets that are compiled: by stride, then of columns by vectors of a row, of windows by whether they are
// whole.
static const unsigned char has_columns[3][5] = {
  [1][1] = MODEL_HAS_COLUMNS_1, [1][2] = MODEL_HAS_COLUMNS_2, [1][4] = MODEL_HAS_COLUMNS_4,
    [2][1] = MODEL_HAS_COLUMNS_1_STRIDE_2, [2][2] = MODEL_HAS_COLUMNS_2_STRIDE_2,
    [2][4] = MODEL_HAS_COLUMNS_4_STRIDE_2,
};
static const unsigned char has_windows[3][2] = {
  [1][0] = MODEL_HAS_WINDOWS_1, [1][1] = MODEL_HAS_WINDOWS_1_WHOLE, [2][0] = MODEL_HAS_WINDOWS_2,
    [2][1] = MODEL_HAS_WINDOWS_2_WHOLE,
};

static int can_be_columns(const model_problem *p) {
  const model_op *op = p->op;
  const int stride = op->stride[0];
  int usual = stride == 1 || stride == 2;
  for (int k = 0; k < 2; ++k)
    usual &= op->kernel[k] == 3 && op->stride[k] == stride && op->padding[k] == 1 && op->dilation[k] == 1;
  return usual && op->kind == OP_CONV && p->layout == SINGLE && !op->dense && op->groups == 1 &&
         p->in->channels <= 65535;
}

double model_plan_columns(const model_problem *p, model_plan *plan) {
  static const struct { int stride, rows, wide; } tiles[] = {{1, 6, 1}, {1, 4, 1}, {1, 3, 2}, {1, 2, 2}, {1, 1, 4},
                                                             {2, 7, 1}, {2, 4, 1}, {2, 4, 2}, {2, 2, 2}, {2, 2, 4},
                                                             {2, 1, 4}};
  const int wide = (int)model_up(p->out->width, p->lanes), stride = p->op->stride[0];
  double best = -1;
  int togethers[4];
  model_togethers(p, FORM_COLUMNS, togethers);
  if (!can_be_columns(p) || wide > 4 || !has_columns[stride][wide]) return best;
  for (size_t n = 0; n < sizeof tiles / sizeof *tiles; ++n) {
    const int rows = tiles[n].rows, lines = rows * stride + 3 - stride;
    if (tiles[n].stride != stride || tiles[n].wide != wide || rows > p->out->height) continue;
    for (const int *together = togethers; *together; ++together) {
      const double vectors = rows * wide, strips = (double)model_up(p->out->height, rows);
      // Of kernels, taken as ones of four taps: products, and a jump.
      const double entries = model_entries((double)p->op->count / 4, p->out->channels * FREQUENT, *together);
      const double products = entries * (4 * vectors * 0.6 + 6) * (*together == 4 ? 1.8 : *together == 2 ? 1.3 : 1);
      const double around = p->out->channels * (6 * vectors + 30) + p->in->channels * (double)lines * wide * stride * 2;
      const int64_t channel = model_up((int64_t)lines * wide * stride, *together) * p->lanes;
      const int beyond = channel * p->in->channels * (int64_t)sizeof(float) > STRIP_BYTES;
      const double cost = strips * (products * (beyond ? 2 : 1) + around);
      if (best >= 0 && cost >= best) continue;
      best = cost;
      *plan = (model_plan){.form = FORM_COLUMNS, .rows = rows, .cols = wide, .pass_channels = p->in->channels,
                           .channel = channel, .together = *together};
    }
  }
  return best;
}

static int can_be_windows(const model_problem *p) {
  const model_op *op = p->op;
  const int stride = op->stride[0];
  int usual = stride == 1 || stride == 2;
  for (int k = 0; k < 2; ++k) usual &= op->kernel[k] == 3 && op->stride[k] == stride && op->dilation[k] == 1;
  return usual && op->kind == OP_CONV && p->layout == BLOCK && !op->dense && op->groups == 1 &&
         p->out->height >= MODEL_WINDOW_SIDE && p->out->width >= MODEL_WINDOW_SIDE;
}

double model_plan_windows(const model_problem *p, model_plan *plan) {
  const model_op *op = p->op;
  const int side = MODEL_WINDOW_SIDE, stride = op->stride[0];
  if (!can_be_windows(p)) return -1;
  const int image = side * stride, has = op->padding[0] == 1 && op->padding[1] == 1;
  const int whole = has && p->out->height == side && p->out->width == side && p->in->height == image &&
                    p->in->width == image;
  if (!has_windows[stride][whole] || (p->in_place && (p->out->height % side || p->out->width % side))) return -1;
  const int rows = whole ? image : (side - 1) * stride + 3;
  double best = -1;
  int togethers[4];
  model_togethers(p, FORM_WINDOWS, togethers);
  for (const int *together = togethers; *together; ++together) {
    const int cells = (int)model_up(rows, *together);
    const int64_t bytes = (int64_t)rows * cells * p->lanes * (int64_t)sizeof(float);
    const int64_t channels = p->in->channels, most = WINDOW_BYTES / bytes;
    const int64_t size = model_up(channels, model_up(channels, most)), passes = model_up(channels, size);
    if (p->in_place && passes > 1) continue;
    // Of kernels, taken as ones of four taps: products, or what comes from L2 for them; and a jump.
    const double vectors = side * side, filters = (double)passes * p->out->channels;
    const double entries = model_entries((double)op->count / 4, filters * FREQUENT, *together);
    const double each = *together == 4 ? 5.6 : *together == 2 ? 4.4 : 4.4;
    const double products = entries * (each * vectors * (whole ? 0.75 : 1) + 4);
    const double ends = filters * (vectors * 2.5 + 20);
    const double copied = (double)channels * rows * cells * (1 + *together);
    const double cost = (double)(model_up(p->out->height, side) * model_up(p->out->width, side)) *
                        (products + ends + copied);
    if (best >= 0 && cost >= best) continue;
    best = cost;
    *plan = (model_plan){.form = FORM_WINDOWS, .rows = side, .cols = side, .passes = (int)passes, .whole = whole,
                         .pass_channels = (int)size, .region_rows = rows, .phase_cols = rows,
                         .channel = (int64_t)rows * cells, .together = *together};
  }
  return best;
}

// The set with code that has most of these taps and no other.
static unsigned largest_within(unsigned taps) {
  unsigned best = taps & (0u - taps);
  if (has_code[taps]) return taps;
  for (unsigned set = taps; set; set = (set - 1) & taps)
    if (has_code[set] && model_ones(set) > model_ones(best)) best = set;
  return best;
}

// Where tables of sets are written, and how far: numbers of kernels and weights so far.
typedef struct {
  model_filter *filters;  // NULL while they are counted
  uint16_t *kernels;
  float *packed, *scales;
  uint32_t kernel, value;
} set_tables;

// Of one pass, go through all kernels in parts that there is code for: count them, or write them. The number of
// weights of all channels.
static int64_t parts_of_kernels(const model_problem *p, int first, int end, set_tables *t) {
  int64_t stored = 0;
  const float *values = p->values;
  for (int f = 0; f < p->out->channels; ++f) {
    if (t->filters) *t->filters++ = (model_filter){t->kernel, t->value};
    const int64_t begin = (int64_t)f * p->in->channels, last = begin + p->in->channels;
    for (int64_t k = begin; (k = model_next_kernel(p, k, last)) < last; ++k) {
      const unsigned all = model_kernel(p, k);
      const int c = (int)(k - begin);
      stored += model_ones(all);
      if (stored > p->op->count) return -1;
      for (unsigned left = c >= first && c < end ? all : 0; left;) {
        const unsigned set = largest_within(left);
        if (t->kernels) {
          t->kernels[2 * t->kernel] = (uint16_t)set;
          t->kernels[2 * t->kernel + 1] = (uint16_t)(c - first);
          for (unsigned rest = set; rest; rest &= rest - 1)
            t->packed[t->value++] = values[model_ones(all & ((rest & (0u - rest)) - 1))];
        }
        ++t->kernel;
        left &= ~set;
      }
      values += model_ones(all);
    }
  }
  return stored;
}

// The same for several kernels at once: of each filter, those with the same set by twos or fours, the last ones with
// zeros beside them.
static int64_t groups_of_kernels(const model_problem *p, int together, int begin, int end, set_tables *t) {
  int64_t stored = 0;
  const float *values = p->values;
  struct { uint32_t seen, kernel, value; } of[512];  // of sets with code
  for (int f = 0; f < p->out->channels; ++f) {
    for (size_t n = 0; n < CODED; ++n) of[coded[n]].seen = 0;
    const int64_t first = (int64_t)f * p->in->channels, last = first + p->in->channels, before = stored;
    if (t->filters) *t->filters++ = (model_filter){t->kernel, t->value};
    for (int64_t k = first; (k = model_next_kernel(p, k, last)) < last; ++k) {
      const unsigned all = model_kernel(p, k);
      const int c = (int)(k - first);
      stored += model_ones(all);
      if (c < begin || c >= end) continue;
      for (unsigned left = all, set; left; left &= ~set) ++of[set = largest_within(left)].seen;
    }
    if (stored > p->op->count) return -1;
    for (size_t n = 0; n < CODED; ++n) {
      const unsigned set = coded[n];
      const uint32_t count = (of[set].seen + (uint32_t)together - 1) / (uint32_t)together;
      of[set].seen = 0;
      of[set].kernel = t->kernel;
      of[set].value = t->value;
      t->kernel += count;
      t->value += count * (uint32_t)model_ones(set);
    }
    if (!t->kernels) continue;
    const float step = together == 4 ? model_step(values, stored - before) : 1;
    if (together == 4) t->scales[f] = step / model_unit(p->op);
    for (int64_t k = first; (k = model_next_kernel(p, k, last)) < last; ++k) {
      const unsigned all = model_kernel(p, k);
      const int c = (int)(k - first);
      for (unsigned left = c >= begin && c < end ? all : 0, set; left; left &= ~set) {
        set = largest_within(left);
        const uint32_t n = of[set].seen++, number = n / (uint32_t)together, place = n % (uint32_t)together;
        uint16_t *entry = t->kernels + (1 + together) * (of[set].kernel + number);
        uint32_t *parts = (uint32_t *)t->packed + of[set].value + number * (uint32_t)model_ones(set);
        entry[0] = (uint16_t)set;
        for (uint32_t one = place; one < (uint32_t)together; ++one) entry[1 + one] = (uint16_t)(c - begin);
        for (unsigned rest = set; rest; rest &= rest - 1, ++parts) {
          const float weight = values[model_ones(all & ((rest & (0u - rest)) - 1))];
          const uint32_t part = model_part(weight, together, step) << (32 / (uint32_t)together * place);
          *parts = place ? *parts | part : part;
        }
      }
      values += model_ones(all);
    }
  }
  return stored;
}

static int64_t go(const model_problem *p, int together, int begin, int end, set_tables *t) {
  return together == 1 ? parts_of_kernels(p, begin, end, t) : groups_of_kernels(p, together, begin, end, t);
}

int model_set_tables(const model_problem *p, model_plan *plan, model_tables *memory, int fill) {
  const int passes = plan->form == FORM_WINDOWS ? plan->passes : 1, channels = p->in->channels;
  const int most = plan->form == FORM_WINDOWS ? plan->pass_channels : channels, together = plan->together;
  set_tables t = {0};
  for (int pass = 0; !fill && pass < passes; ++pass) {
    const int end = pass == passes - 1 ? channels : (pass + 1) * most;
    if (go(p, together, pass * most, end, &t) != p->op->count) return MODEL_DAMAGED;
  }
  if (!fill) {
    plan->most[2] = t.kernel;
    plan->most[3] = together > 1 ? t.value : p->op->count;
  }
  model_filter *filters = model_take(memory, ((size_t)passes * (size_t)p->out->channels + 1) * sizeof *filters);
  uint16_t *kernels = model_take(memory, (size_t)(1 + together) * (size_t)plan->most[2] * sizeof *kernels);
  float *packed = model_take(memory, (size_t)plan->most[3] * sizeof *packed);
  float *scales = model_take(memory, together == 4 ? (size_t)p->out->channels * sizeof *scales : 0);
  if (!fill) return MODEL_OK;
  plan->filters = filters;
  plan->offsets = kernels;
  plan->packed = packed;
  plan->scales = scales;
  t = (set_tables){filters, kernels, packed, scales, 0, 0};
  for (int pass = 0; pass < passes; ++pass)
    go(p, together, pass * most, pass == passes - 1 ? channels : (pass + 1) * most, &t);
  *t.filters = (model_filter){t.kernel, t.value};
  return MODEL_OK;
}
