// Tables of FORM_TAPS: which taps are computed together, and weights in the order in which they are used.
#include <stdlib.h>
#include <string.h>

#include "plan.h"

#define MOST_TAPS 9        // of a kernel
#define SETS (1 << MOST_TAPS)
#define OFTEN 2            // kernels of a filter on average, for taps to be computed together

// Kernels as sets of taps, a bit each.
typedef struct {
  uint16_t *kernels;       // [filters, channels]
  uint32_t have[SETS];     // kernels that would have these taps together
  int most;                // taps together
  int64_t filters, channels;
} sets;

static int most_together(const model_problem *p, int cols) {
  const int sums = p->registers >= 32 ? MODEL_SUMS_TOTAL : MODEL_SUMS_TOTAL / 2;
  return sums / cols < MODEL_SUMS_TAPS ? sums / cols : MODEL_SUMS_TAPS;
}

static int is_possible(const model_problem *p) {
  const model_op *op = p->op;
  const int64_t size = (int64_t)p->in->height * p->in->width;
  const int64_t reach = (int64_t)op->kernel[0] * op->dilation[0] * p->in->width + (int64_t)op->kernel[1] * op->dilation[1];
  return op->kind == OP_CONV && p->layout == SINGLE && !op->dense && op->groups == 1 && op->stride[0] == 1 &&
         op->stride[1] == 1 && p->taps > 1 && p->taps <= MOST_TAPS && p->in->height == p->out->height &&
         p->in->width == p->out->width && size > 1 && size <= (int64_t)MODEL_SUMS_WIDE * p->lanes &&
         reach <= MODEL_SLACK - 64 && p->in->channels <= 65535;
}

// The taps of a kernel in parts that are computed together; their number.
static int parts_of(const sets *s, unsigned kernel, uint16_t *parts) {
  int count = 0;
  while (kernel) {
    unsigned part = 0, left = kernel;
    for (int k = 0; k < s->most && left; ++k, left &= left - 1) part |= left & (0u - left);
    if (s->have[part] >= OFTEN * s->filters || !(part & (part - 1))) {
      parts[count++] = (uint16_t)part;
    } else {
      for (unsigned one = part; one; one &= one - 1) parts[count++] = (uint16_t)(one & (0u - one));
    }
    kernel = left;
  }
  return count;
}

// Read which weights are stored; the number of them. -1: no memory.
static int64_t read_sets(const model_problem *p, sets *s) {
  s->filters = p->out->channels;
  s->channels = p->in->channels;
  s->most = most_together(p, (int)model_up((int64_t)p->in->height * p->in->width, p->lanes));
  s->kernels = malloc((size_t)(s->filters * s->channels) * sizeof *s->kernels + 1);
  memset(s->have, 0, sizeof s->have);
  if (!s->kernels) return -1;
  int64_t stored = 0, at = 0;
  for (int64_t k = 0; k < s->filters * s->channels; ++k, at += p->taps) {
    unsigned word = 0;
    for (int64_t byte = at / 8; byte <= (at + p->taps - 1) / 8; ++byte)
      word |= (unsigned)p->bits[byte] << (8 * (byte - at / 8));
    const unsigned kernel = word >> (at % 8) & ((1u << p->taps) - 1);
    s->kernels[k] = (uint16_t)kernel;
    stored += __builtin_popcount(kernel);
    for (unsigned left = kernel; left;) {
      unsigned part = 0;
      for (int n = 0; n < s->most && left; ++n, left &= left - 1) part |= left & (0u - left);
      ++s->have[part];
    }
  }
  return stored;
}

double model_plan_taps(const model_problem *p, model_plan *plan) {
  sets s;
  if (!is_possible(p)) return -1;
  const int64_t stored = read_sets(p, &s);
  const int cols = (int)model_up((int64_t)p->in->height * p->in->width, p->lanes);
  double cost = -1;
  if (stored == p->op->count) {
    uint32_t counts[SETS] = {0};
    for (int64_t k = 0; k < s.filters * s.channels; ++k) {
      uint16_t parts[MOST_TAPS];
      for (int n = parts_of(&s, s.kernels[k], parts) - 1; n >= 0; --n) ++counts[parts[n]];
    }
    cost = (double)s.filters * cols * 4;
    for (int set = 1; set < SETS; ++set) {
      if (!counts[set]) continue;
      const int taps = __builtin_popcount((unsigned)set), products = taps * cols, loads = taps + cols;
      cost += counts[set] * ((products > loads ? products : loads) * 0.55 + 1.5) * (p->pairs ? 0.6 : 1);
      const double stretches = (double)(counts[set] < s.filters ? counts[set] : s.filters);
      cost += stretches * (1.5 * products + 2 * cols + 10);
    }
    *plan = (model_plan){.form = FORM_TAPS, .rows = 1, .cols = cols, .pass_channels = p->in->channels,
                         .parts = s.filters >= 128 ? 8 : s.filters >= 32 ? 4 : 1};
  }
  free(s.kernels);
  return cost;
}

