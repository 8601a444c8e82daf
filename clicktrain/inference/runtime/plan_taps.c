// Tables of FORM_TAPS: which taps are computed together, and weights in the order in which they are used.
#include <stdlib.h>
#include <string.h>

#include "plan.h"

#define MOST_TAPS 9        // of a kernel
#define SETS (1 << MOST_TAPS)
#define OFTEN 2            // kernels of a filter on average, for taps to be computed together

// How kernels are taken apart into sets of taps that are computed together. A set has a bit for each tap.
typedef struct {
  uint32_t kernels[SETS];                // with exactly these taps
  uint32_t counts[SETS];                 // in how many kernels a set is a part
  uint16_t parts[SETS][MOST_TAPS];       // of kernels with these taps
  unsigned char number[SETS];            // of parts
  uint16_t used[SETS], index[SETS];      // sets that are parts, and where they are among these
  int used_count;
  int64_t filters, channels, stored;
} sets;

static int most_together(const model_problem *p, int cols) {
  const int sums = p->registers >= 32 ? MODEL_SUMS_TOTAL : MODEL_SUMS_TOTAL / 2;
  return sums / cols < MODEL_SUMS_TAPS ? sums / cols : MODEL_SUMS_TAPS;
}

// Whether two kernels are computed at once.
static int pairs_of(const model_problem *p) { return model_special_of(p->isa, FORM_TAPS, 2) != NULL; }

static int is_possible(const model_problem *p) {
  const model_op *op = p->op;
  const int64_t size = (int64_t)p->in->height * p->in->width;
  const int64_t rows = (int64_t)op->kernel[0] * op->dilation[0];
  const int64_t reach = rows * p->in->width + (int64_t)op->kernel[1] * op->dilation[1];
  return op->kind == OP_CONV && p->layout == SINGLE && !op->dense && op->groups == 1 && op->stride[0] == 1 &&
         op->stride[1] == 1 && p->taps > 1 && p->taps <= MOST_TAPS && p->in->height == p->out->height &&
         p->in->width == p->out->width && size > 1 && size <= (int64_t)MODEL_SUMS_WIDE * p->lanes &&
         reach <= MODEL_SLACK - 64 && p->in->channels <= 65535;
}

// The first `most` taps of a set.
static unsigned first_taps(unsigned set, int most) {
  unsigned part = 0;
  for (; set && most > 0; --most, set &= set - 1) part |= set & (0u - set);
  return part;
}

static void read_sets(const model_problem *p, sets *s) {
  const int most = most_together(p, (int)model_up((int64_t)p->in->height * p->in->width, p->lanes));
  uint32_t together[SETS] = {0};
  memset(s, 0, sizeof *s);
  s->filters = p->out->channels;
  s->channels = p->in->channels;
  const int64_t all = s->filters * s->channels;
  for (int64_t k = 0; (k = model_next_kernel(p, k, all)) < all; ++k) ++s->kernels[model_kernel(p, k)];
  for (unsigned kernel = 1; kernel < SETS; ++kernel) {
    s->stored += (int64_t)s->kernels[kernel] * model_ones(kernel);
    for (unsigned left = kernel, part; left; left &= ~part)
      together[part = first_taps(left, most)] += s->kernels[kernel];
  }
  for (unsigned kernel = 1; kernel < SETS; ++kernel) {
    if (!s->kernels[kernel]) continue;
    for (unsigned left = kernel, part; left; left &= ~part) {
      part = first_taps(left, most);
      if (together[part] < OFTEN * s->filters) part = first_taps(left, 1);
      s->parts[kernel][s->number[kernel]++] = (uint16_t)part;
      s->counts[part] += s->kernels[kernel];
    }
  }
  for (unsigned set = 1; set < SETS; ++set) {
    if (!s->counts[set]) continue;
    s->index[set] = (uint16_t)s->used_count;
    s->used[s->used_count++] = (uint16_t)set;
  }
}

