// How each convolution runs on this processor: tiles, passes, offsets of weights and the order of work.
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

#define NETWORK (&model_network_description)
#define L1_BYTES 24576     // of a region, where it is read for many results at a time
#define L2_BYTES 196608    // where there are few: more of a filter's weights follow each other
#define MANY_VECTORS 8
#define MOST_OFFSET 65535

typedef struct {
  const model_op *op;
  const model_value *in, *out;
  int layout, lanes, element;  // element: floats of one position
  int taps, columns;           // of a kernel, of its rows
  int vectors;                 // most in a tile
} problem;

static int min_int(int a, int b) { return a < b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Time of a plan in vector operations: weights for each vector of a tile, and copying regions.
static double cost_of(const problem *p, double tiles, double vectors, double copied, double apart) {
  const double weights = (double)p->op->count / p->in->channels;
  return tiles * (weights * (vectors * apart + 2.5) + 2.0 * copied);
}

static double plan_direct(const problem *p, model_plan *plan) {
  const int64_t size = (int64_t)p->out->height * p->out->width;
  const int64_t vectors = p->layout == BLOCK ? size : up(size, p->lanes);
  const int64_t tiles = up(vectors, p->vectors);
  plan->form = FORM_DIRECT;
  plan->rows = 1;
  plan->cols = (int)up(vectors, tiles);
  plan->channel = model_plane(p->in, p->layout);
  plan->unit = plan->channel * p->element;
  return 0;
}

static double plan_rows(const problem *p, model_plan *plan) {
  const model_op *op = p->op;
  const int width = p->layout == BLOCK ? p->out->width : p->out->width / p->lanes;
  const int phases = phases_of(op->kernel[1], op->dilation[1], op->stride[1], NULL);
  double best = -1;
  if (!phases) return best;
  for (int rows = 1; rows <= min_int(MODEL_TILE_ROWS, p->out->height); ++rows)
    for (int cols = 1; rows * cols <= p->vectors && cols <= width; ++cols) {
      const int wide = p->layout == BLOCK ? cols : cols * p->lanes;
      const int64_t lines = (int64_t)(rows - 1) * op->stride[0] + (int64_t)(op->kernel[0] - 1) * op->dilation[0] + 1;
      const int64_t columns = wide + (int64_t)(op->kernel[1] - 1) * op->dilation[1] / op->stride[1];
      const int64_t channel = lines * phases * columns;
      if (channel > MOST_OFFSET) continue;
      const double tiles = (double)(up(p->out->height, rows) * up(p->out->width, wide));
      const double copied = (double)(channel * p->element) / p->lanes + 2.0 * (double)lines;
      // Vectors of one image begin anywhere: most of them lie in two cache lines.
      const double cost = cost_of(p, tiles, rows * cols, copied, p->layout == BLOCK ? 1 : 1.4);
      if (best >= 0 && cost >= best) continue;
      best = cost;
      plan->form = FORM_ROWS;
      plan->rows = rows;
      plan->cols = cols;
      plan->region_rows = (int)lines;
      plan->phases = phases;
      plan->phase_cols = (int)columns;
      plan->channel = channel;
      plan->unit = p->element;
    }
  return best;
}

static double plan_flat(const problem *p, model_plan *plan) {
  const model_op *op = p->op;
  const int width = p->out->width;
  const int phases = phases_of(op->kernel[0], op->dilation[0], op->stride[0], NULL);
  if (p->layout == BLOCK || !phases || op->kernel[1] > 64) return -1;
  const int64_t vectors = up((int64_t)p->out->height * width, p->lanes), tiles = up(vectors, p->vectors);
  const int cols = (int)up(vectors, tiles);
  const int64_t shift = (int64_t)(op->kernel[0] - 1) * op->dilation[0] / op->stride[0];
  const int64_t before = tiles == 1 ? 0 : width - 1, length = up(before + cols * p->lanes + shift * width, 4) * 4;
  const int64_t channel = op->kernel[1] * phases * length;
  if (channel > MOST_OFFSET) return -1;
  plan->form = FORM_FLAT;
  plan->rows = 1;
  plan->cols = cols;
  plan->phases = phases;
  plan->region_rows = (int)(op->kernel[1] * phases);
  plan->phase_cols = (int)length;
  plan->channel = channel;
  plan->unit = 1;
  const double lines = (double)(op->kernel[1] * phases) * ((double)length / width);
  return cost_of(p, (double)tiles, cols, lines * (1.0 + (double)width / p->lanes), 1.2);
}

static int choose_form(const problem *p, model_plan *plan) {
  const model_op *op = p->op;
  const int plain = op->kernel[0] == 1 && op->kernel[1] == 1 && op->stride[0] == 1 && op->stride[1] == 1 &&
      op->padding[0] == 0 && op->padding[1] == 0;
  if (plain) {
    plan_direct(p, plan);
  } else {
    model_plan flat = {0}, rows = {0};
    const double by_rows = plan_rows(p, &rows), by_flat = plan_flat(p, &flat);
    if (by_rows < 0 && by_flat < 0) return MODEL_TOO_LARGE;
    *plan = by_flat < 0 || (by_rows >= 0 && by_rows <= by_flat) ? rows : flat;
  }
  const int64_t floats = plan->channel * p->element, channels = p->in->channels;
  const int64_t bytes = plan->rows * plan->cols >= MANY_VECTORS ? L1_BYTES : L2_BYTES;
  int64_t most = bytes / (floats * (int64_t)sizeof(float));
  if (plain) most = bytes / (plan->rows * plan->cols * p->lanes * (int64_t)sizeof(float));
  else if (most * plan->channel > MOST_OFFSET) most = MOST_OFFSET / plan->channel;
  if (op->kind == OP_LINEAR && p->layout == SINGLE) most = channels;
  most = most < 1 ? 1 : most > channels ? channels : most;
  plan->passes = (int)up(channels, most);
  plan->pass_channels = (int)up(channels, plan->passes);
  plan->passes = (int)up(channels, plan->pass_channels);
  return MODEL_OK;
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
        offset = channel * plan->channel + ((int64_t)r * op->dilation[0] * plan->phases + phase[1][s]) * plan->phase_cols +
            s * op->dilation[1] / op->stride[1];
      if (plan->form == FORM_FLAT)
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
    uint64_t word = 0;
    for (int b = 0; b < 8; ++b) word |= (uint64_t)bits[at / 8 + b] << (8 * b);
    for (; word; word &= word - 1) {
      const int64_t place = at + __builtin_ctzll(word);
      if (place >= total || stored >= op->count) return 0;
      for (; place >= end; end += list->row) {
        if (list->filter != filter) new_job(list, filter, 0, (uint32_t)stored, (uint32_t)stored, 0);
        first = ++filter * list->row;
        shift = filter / group_filters * group_channels * list->p->taps;
      }
      const int64_t inside = place - first + shift;
      const int pass = (int)(inside / list->p->taps / list->plan->pass_channels);
      if (list->filter != filter || list->pass != pass) new_job(list, filter, pass, (uint32_t)stored, (uint32_t)stored, 0);
      if (list->jobs) {
        ++list->last->count;
        offsets[stored] = where[inside];
      }
      ++stored;
    }
  }
  for (; filter < filters; ++filter)
    if (list->filter != filter) new_job(list, filter, 0, (uint32_t)stored, (uint32_t)stored, 0);
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
  for (int64_t group = 0; group < op->groups; ++group)
    for (int64_t four = 0; four < fours; ++four) {
      const int64_t filter = group * filters + four * MODEL_GROUP, left = filters - four * MODEL_GROUP;
      const int64_t begin = group * channels, end = begin + channels, weights = (group * fours + four) * channels * taps;
      for (int64_t c = begin, next; c < end; c = next) {
        next = (c / most + 1) * most;
        if (next > end) next = end;
        const int64_t value = (weights + (c - begin) * taps) * MODEL_GROUP;
        new_job(list, filter, (int)(c / most), (uint32_t)value, (uint32_t)(c * taps), (uint32_t)((next - c) * taps));
        if (list->jobs) list->last->filter |= (uint32_t)((left < MODEL_GROUP ? left : MODEL_GROUP) - 1) << 28;
      }
    }
  if (list->jobs && list->last) list->last->filter |= JOB_LAST;
}

