// How each convolution runs on this processor: tiles, passes, offsets of weights and the order of work.
#include <stdlib.h>
#include <string.h>

#include "plan.h"

#define up model_up
#define L1_BYTES 24576    // of a region
#define L2_BYTES 327680
#define SUMS_BYTES 16384  // of all filters, beside a region in L1
#define MOST_OFFSET 65535

typedef model_problem problem;

// Remainders that the taps of one axis leave by its stride, without repeats; the number of them.
static int phases_of(int kernel, int dilation, int stride, int *index) {
  int seen[64], count = 0;
  for (int k = 0; k < kernel; ++k) {
    const int phase = k * dilation % stride;
    int at = 0;
    while (at < count && seen[at] != phase) ++at;
    if (at == count) {
      if (count == 64) return 0;
      seen[count++] = phase;
    }
    if (index) index[k] = at;
  }
  return count;
}

// Choose the passes of a plan: regions in L1, or larger ones in L2 and fewer passes. Returns its time in cycles, by
// rules of thumb. `copied`: cycles for a channel of a region; `load`: what loading an operand costs more than
// multiplying.
static double choose_passes(const problem *p, model_plan *plan, double tiles, double copied, double load) {
  const model_op *op = p->op;
  const double group = op->dense ? MODEL_GROUP : 1, vectors = plan->rows * plan->cols;
  const double weights = (double)op->count / group, filters = p->out->channels / group;
  const int64_t channels = p->in->channels, lane = p->lanes * (int64_t)sizeof(float);
  const int64_t bytes = plan->form == FORM_DIRECT ? (int64_t)vectors * lane
                                                    : plan->channel * p->element * (int64_t)sizeof(float);
  const double sums = p->out->channels * vectors * (double)lane > SUMS_BYTES ? 4 : 2;
  double best = -1;
  for (int large = p->passes == CHOICE_LARGE; large < 2 - (p->passes == CHOICE_SMALL); ++large) {
    int64_t most = (large ? L2_BYTES : L1_BYTES) / bytes;
    const int64_t offsets = plan->form == FORM_DIRECT ? 1 : plan->channel * p->element / plan->unit;
    if (most * offsets > MOST_OFFSET) most = MOST_OFFSET / offsets;
    if (op->kind == OP_LINEAR && p->layout == SINGLE) most = channels;  // no passes
    if (p->in_place) {
      if (channels * offsets > MOST_OFFSET) return -1;
      most = channels;
    }
    most = most < 1 ? 1 : most > channels ? channels : most;
    const int64_t passes = up(channels, most), size = up(channels, passes);
    const double runs = filters * (double)passes < weights ? filters * (double)passes : weights;
    const double each = load * (size * bytes > L1_BYTES ? 1.15 : 1), product = op->dense || each < 1 ? 1 : each;
    const double cost = tiles *
        (copied * (double)channels + weights * (group * vectors * product + 1) + runs * (60 + group * sums * vectors));
    if (best >= 0 && cost >= best) continue;
    best = cost;
    plan->pass_channels = (int)size;
    plan->passes = (int)up(channels, size);
  }
  return best;
}

static double plan_direct(const problem *p, model_plan *plan) {
  const int64_t size = (int64_t)p->out->height * p->out->width;
  const int64_t vectors = p->layout == BLOCK ? size : up(size, p->lanes);
  const int64_t tiles = up(vectors, p->vectors);
  plan->form = FORM_DIRECT;
  plan->rows = 1;
  plan->cols = (int)up(vectors, tiles);
  while (p->in_place && vectors % plan->cols) --plan->cols;
  plan->channel = model_plane(p->in, p->layout);
  plan->unit = plan->channel * p->element;
  return choose_passes(p, plan, (double)up(vectors, plan->cols), 0, 1);
}

// Whether there is code for such a tile.
static int is_tile(int rows, int cols) { return rows <= 8 || (rows % 2 == 0 && rows <= MODEL_TILE_ROWS && cols == 1); }