int64_t model_tap_floats(const model_problem *p, const model_plan *plan) {
  const int64_t sums = (int64_t)MODEL_STRETCHES * MODEL_SUMS_TOTAL * p->lanes + MODEL_SLACK;
  return sums + (p->pairs ? 2 * (int64_t)p->in->channels * plan->cols * p->lanes : 0);
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

// Sort all parts of all kernels into groups; tables are NULL while they are counted.
static void make_groups(const sets *s, const model_plan *plan, int pairs, place *places, uint32_t *filters,
                        uint32_t totals[4], uint32_t *begin, model_group *groups, model_stretch *stretches) {
  uint32_t group = 0, stretch = 0, kernel = 0, value = 0;
  for (int part = 0; part < plan->parts; ++part) {
    if (begin) begin[part] = group;
    for (int set = 1; set < SETS; ++set) {
      place *here = places + set * s->filters;
      const uint32_t count = order(here, s->filters * part / plan->parts, s->filters * (part + 1) / plan->parts, filters);
      if (!count) continue;
      if (groups) {
        groups[group] = (model_group){stretch, count, kernel, value, __builtin_popcount((unsigned)set), {0}};
        int k = 0;
        for (unsigned left = (unsigned)set; left; left &= left - 1) groups[group].tap[k++] = __builtin_ctz(left);
      }
      for (uint32_t n = 0; n < count; ++n) {
        place *one = here + filters[n];
        const uint32_t length = pairs ? (one->count + 1) / 2 : one->count;
        if (stretches) stretches[stretch + n] = (model_stretch){filters[n], length};
        one->kernel = kernel;
        one->value = value;
        kernel += pairs ? 2 * length : length;
        value += length * (uint32_t)__builtin_popcount((unsigned)set);
      }
      ++group;
      stretch += count;
    }
  }
  if (begin) begin[plan->parts] = group;
  totals[0] = group;
  totals[1] = stretch;
  totals[2] = kernel;
  totals[3] = value;
}

static void fill_weights(const sets *s, const float *values, place *places, uint16_t *channels, float *packed) {
  for (int64_t k = 0; k < s->filters * s->channels; ++k) {
    uint16_t parts[MOST_TAPS];
    const int count = parts_of(s, s->kernels[k], parts);
    for (int n = 0; n < count; ++n) {
      place *one = places + parts[n] * s->filters + k / s->channels;
      channels[one->kernel++] = (uint16_t)(k % s->channels);
      for (unsigned left = parts[n]; left; left &= left - 1) {
        const unsigned tap = left & (0u - left);
        packed[one->value++] = values[__builtin_popcount(s->kernels[k] & (tap - 1))];
      }
    }
    values += __builtin_popcount(s->kernels[k]);
  }
}

static uint32_t rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// The same for pairs: the second of a pair is in the upper half, and zero for a kernel that has none beside it.
static void fill_pairs(const sets *s, const float *values, place *places, uint16_t *channels, uint32_t *packed) {
  for (int64_t k = 0; k < s->filters * s->channels; ++k) {
    uint16_t parts[MOST_TAPS];
    const int count = parts_of(s, s->kernels[k], parts);
    for (int n = 0; n < count; ++n) {
      place *one = places + parts[n] * s->filters + k / s->channels;
      const uint32_t odd = one->kernel & 1, taps = (uint32_t)__builtin_popcount(parts[n]);  // stretches begin even
      channels[one->kernel++] = (uint16_t)(k % s->channels);
      if (!odd) channels[one->kernel] = (uint16_t)(k % s->channels);
      uint32_t *pair = packed + one->value;
      for (unsigned left = parts[n]; left; left &= left - 1, ++pair) {
        const unsigned tap = left & (0u - left);
        const uint32_t weight = rounded(values[__builtin_popcount(s->kernels[k] & (tap - 1))]);
        *pair = odd ? *pair | weight << 16 : weight;
      }
      if (odd) one->value += taps;
    }
    values += __builtin_popcount(s->kernels[k]);
  }
}

int model_tap_tables(const model_problem *p, model_plan *plan, model_tables *memory, int fill) {
  sets s;
  const int64_t stored = read_sets(p, &s);
  place *places = calloc((size_t)(SETS * (int64_t)p->out->channels), sizeof *places);
  uint32_t *filters = malloc((size_t)p->out->channels * sizeof *filters);
  int result = stored < 0 || !places || !filters ? MODEL_NO_MEMORY : stored != p->op->count ? MODEL_DAMAGED : MODEL_OK;
  if (!result) {
    for (int64_t k = 0; k < s.filters * s.channels; ++k) {
      uint16_t parts[MOST_TAPS];
      for (int n = parts_of(&s, s.kernels[k], parts) - 1; n >= 0; --n) ++places[parts[n] * s.filters + k / s.channels].count;
    }
    uint32_t totals[4];
    make_groups(&s, plan, p->pairs, places, filters, totals, NULL, NULL, NULL);
    uint32_t *begin = model_take(memory, (size_t)(plan->parts + 1) * sizeof *begin);
    model_group *groups = model_take(memory, totals[0] * sizeof *groups);
    model_stretch *stretches = model_take(memory, totals[1] * sizeof *stretches);
    uint16_t *channels = model_take(memory, totals[2] * sizeof *channels);
    float *packed = model_take(memory, totals[3] * sizeof *packed);
    int32_t *inside = model_take(memory, (size_t)(p->taps * plan->cols * p->lanes) * sizeof *inside);
    if (fill) {
      make_groups(&s, plan, p->pairs, places, filters, totals, begin, groups, stretches);
      if (p->pairs) fill_pairs(&s, p->values, places, channels, (uint32_t *)packed);
      else fill_weights(&s, p->values, places, channels, packed);
      fill_inside(p, plan, inside);
      plan->begin = begin;
      plan->groups = groups;
      plan->stretches = stretches;
      plan->offsets = channels;
      plan->packed = packed;
      plan->inside = inside;
    }
  }
  free(s.kernels);
  free(places);
  free(filters);
  return result;
}