typedef struct { unsigned char *at; size_t left, used; } table_memory;

static void *take(table_memory *memory, size_t bytes) {
  const size_t whole = (bytes + 15) / 16 * 16;
  memory->used += whole;
  if (!memory->at || whole > memory->left) return NULL;
  void *taken = memory->at;
  memory->at += whole;
  memory->left -= whole;
  return taken;
}

// Count, or fill, the tables of one plan.
static int make_tables(const model_network *network, const problem *p, model_plan *plan, table_memory *memory, int fill) {
  const model_op *op = p->op;
  const int64_t all = (int64_t)p->in->channels * p->taps;
  const size_t passes = (size_t)plan->passes, stored = (size_t)(op->dense ? all : op->count);
  uint32_t *begin = calloc(passes + 1, sizeof *begin);
  uint16_t *where = malloc((size_t)all * sizeof *where);
  int result = begin && where ? MODEL_OK : MODEL_NO_MEMORY;
  if (!result) {
    job_list list = {.p = p, .plan = plan, .row = all / op->groups, .begin = begin};
    offsets_of(p, plan, where);
    const unsigned char *bits = network->weights + (op->dense ? 0 : op->bits);
    if (op->dense) dense_jobs(&list);
    else if (!sparse_jobs(&list, bits, where, NULL)) result = MODEL_DAMAGED;
    for (size_t pass = 0; pass < passes; ++pass) begin[pass + 1] += begin[pass];
    uint32_t *own = take(memory, (passes + 1) * sizeof *own);
    model_job *jobs = take(memory, begin[passes] * sizeof *jobs);
    uint16_t *offsets = take(memory, stored * sizeof *offsets);
    if (!result && fill) {
      memcpy(own, begin, (passes + 1) * sizeof *own);
      list.jobs = jobs;
      if (op->dense) {
        memcpy(offsets, where, stored * sizeof *offsets);
        dense_jobs(&list);
      } else {
        sparse_jobs(&list, bits, where, offsets);
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

static int plan_one(model_network *network, int index, int layout, table_memory *memory, int fill) {
  const model_op *op = NETWORK->ops + index;
  if (op->kind == OP_POOL && network->region < NETWORK->values[op->in].width + MODEL_SLACK)
    network->region = NETWORK->values[op->in].width + MODEL_SLACK;  // a row
  if (!(op->kind == OP_CONV || (op->kind == OP_LINEAR && !op->dense))) return MODEL_OK;
  const int lanes = network->isa->lanes, registers = network->isa->registers;
  problem p = {.op = op, .in = NETWORK->values + op->in, .out = NETWORK->values + op->out, .layout = layout,
               .lanes = lanes, .element = layout == BLOCK ? lanes : 1, .taps = op->kernel[0] * op->kernel[1],
               .columns = op->kernel[1]};
  p.vectors = op->dense ? (registers >= 32 ? MODEL_TILE_DENSE : 3) : (registers >= 32 ? MODEL_TILE_VECTORS : 12);
  model_plan *plan = network->plans[layout] + index;
  if (!fill) {
    if (op->kernel[0] > 64 || op->kernel[1] > 64 || p.in->channels > MOST_OFFSET) return MODEL_TOO_LARGE;
    const int failed = choose_form(&p, plan);
    if (failed) return failed;
    if (plan->form != FORM_DIRECT) {
      const int64_t floats = plan->channel * plan->pass_channels * p.element + MODEL_SLACK;
      if (floats > network->region) network->region = floats;
    }
  }
  return make_tables(network, &p, plan, memory, fill);
}

int model_plan_all(model_network *network) {
  const size_t count = (size_t)NETWORK->ops_count;
  model_plan *plans = calloc(count * LAYOUTS + 1, sizeof *plans);
  if (!plans) return MODEL_NO_MEMORY;
  network->plans[SINGLE] = plans;
  network->plans[BLOCK] = plans + count;
  table_memory memory = {0};
  for (int fill = 0; fill < 2; ++fill) {
    for (int layout = 0; layout < (network->blocks ? LAYOUTS : 1); ++layout)
      for (int index = 0; index < NETWORK->ops_count; ++index) {
        const int failed = plan_one(network, index, layout, &memory, fill);
        if (failed) return failed;
      }
    if (fill) break;
    network->tables = memory.used;
    network->own_tables = malloc(memory.used + 16);
    if (!network->own_tables) return MODEL_NO_MEMORY;
    memory = (table_memory){.at = network->own_tables, .left = memory.used};
  }
  return MODEL_OK;
}