double model_plan_taps(const model_problem *p, model_plan *plan) {
  if (!is_possible(p)) return -1;
  sets s;
  read_sets(p, &s);
  if (s.stored != p->op->count) return -1;  // damaged: other forms say so
  const int cols = (int)model_up((int64_t)p->in->height * p->in->width, p->lanes);
  double cost = (double)s.filters * cols * 4;
  int64_t stretches = 0, kernels = 0, values = 0;
  for (int n = 0; n < s.used_count; ++n) {
    const unsigned set = s.used[n];
    const int taps = model_ones(set), products = taps * cols, loads = taps + cols;
    const int64_t count = s.counts[set], ends = count < s.filters ? count : s.filters;
    cost += (double)count * ((products > loads ? products : loads) * 0.55 + 1.5) * (pairs_of(p) ? 0.6 : 1);
    cost += (double)ends * (1.5 * products + 2 * cols + 10);
    stretches += ends;
    kernels += pairs_of(p) ? count + ends : count;
    values += (pairs_of(p) ? (count + ends) / 2 : count) * taps;
  }
  *plan = (model_plan){.form = FORM_TAPS, .rows = 1, .cols = cols, .pass_channels = p->in->channels,
                       .parts = s.filters >= 128 ? 8 : s.filters >= 32 ? 4 : 1,
                       .together = pairs_of(p) ? 2 : 1};
  // At most, as tables are counted before they are filled.
  plan->most[0] = (int64_t)plan->parts * s.used_count;
  plan->most[1] = stretches;
  plan->most[2] = kernels;
  plan->most[3] = values;
  return cost;
}

int64_t model_tap_floats(const model_problem *p, const model_plan *plan) {
  const int64_t sums = (int64_t)MODEL_STRETCHES * MODEL_SUMS_TOTAL * p->lanes + MODEL_SLACK;
  return sums + (pairs_of(p) ? 2 * (int64_t)p->in->channels * plan->cols * p->lanes : 0);
}

static void fill_inside(const model_problem *p, const model_plan *plan, int32_t *inside) {
  const model_op *op = p->op;
  for (int t = 0; t < p->taps; ++t) {
    const int64_t down = (int64_t)(t / p->columns) * op->dilation[0] - op->padding[0];
    const int64_t right = (int64_t)(t % p->columns) * op->dilation[1] - op->padding[1];
    for (int64_t k = 0; k < plan->cols * p->lanes; ++k) {
      const int64_t row = k / p->in->width, y = row + down, x = k % p->in->width + right;
      *inside++ = row < p->in->height && y >= 0 && y < p->in->height && x >= 0 && x < p->in->width ? -1 : 0;
    }
  }
}

// Where kernels go, for each set of taps and filter: `count` kernels, `kernel` and `value` of the next one.
typedef struct { uint32_t count, kernel, value; } place;

// Filters of a part with such kernels, those with equal counts together.
static uint32_t order(const place *places, int64_t begin, int64_t end, uint32_t *filters) {
  uint32_t found = 0;
  for (int64_t f = begin; f < end; ++f) {
    if (!places[f].count) continue;
    uint32_t at = found++;
    for (; at > 0 && places[filters[at - 1]].count < places[f].count; --at) filters[at] = filters[at - 1];
    filters[at] = (uint32_t)f;
  }
  return found;
}