static double plan_rows(const problem *p, model_plan *plan) {
  const model_op *op = p->op;
  const int width = p->layout == BLOCK ? p->out->width : p->out->width / p->lanes;
  const int phases = phases_of(op->kernel[1], op->dilation[1], op->stride[1], NULL);
  // Vectors of one image begin anywhere: most of them lie in two cache lines.
  const double load = p->layout == BLOCK ? 1 : p->lanes == 16 ? 1.55 : p->lanes == 8 ? 1.3 : 1.1;
  double best = -1;
  if (!phases) return best;
  for (int rows = 1; rows <= p->vectors && rows <= p->out->height; ++rows) {
    for (int cols = 1; rows * cols <= p->vectors && cols <= width; ++cols) {
      if (!is_tile(rows, cols) || (p->in_place && (p->out->height % rows || p->out->width % cols))) continue;
      const int wide = p->layout == BLOCK ? cols : cols * p->lanes;
      const int64_t lines = (int64_t)(rows - 1) * op->stride[0] + (int64_t)(op->kernel[0] - 1) * op->dilation[0] + 1;
      const int64_t columns = wide + (int64_t)(op->kernel[1] - 1) * op->dilation[1] / op->stride[1];
      model_plan trial = {.form = FORM_ROWS, .rows = rows, .cols = cols, .region_rows = (int)lines, .phases = phases,
                          .phase_cols = (int)columns, .channel = lines * phases * columns, .unit = p->element};
      if (trial.channel > MOST_OFFSET) continue;
      const double tiles = (double)(up(p->out->height, rows) * up(p->out->width, wide));
      const int strided = p->layout == SINGLE && op->stride[1] > 2;
      const double line = 14 + (strided ? 1.5 * (double)columns : 1.5 * (double)(columns * p->element) / p->lanes);
      const double cost = choose_passes(p, &trial, tiles, (double)(lines * phases) * line, load);
      if (cost < 0 || (best >= 0 && cost >= best)) continue;
      best = cost;
      *plan = trial;
    }
  }
  return best;
}

// One copy of the image for each tap, where a tile is a whole image: everything that is loaded is aligned.
static double plan_taps(const problem *p, model_plan *plan, int cols) {
  const model_op *op = p->op;
  const int64_t reach = (int64_t)(op->kernel[0] - 1) * op->dilation[0] * p->in->width +
                        (op->kernel[1] - 1) * op->dilation[1];
  if (p->taps > MODEL_TAPS || reach > MODEL_SLACK - 64) return -1;
  *plan = (model_plan){.form = FORM_FLAT, .rows = 1, .cols = cols, .moved = MOVED_BY_TAP, .phase_cols = cols * p->lanes,
                       .region_rows = p->taps, .channel = (int64_t)p->taps * cols * p->lanes, .unit = p->lanes};
  return choose_passes(p, plan, 1, p->taps * (1 + 1.5 * cols), 1);
}

static double plan_flat(const problem *p, model_plan *plan) {
  const model_op *op = p->op;
  const int width = p->out->width;
  const int phases = phases_of(op->kernel[0], op->dilation[0], op->stride[0], NULL);
  if (p->layout == BLOCK || !phases) return -1;
  const int64_t vectors = up((int64_t)p->out->height * width, p->lanes), tiles = up(vectors, p->vectors);
  const int cols = (int)up(vectors, tiles);
  const int64_t shift = (int64_t)(op->kernel[0] - 1) * op->dilation[0] / op->stride[0];
  const int64_t before = tiles == 1 ? 0 : width - 1, length = up(before + cols * p->lanes + shift * width, 16) * 16;
  *plan = (model_plan){.form = FORM_FLAT, .rows = 1, .cols = cols, .phases = phases, .phase_cols = (int)length,
                       .region_rows = op->kernel[1] * phases, .channel = op->kernel[1] * phases * length, .unit = 1};
  if (plan->channel > MOST_OFFSET) return -1;
  const int same = op->stride[0] == 1 && op->stride[1] == 1 && p->in->width == width;
  const int64_t reach = (shift + 1) * width + (int64_t)op->kernel[1] * op->dilation[1];
  if (same && op->kernel[1] <= MODEL_TAPS && length / p->lanes < MODEL_MASKS && reach < MODEL_SLACK - 64)
    plan->moved = MOVED_AT_ONCE;
  const double arrays = op->kernel[1] * phases, rows = (double)length / width;
  const double copied = plan->moved ? arrays * (4 + 1.5 * (double)length / p->lanes)
                                    : arrays * rows * (14 + (double)width / p->lanes * (op->stride[1] > 2 ? 16 : 1.5));
  // A tap whose rows begin inside a vector takes one cache line more than there are vectors.
  int inside = 0;
  for (int r = 0; r < op->kernel[0]; ++r) inside += r * op->dilation[0] / op->stride[0] * width % p->lanes != 0;
  const double load = 1 + (double)inside / op->kernel[0] / cols * (p->lanes == 16 ? 1 : 0.5) +
                      (tiles > 1 && width % p->lanes);
  const double cost = choose_passes(p, plan, (double)tiles, copied, load);
  model_plan taps;
  const double by_taps =
      plan->moved && tiles == 1 && p->in->height == p->out->height && inside ? plan_taps(p, &taps, cols) : -1;
  if (by_taps < 0 || by_taps >= cost) return cost;
  *plan = taps;
  return by_taps;
}

