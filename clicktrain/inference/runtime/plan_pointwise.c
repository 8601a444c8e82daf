// Tables of FORM_POINTWISE: weights of each filter by twos, as bfloat16 numbers.
#include "plan.h"

#define SMALL_BYTES 28672  // of a region: in L1, beside results; or in L2
#define LARGE_BYTES 524288

static int can_be_pointwise(const model_problem *p) {
  const model_op *op = p->op;
  // Results of one position lie one after another.
  return p->has_pointwise && op->kind == OP_CONV && !op->dense && op->groups == 1 && p->taps == 1 &&
         op->padding[0] == 0 && op->padding[1] == 0 &&
         (p->layout == BLOCK || ((int64_t)p->out->height * p->out->width > 1 && op->stride[1] <= 2));
}

double model_plan_pointwise(const model_problem *p, model_plan *plan) {
  if (!can_be_pointwise(p)) return -1;
  const int64_t vectors = model_up((int64_t)p->out->height * p->out->width * p->element, p->lanes);
  const int64_t tiles = model_up(vectors, MODEL_TILE_VECTORS), cols = model_up(vectors, tiles), cells = (cols + 1) / 2;
  const int64_t channels = p->in->channels, bytes = cells * p->lanes * (int64_t)sizeof(float);
  const double pairs = (double)p->op->count / 2, filters = p->out->channels;
  double best = -1;
  for (int large = p->passes == CHOICE_LARGE; large < 2 - (p->passes == CHOICE_SMALL); ++large) {
    int64_t most = (large ? LARGE_BYTES : SMALL_BYTES) / bytes;
    most = most < 1 ? 1 : most > channels ? channels : most;
    const int64_t passes = model_up(channels, most), size = model_up(channels, passes);
    // Of a pair of cells: two loads, two interleaved, two products; the last pair of a filter may have one weight.
    const double product = size * bytes > SMALL_BYTES ? 4.2 : 3.4;
    const double cost = (double)tiles * ((pairs + filters * (double)passes / 4) * ((double)cells * product + 2) +
                                         filters * (double)passes * (3.0 * (double)cols + 12) +
                                         (double)channels * (double)cells * 4);
    if (best >= 0 && cost >= best) continue;
    best = cost;
    *plan = (model_plan){.form = FORM_POINTWISE, .rows = 1, .cols = (int)cols, .passes = (int)model_up(channels, size),
                         .pass_channels = (int)size, .channel = cells * p->lanes, .unit = p->element};
  }
  return best;
}

// Go through all stored weights: count the pairs of each filter and pass, or write them from where `filters` say.
static int go(const model_problem *p, const model_plan *plan, model_filter *filters, uint16_t *channels,
              uint32_t *packed) {
  const int64_t row = p->in->channels, total = row * p->out->channels;
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
      if (!packed) {
        *next += !(seen++ & 1);
        continue;
      }
      const uint32_t pair = *next + seen / 2, weight = model_rounded(p->values[stored]);
      channels[2 * pair + 1] = (uint16_t)(channel % plan->pass_channels);
      if (seen++ & 1) {
        packed[pair] |= weight << 16;
      } else {
        channels[2 * pair] = channels[2 * pair + 1];
        packed[pair] = weight;
      }
    }
  }
  return stored == p->op->count ? MODEL_OK : MODEL_DAMAGED;
}

int model_pointwise_tables(const model_problem *p, model_plan *plan, model_tables *memory, int fill) {
  const size_t lists = (size_t)plan->passes * (size_t)p->out->channels;
  // Pairs, at most: each list may end with a weight alone.
  const size_t pairs = ((size_t)p->op->count + lists) / 2;
  model_filter *filters = model_take(memory, (lists + 1) * sizeof *filters);
  uint16_t *channels = model_take(memory, 2 * pairs * sizeof *channels);
  uint32_t *packed = model_take(memory, pairs * sizeof *packed);
  if (!fill) return MODEL_OK;
  memset(filters, 0, (lists + 1) * sizeof *filters);
  const int failed = go(p, plan, filters, NULL, NULL);
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
  return go(p, plan, filters, channels, packed);
}
