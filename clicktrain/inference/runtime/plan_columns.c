// Tables of FORM_COLUMNS: kernels of each filter as sets of taps that there is code for.
#include <stdlib.h>
#include <string.h>

#include "plan.h"

static const unsigned char has_code[512] = {
#define SET(N) [N] = 1,
#include "sets.h"
#undef SET
};

static int is_possible(const model_problem *p) {
  const model_op *op = p->op;
  int usual = 1;
  for (int k = 0; k < 2; ++k)
    usual &= op->kernel[k] == 3 && op->stride[k] == 1 && op->padding[k] == 1 && op->dilation[k] == 1;
  return usual && p->has_columns && op->kind == OP_CONV && p->layout == SINGLE && !op->dense && op->groups == 1 &&
         p->in->channels <= 65535;
}

double model_plan_columns(const model_problem *p, model_plan *plan) {
  static const struct { int rows, wide; } tiles[] = {{6, 1}, {4, 1}, {3, 2}, {2, 2}, {1, 4}};
  const int wide = (int)model_up(p->in->width, p->lanes);
  double best = -1;
  if (!is_possible(p)) return best;
  for (size_t n = 0; n < sizeof tiles / sizeof *tiles; ++n) {
    const int rows = tiles[n].rows;
    if (tiles[n].wide != wide || rows > p->out->height) continue;
    const double vectors = rows * wide, strips = (double)model_up(p->out->height, rows);
    // Of a kernel, taken as one of four taps: products, and a jump.
    const double kernels = (double)p->op->count / 4;
    const double products = kernels * (4 * vectors * 0.6 + 6) * (p->pairs ? 0.7 : 1);
    const double around = p->out->channels * (6 * vectors + 30) + p->in->channels * (rows + 2.0) * wide * 2;
    const double cost = strips * (products + around);
    if (best >= 0 && cost >= best) continue;
    best = cost;
    // Of pairs, all channels are there twice.
    *plan = (model_plan){.form = FORM_COLUMNS, .rows = rows, .cols = wide,
                         .pass_channels = p->in->channels * (p->pairs ? 2 : 1),
                         .channel = (int64_t)(rows + 2) * wide * p->lanes};
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

// Go through all kernels in parts that there is code for: count them, or write them. The number of weights.
static int64_t parts_of_kernels(const model_problem *p, model_filter *filters, uint16_t *kernels, float *packed,
                                uint32_t *total) {
  int64_t k = 0, stored = 0;
  uint32_t kernel = 0, value = 0;
  const float *values = p->values;
  for (int f = 0; f < p->out->channels; ++f) {
    if (filters) filters[f] = (model_filter){kernel, value};
    for (int c = 0; c < p->in->channels; ++c) {
      const unsigned all = model_kernel(p, k++);
      if (!all) continue;
      stored += model_ones(all);
      if (stored > p->op->count) return -1;
      for (unsigned left = all; left;) {
        const unsigned set = largest_within(left);
        if (kernels) {
          kernels[2 * kernel] = (uint16_t)set;
          kernels[2 * kernel + 1] = (uint16_t)c;
          for (unsigned rest = set; rest; rest &= rest - 1)
            packed[value++] = values[model_ones(all & ((rest & (0u - rest)) - 1))];
        }
        ++kernel;
        left &= ~set;
      }
      values += model_ones(all);
    }
  }
  if (filters) filters[p->out->channels] = (model_filter){kernel, value};
  *total = kernel;
  return stored;
}

// The same for pairs: of each filter, kernels with the same set by twos, the last one by itself, with zeros beside it.
// The number of pairs and of their weights in `totals`.
static int64_t pairs_of_kernels(const model_problem *p, model_filter *filters, uint16_t *kernels, uint32_t *packed,
                                uint32_t totals[2]) {
  int64_t stored = 0;
  uint32_t kernel = 0, value = 0;
  const float *values = p->values;
  for (int f = 0; f < p->out->channels; ++f) {
    struct { uint32_t seen, kernel, value; } of[512] = {{0, 0, 0}};
    const int64_t first = (int64_t)f * p->in->channels;
    if (filters) filters[f] = (model_filter){kernel, value};
    for (int c = 0; c < p->in->channels; ++c) {
      const unsigned all = model_kernel(p, first + c);
      stored += model_ones(all);
      for (unsigned left = all, set; left; left &= ~set) ++of[set = largest_within(left)].seen;
    }
    if (stored > p->op->count) return -1;
    for (unsigned set = 1; set < 512; ++set) {
      const uint32_t pairs = (of[set].seen + 1) / 2;
      of[set].seen = 0;
      of[set].kernel = kernel;
      of[set].value = value;
      kernel += pairs;
      value += pairs * (uint32_t)model_ones(set);
    }
    if (!kernels) continue;
    for (int c = 0; c < p->in->channels; ++c) {
      const unsigned all = model_kernel(p, first + c);
      for (unsigned left = all, set; left; left &= ~set) {
        set = largest_within(left);
        const uint32_t n = of[set].seen++, odd = n & 1;
        uint16_t *entry = kernels + 3 * (of[set].kernel + n / 2);
        uint32_t *pair = packed + of[set].value + n / 2 * (uint32_t)model_ones(set);
        entry[0] = (uint16_t)set;
        entry[2] = (uint16_t)c;
        if (!odd) entry[1] = (uint16_t)c;
        for (unsigned rest = set; rest; rest &= rest - 1, ++pair) {
          const uint32_t weight = model_rounded(values[model_ones(all & ((rest & (0u - rest)) - 1))]);
          *pair = odd ? *pair | weight << 16 : weight;
        }
      }
      values += model_ones(all);
    }
  }
  if (filters) filters[p->out->channels] = (model_filter){kernel, value};
  totals[0] = kernel;
  totals[1] = value;
  return stored;
}

int model_column_tables(const model_problem *p, model_plan *plan, model_tables *memory, int fill) {
  uint32_t totals[2] = {0, (uint32_t)p->op->count};
  if (!fill) {
    const int64_t stored = p->pairs ? pairs_of_kernels(p, NULL, NULL, NULL, totals)
                                    : parts_of_kernels(p, NULL, NULL, NULL, totals);
    if (stored != p->op->count) return MODEL_DAMAGED;
    plan->most[2] = totals[0];
    plan->most[3] = totals[1];
  }
  model_filter *filters = model_take(memory, ((size_t)p->out->channels + 1) * sizeof *filters);
  uint16_t *kernels = model_take(memory, (p->pairs ? 3 : 2) * (size_t)plan->most[2] * sizeof *kernels);
  float *packed = model_take(memory, (size_t)plan->most[3] * sizeof *packed);
  if (!fill) return MODEL_OK;
  if (p->pairs) pairs_of_kernels(p, filters, kernels, (uint32_t *)packed, totals);
  else parts_of_kernels(p, filters, kernels, packed, totals);
  plan->filters = filters;
  plan->offsets = kernels;
  plan->packed = packed;
  return MODEL_OK;
}