static int choose_form(const problem *p, model_plan *plan) {
  const model_op *op = p->op;
  // A linear layer has one position, from which no stride leads.
  const int direct = op->kernel[0] == 1 && op->kernel[1] == 1 && op->padding[0] == 0 && op->padding[1] == 0 &&
                     (op->kind == OP_LINEAR || (op->stride[0] == 1 && op->stride[1] == 1));
  double (*const forms[])(const problem *, model_plan *) = {plan_rows, plan_flat, model_plan_taps, model_plan_columns,
                                                            model_plan_windows, model_plan_pointwise};
  double best = direct ? plan_direct(p, plan) : -1;
  // Of those that can be direct, another choice than this is to be so.
  if (direct && p->form && p->form != CHOICE_POINTWISE) return MODEL_OK;
  for (int form = direct ? CHOICE_POINTWISE : CHOICE_ROWS; form < CHOICES; ++form) {
    model_plan trial = {0};
    const double cost = forms[form - 1](p, &trial);
    if (cost < 0 || (best >= 0 && cost >= best && form != p->form)) continue;
    *plan = trial;
    best = cost;
    if (form == p->form) break;
  }
  return best < 0 ? MODEL_TOO_LARGE : MODEL_OK;
}

// Offsets of all weights of all channels, as if each were there.
static void offsets_of(const problem *p, const model_plan *plan, uint16_t *where) {
  const model_op *op = p->op;
  int phase[2][64];
  if (plan->form != FORM_DIRECT) {
    phases_of(op->kernel[0], op->dilation[0], op->stride[0], phase[0]);
    phases_of(op->kernel[1], op->dilation[1], op->stride[1], phase[1]);
  }
  for (int c = 0; c < p->in->channels; ++c) {
    const int64_t channel = c % plan->pass_channels;
    for (int k = 0; k < p->taps; ++k) {
      const int r = k / p->columns, s = k % p->columns;
      int64_t offset = channel;
      if (plan->form == FORM_ROWS)
        offset = channel * plan->channel + ((int64_t)r * op->dilation[0] * plan->phases + phase[1][s]) *
                     plan->phase_cols +
            s * op->dilation[1] / op->stride[1];
      if (plan->moved == MOVED_BY_TAP)
        offset = (channel * plan->channel + (int64_t)k * plan->phase_cols) / plan->unit;
      else if (plan->form == FORM_FLAT)
        offset = channel * plan->channel + ((int64_t)s * plan->phases + phase[0][r]) * plan->phase_cols +
            (int64_t)(r * op->dilation[0] / op->stride[0]) * p->out->width;
      *where++ = (uint16_t)offset;
    }
  }
}

typedef struct {
  const problem *p;
  const model_plan *plan;
  int64_t row;             // weights of a filter, as if all were there
  uint32_t *begin;         // [passes + 1]: counts, then where the next job of a pass goes
  model_job *jobs;         // NULL while jobs are counted
  model_job *last;
  int64_t filter;          // of the last job
  int pass;
} job_list;

static void new_job(job_list *list, int64_t filter, int pass, uint32_t value, uint32_t offset, uint32_t count) {
  if (!list->jobs) {
    ++list->begin[pass + 1];
  } else {
    model_job *job = list->jobs + list->begin[pass]++;
    *job = (model_job){value, offset, count, (uint32_t)filter};
    if (filter != list->filter) {
      if (list->last) list->last->filter |= JOB_LAST;
      job->filter |= JOB_FIRST;
    }
    list->last = job;
  }
  list->filter = filter;
  list->pass = pass;
}

