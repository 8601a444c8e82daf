// Tables of FORM_POINTWISE: weights of each filter by twos, as bfloat16 numbers, or by fours, as int8 ones.
#include "plan.h"

#define SMALL_BYTES 28672  // of a region: in L1, beside results; or in L2
#define LARGE_BYTES 524288

static int can_be_pointwise(const model_problem *p) {
  const model_op *op = p->op;
  // Results of one position lie one after another.
  return op->kind == OP_CONV && !op->dense && op->groups == 1 && p->taps == 1 &&
         op->padding[0] == 0 && op->padding[1] == 0 &&
         (p->layout == BLOCK || ((int64_t)p->out->height * p->out->width > 1 && op->stride[1] <= 2));
}

double model_plan_pointwise(const model_problem *p, model_plan *plan) {
  if (!can_be_pointwise(p)) return -1;
  const int64_t vectors = model_up((int64_t)p->out->height * p->out->width * p->element, p->lanes);
  int64_t cols = model_up(vectors, model_up(vectors, MODEL_TILE_VECTORS));
  while (p->in_place && vectors % cols) --cols;
  const int64_t tiles = model_up(vectors, cols);
  const int64_t channels = p->in->channels;
  double best = -1;
  int togethers[4];
  model_togethers(p, FORM_POINTWISE, togethers);
  for (const int *together = togethers; *together; ++together) {
    const int64_t cells = model_up(cols, *together), bytes = cells * p->lanes * (int64_t)sizeof(float);
    for (int large = p->passes == CHOICE_LARGE; large < 2 - (p->passes == CHOICE_SMALL); ++large) {
      int64_t most = (large ? LARGE_BYTES : SMALL_BYTES) / bytes;
      most = most < 1 ? 1 : most > channels || p->in_place ? channels : most;
      const int64_t passes = model_up(channels, most), size = model_up(channels, passes);
      const double filters = (double)p->out->channels * (double)passes;
      // Of as many cells as kernels: loads, what interleaves them, and products.
      const double product = (size * bytes > SMALL_BYTES ? 4.2 : 3.4) * (*together == 4 ? 2.2 : 1);
      const double cost = (double)tiles * (model_entries((double)p->op->count, filters, *together) *
                                               ((double)cells * product + 2) +
                                           filters * (3.0 * (double)cols + 12) +
                                           (double)channels * (double)cells * 2 * *together);
      if (best >= 0 && cost >= best) continue;
      best = cost;
      *plan = (model_plan){.form = FORM_POINTWISE, .rows = 1, .cols = (int)cols, .channel = cells * p->lanes,
                           .passes = (int)model_up(channels, size), .pass_channels = (int)size, .unit = p->element,
                           .together = *together};
    }
  }
  return best;
}

// Go through all stored weights: count the entries of each filter and pass, or write them from where `filters` say.
static int go(const model_problem *p, const model_plan *plan, model_filter *filters, uint16_t *channels,
              uint32_t *packed, const float *steps) {
  const int64_t row = p->in->channels, total = row * p->out->channels;
  const uint32_t together = (uint32_t)plan->together;
  int64_t stored = 0, filter = 0, end = row, last = -1;
  uint32_t *next = NULL, seen = 0;
  for (int64_t at = 0; at < total; at += 64) {
    for (uint64_t word = model_word(p->bits, at); word; word &= word - 1, ++stored) {
      const int64_t place = at + __builtin_ctzll(word);
      if (place >= total || stored >= p->op->count) return MODEL_DAMAGED;
      for (; place >= end; end += row) ++filter;
      const int64_t channel = place - (end - row), pass = channel / plan->pass_channels;
      const int64_t list = pass * p->out->channels + filter;
      if (list != last) next = &filters[last = list].kernel, seen = 0;
      const uint32_t entry = *next + seen / together, part = seen % together;
      ++seen;
      if (!packed) {
        *next += part == 0;
        continue;
      }
      for (uint32_t k = part; k < together; ++k)
        channels[together * entry + k] = (uint16_t)(channel % plan->pass_channels);
      const uint32_t bits = model_part(p->values[stored], (int)together, steps ? steps[filter] : 1)
                            << (32 / together * part);
      packed[entry] = part ? packed[entry] | bits : bits;
    }
  }
  return stored == p->op->count ? MODEL_OK : MODEL_DAMAGED;
}

// What a step of int8 is worth, of each filter.
static void find_steps(const model_problem *p, float *steps) {
  const int64_t row = p->in->channels;
  const float *values = p->values;
  for (int64_t f = 0; f < p->out->channels; ++f) {
    int64_t count = 0;
    for (int64_t k = f * row; (k = model_next_kernel(p, k, (f + 1) * row)) < (f + 1) * row; ++k) ++count;
    steps[f] = model_step(values, count);
    values += count;
  }
}

int model_pointwise_tables(const model_problem *p, model_plan *plan, model_tables *memory, int fill) {
  const size_t lists = (size_t)plan->passes * (size_t)p->out->channels, together = (size_t)plan->together;
  // Entries, at most: each list may end with one that is not full.
  const size_t entries = ((size_t)p->op->count + lists * (together - 1)) / together;
  model_filter *filters = model_take(memory, (lists + 1) * sizeof *filters);
  uint16_t *channels = model_take(memory, together * entries * sizeof *channels);
  uint32_t *packed = model_take(memory, entries * sizeof *packed);
  float *scales = model_take(memory, together == 4 ? (size_t)p->out->channels * sizeof *scales : 0);
  if (!fill) return MODEL_OK;
  memset(filters, 0, (lists + 1) * sizeof *filters);
  int failed = go(p, plan, filters, NULL, NULL, NULL);
  if (failed) return failed;
  uint32_t sum = 0;
  for (size_t k = 0; k <= lists; ++k) {
    const uint32_t count = filters[k].kernel;
    filters[k].kernel = filters[k].value = sum;
    sum += count;
  }
  plan->filters = filters;
  plan->offsets = channels;
  plan->packed = (const float *)packed;
  if (together == 4) find_steps(p, scales);
  failed = go(p, plan, filters, channels, packed, together == 4 ? scales : NULL);
  for (int f = 0; together == 4 && f < p->out->channels; ++f) scales[f] /= model_unit(p->op);
  plan->scales = scales;
  return failed;
}