// Sort all parts of all kernels into groups.
static void make_groups(const sets *s, const model_plan *plan, int pairs, place *places, uint32_t *filters,
                        uint32_t *begin, model_group *groups, model_stretch *stretches) {
  uint32_t group = 0, stretch = 0, kernel = 0, value = 0;
  for (int part = 0; part < plan->parts; ++part) {
    begin[part] = group;
    for (int n = 0; n < s->used_count; ++n) {
      const unsigned set = s->used[n];
      const uint32_t taps = (uint32_t)model_ones(set);
      place *here = places + n * s->filters;
      const uint32_t first = s->filters * part / plan->parts, end = s->filters * (part + 1) / plan->parts;
      const uint32_t count = order(here, first, end, filters);
      if (!count) continue;
      groups[group] = (model_group){stretch, count, kernel, value, (int)taps, {0}};
      int k = 0;
      for (unsigned left = set; left; left &= left - 1) groups[group].tap[k++] = __builtin_ctz(left);
      for (uint32_t i = 0; i < count; ++i) {
        place *one = here + filters[i];
        const uint32_t length = pairs ? (one->count + 1) / 2 : one->count;
        stretches[stretch++] = (model_stretch){filters[i], length};
        one->kernel = kernel;
        one->value = value;
        kernel += pairs ? 2 * length : length;
        value += length * taps;
      }
      ++group;
    }
  }
  begin[plan->parts] = group;
}

// Of pairs, the second weight is in the upper half, and zero for a kernel that has none beside it.
static void fill_weights(const model_problem *p, const sets *s, place *places, uint16_t *channels, float *packed) {
  const float *values = p->values;
  const int64_t all = s->filters * s->channels;
  uint32_t *const pairs = (uint32_t *)packed;
  for (int64_t k = 0; (k = model_next_kernel(p, k, all)) < all; ++k) {
    const int64_t f = k / s->channels, c = k % s->channels;
    const unsigned kernel = model_kernel(p, k);
    for (int n = 0; n < s->number[kernel]; ++n) {
      const unsigned part = s->parts[kernel][n];
      place *one = places + s->index[part] * s->filters + f;
      const int first = pairs_of(p) && !(one->kernel & 1);  // stretches of pairs begin even
      channels[one->kernel++] = (uint16_t)c;
      if (first) channels[one->kernel] = (uint16_t)c;
      uint32_t at = one->value;
      for (unsigned left = part; left; left &= left - 1, ++at) {
        const float value = values[model_ones(kernel & ((left & (0u - left)) - 1))];
        if (!pairs_of(p)) packed[at] = value;
        else pairs[at] = first ? model_rounded(value) : pairs[at] | model_rounded(value) << 16;
      }
      if (!first) one->value = at;
    }
    values += model_ones(kernel);
  }
}

int model_tap_tables(const model_problem *p, model_plan *plan, model_tables *memory, int fill) {
  uint32_t *begin = model_take(memory, (size_t)(plan->parts + 1) * sizeof *begin);
  model_group *groups = model_take(memory, (size_t)plan->most[0] * sizeof *groups);
  model_stretch *stretches = model_take(memory, (size_t)plan->most[1] * sizeof *stretches);
  uint16_t *channels = model_take(memory, (size_t)plan->most[2] * sizeof *channels);
  float *packed = model_take(memory, (size_t)plan->most[3] * sizeof *packed);
  int32_t *inside = model_take(memory, (size_t)(p->taps * plan->cols * p->lanes) * sizeof *inside);
  if (!fill) return MODEL_OK;
  sets s;
  read_sets(p, &s);
  place *places = calloc((size_t)(s.used_count * s.filters) + 1, sizeof *places);
  uint32_t *filters = malloc((size_t)s.filters * sizeof *filters);
  if (places && filters) {
    const int64_t all = s.filters * s.channels;
    for (int64_t k = 0; (k = model_next_kernel(p, k, all)) < all; ++k) {
      const unsigned kernel = model_kernel(p, k);
      const int64_t f = k / s.channels;
      for (int n = 0; n < s.number[kernel]; ++n) ++places[s.index[s.parts[kernel][n]] * s.filters + f].count;
    }
    make_groups(&s, plan, pairs_of(p), places, filters, begin, groups, stretches);
    fill_weights(p, &s, places, channels, packed);
    fill_inside(p, plan, inside);
    plan->begin = begin;
    plan->groups = groups;
    plan->stretches = stretches;
    plan->offsets = channels;
    plan->packed = packed;
    plan->inside = inside;
  }
  const int result = places && filters ? MODEL_OK : MODEL_NO_MEMORY;
  free(places);
  free(filters);
  return result;
}