// Jobs of stored weights, in the order of filters; 0 if the bits are not those of `count` weights.
static int sparse_jobs(job_list *list, const unsigned char *bits, const uint16_t *where, uint16_t *offsets) {
  const model_op *op = list->p->op;
  const int64_t filters = list->p->out->channels, total = filters * list->row;
  const int64_t group_filters = filters / op->groups, group_channels = list->p->in->channels / op->groups;
  int64_t filter = 0, end = list->row, stored = 0, first = 0, shift = 0;
  list->filter = -1;
  list->last = NULL;
  for (int64_t at = 0; at < total; at += 64) {
    for (uint64_t word = model_word(bits, at); word; word &= word - 1) {
      const int64_t place = at + __builtin_ctzll(word);
      if (place >= total || stored >= op->count) return 0;
      for (; place >= end; end += list->row) {
        if (list->filter != filter) new_job(list, filter, 0, (uint32_t)stored, (uint32_t)stored, 0);
        first = ++filter * list->row;
        shift = filter / group_filters * group_channels * list->p->taps;
      }
      const int64_t inside = place - first + shift;
      const int pass = (int)(inside / list->p->taps / list->plan->pass_channels);
      if (list->filter != filter || list->pass != pass) {
        new_job(list, filter, pass, (uint32_t)stored, (uint32_t)stored, 0);
      }
      if (list->jobs) {
        ++list->last->count;
        offsets[stored] = where[inside];
      }
      ++stored;
    }
  }
  for (; filter < filters; ++filter) {
    if (list->filter != filter) new_job(list, filter, 0, (uint32_t)stored, (uint32_t)stored, 0);
  }
  if (list->jobs && list->last) list->last->filter |= JOB_LAST;
  return stored == op->count;
}

// Jobs of a dense layer: four filters each.
static void dense_jobs(job_list *list) {
  const model_op *op = list->p->op;
  const int64_t filters = list->p->out->channels / op->groups, channels = list->p->in->channels / op->groups;
  const int64_t fours = up(filters, MODEL_GROUP), taps = list->p->taps, most = list->plan->pass_channels;
  list->filter = -1;
  list->last = NULL;
  for (int64_t group = 0; group < op->groups; ++group) {
    for (int64_t four = 0; four < fours; ++four) {
      const int64_t filter = group * filters + four * MODEL_GROUP, left = filters - four * MODEL_GROUP;
      const int64_t begin = group * channels, end = begin + channels;
      const int64_t weights = (group * fours + four) * channels * taps;
      for (int64_t c = begin, next; c < end; c = next) {
        next = (c / most + 1) * most;
        if (next > end) next = end;
        const int64_t value = (weights + (c - begin) * taps) * MODEL_GROUP;
        new_job(list, filter, (int)(c / most), (uint32_t)value, (uint32_t)(c * taps), (uint32_t)((next - c) * taps));
        if (list->jobs) list->last->filter |= (uint32_t)((left < MODEL_GROUP ? left : MODEL_GROUP) - 1) << 28;
      }
    }
  }
  if (list->jobs && list->last) list->last->filter |= JOB_LAST;
}

void *model_take(model_tables *memory, size_t bytes) {
  const size_t whole = (bytes + MODEL_ALIGNMENT - 1) / MODEL_ALIGNMENT * MODEL_ALIGNMENT;
  memory->used += whole;
  if (!memory->at || whole > memory->left) return NULL;
  void *taken = memory->at;
  memory->at += whole;
  memory->left -= whole;
  return taken;
}

// Count, or fill, the tables of one plan.
static int make_tables(const problem *p, model_plan *plan, model_tables *memory, int fill) {
  const model_op *op = p->op;
  const int64_t all = (int64_t)p->in->channels * p->taps;
  const size_t passes = (size_t)plan->passes, stored = (size_t)(op->dense ? all : op->count);
  uint32_t *begin = calloc(passes + 1, sizeof *begin);
  uint16_t *where = malloc((size_t)all * sizeof *where);
  int result = begin && where ? MODEL_OK : MODEL_NO_MEMORY;
  if (!result) {
    job_list list = {.p = p, .plan = plan, .row = all / op->groups, .begin = begin};
    offsets_of(p, plan, where);
    if (op->dense) dense_jobs(&list);
    else if (!sparse_jobs(&list, p->bits, where, NULL)) result = MODEL_DAMAGED;
    for (size_t pass = 0; pass < passes; ++pass) begin[pass + 1] += begin[pass];
    uint32_t *own = model_take(memory, (passes + 1) * sizeof *own);
    model_job *jobs = model_take(memory, begin[passes] * sizeof *jobs);
    uint16_t *offsets = model_take(memory, stored * sizeof *offsets);
    if (!result && fill) {
      memcpy(own, begin, (passes + 1) * sizeof *own);
      list.jobs = jobs;
      if (op->dense) {
        memcpy(offsets, where, stored * sizeof *offsets);
        dense_jobs(&list);
      } else {
        sparse_jobs(&list, p->bits, where, offsets);
      }
      plan->begin = own;
      plan->jobs = jobs;
      plan->offsets = offsets;
    }
  }
  free(begin);
  free(where);
  return result;
}

static int plan_one(model_network *network, int index, int layout, model_tables *memory, int fill) {
  const model_op *op = NETWORK->ops + index;
  const int64_t row = NETWORK->values[op->in].width + 2 * (op->padding[1] > 0 ? op->padding[1] : 0) + op->stride[1] +
                      MODEL_SLACK;
  if (op->kind == OP_POOL && network->region < row) network->region = row;
  if (!(op->kind == OP_CONV || (op->kind == OP_LINEAR && !op->dense))) return MODEL_OK;
  const int lanes = network->isa->lanes, registers = network->isa->registers;
  problem p = {.op = op, .in = NETWORK->values + op->in, .out = NETWORK->values + op->out, .layout = layout,
               .lanes = lanes, .element = layout == BLOCK ? lanes : 1, .taps = op->kernel[0] * op->kernel[1],
               .columns = op->kernel[1]};
  const unsigned char choice = network->choices ? network->choices[layout * NETWORK->ops_count + index] : 0;
  p.form = choice % 8;
  p.passes = choice / 8 % 4;
  p.registers = registers;
  p.isa = network->isa;
  p.in_place = layout == BLOCK && op->other >= 0 && NETWORK->values[op->other].block == p.out->block;
  p.values = (const float *)(network->weights + op->values);
  p.bits = op->dense ? NULL : network->weights + op->bits;
  p.vectors = op->dense ? (registers >= 32 ? MODEL_TILE_DENSE : 3) : (registers >= 32 ? MODEL_TILE_VECTORS : 12);
  model_plan *plan = network->plans[layout] + index;
  if (!fill) {
    if (op->kernel[0] > 64 || op->kernel[1] > 64 || p.in->channels > MOST_OFFSET) return MODEL_TOO_LARGE;
    const int failed = choose_form(&p, plan);
    if (failed) return failed;
    if (plan->form != FORM_DIRECT) {
      const int64_t floats = MODEL_SLACK + (plan->form == FORM_TAPS
                                                ? model_tap_floats(&p, plan)
                                                : plan->channel * plan->pass_channels *
                                                      (plan->form == FORM_POINTWISE ? 1 : p.element));
      if (floats > network->region) network->region = floats;
    }
  }
  if (plan->form == FORM_TAPS) return model_tap_tables(&p, plan, memory, fill);
  if (plan->form == FORM_COLUMNS || plan->form == FORM_WINDOWS) return model_set_tables(&p, plan, memory, fill);
  if (plan->form == FORM_POINTWISE) return model_pointwise_tables(&p, plan, memory, fill);
  return make_tables(&p, plan, memory, fill);
}

int model_plan_all(model_network *network) {
  const size_t count = (size_t)NETWORK->ops_count;
  model_plan *plans = calloc(count * LAYOUTS + 1, sizeof *plans);
  if (!plans) return MODEL_NO_MEMORY;
  network->plans[SINGLE] = plans;
  network->plans[BLOCK] = plans + count;
  model_tables memory = {0};
  for (int fill = 0; fill < 2; ++fill) {
    for (int layout = 0; layout < (network->blocks ? LAYOUTS : 1); ++layout) {
      for (int index = 0; index < NETWORK->ops_count; ++index) {
        const int failed = plan_one(network, index, layout, &memory, fill);
        if (failed) return failed;
      }
    }
    if (fill) break;
    network->tables = memory.used;
    network->own_tables = malloc(memory.used + MODEL_ALIGNMENT);
    if (!network->own_tables) return MODEL_NO_MEMORY;
    const uintptr_t past = (uintptr_t)network->own_tables % MODEL_ALIGNMENT;
    memory = (model_tables){.at = (unsigned char *)network->own_tables + (past ? MODEL_ALIGNMENT - past : 0),
                            .left = memory.used};
  }
  return MODEL_OK;
}
