// Measured plans: every candidate of every convolution is timed on this processor, and the fastest are written to a
// file.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"

#define FORMAT "CTPLAN01"
#define ROUNDS 12

typedef struct {
  char format[8], isa[16];
  uint64_t fingerprint;
  uint32_t ops, blocks;
} header;

static header header_of(const model_network *network) {
  header h = {.fingerprint = NETWORK->fingerprint, .ops = (uint32_t)NETWORK->ops_count,
              .blocks = (uint32_t)network->blocks};
  memcpy(h.format, FORMAT, sizeof h.format);
  strncpy(h.isa, network->isa->name, sizeof h.isa - 1);
  return h;
}

// Fastest times of all operations of one network, in a context of one thread; [LAYOUTS, ops].
static int time_all(model_network *network, double *times) {
  const size_t in = (size_t)MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH, out = MODEL_RESULTS;
  const size_t ops = (size_t)NETWORK->ops_count, block = (size_t)network->isa->lanes;
  const size_t most = network->blocks && block <= (size_t)network->max_batch ? block : 1;
  const size_t images = network->blocks ? (most > 1 ? most : (size_t)network->max_batch) : 1;
  model_context *context;
  const int failed = model_context_new(network, &context);
  if (failed) return failed;
  float *x = malloc(images * in * sizeof *x), *y = malloc(images * out * sizeof *y);
  int result = x && y ? MODEL_OK : MODEL_NO_MEMORY;
  uint32_t state = 1;
  for (size_t k = 0; !result && k < images * in; ++k) {  // as pictures are: not zero, and not all alike
    state = state * 1664525u + 1013904223u;
    x[k] = (float)(state >> 8) / 8388608.0f - 1.0f;
  }
  for (int layout = 0; !result && layout < (network->blocks ? LAYOUTS : 1); ++layout) {
    const size_t count = layout == BLOCK ? images : 1;
    for (size_t k = 0; k < ops; ++k) times[(size_t)layout * ops + k] = -1;
    network->times = times + (size_t)layout * ops;
    for (int n = 0; !result && n < ROUNDS; ++n) result = model_run(context, x, count * in, (int)count, y, count * out);
    network->times = NULL;
  }
  free(x);
  free(y);
  model_context_free(context);
  return result;
}

static int measure(const unsigned char *weights, size_t bytes, int max_batch, const char *isa, FILE *file) {
  static const unsigned char candidates[] = {
    0, CHOICE(CHOICE_ROWS, CHOICE_SMALL), CHOICE(CHOICE_ROWS, CHOICE_LARGE), CHOICE(CHOICE_FLAT, CHOICE_SMALL),
      CHOICE(CHOICE_FLAT, CHOICE_LARGE), CHOICE(CHOICE_TAPS, 0),
      CHOICE(CHOICE_COLUMNS, CHOICE_SMALL), CHOICE(CHOICE_COLUMNS, CHOICE_LARGE),
      CHOICE(CHOICE_WINDOWS, CHOICE_SMALL), CHOICE(CHOICE_WINDOWS, CHOICE_LARGE),
      CHOICE(CHOICE_POINTWISE, CHOICE_SMALL), CHOICE(CHOICE_POINTWISE, CHOICE_LARGE)};
  const size_t count = (size_t)NETWORK->ops_count * LAYOUTS;
  unsigned char *choices = calloc(count + 1, 1), *best = calloc(count + 1, 1);
  double *times = malloc(count * sizeof *times + 1), *least = malloc(count * sizeof *least + 1);
  header h = {.ops = 0};
  int result = choices && best && times && least ? MODEL_OK : MODEL_NO_MEMORY;
  for (size_t c = 0; !result && c < sizeof candidates; ++c) {
    model_network *network;
    // As few kernels at once as there may be are another choice only where there are several.
    const int few = candidates[c] == CHOICE(CHOICE_COLUMNS, CHOICE_SMALL) ||
                    candidates[c] == CHOICE(CHOICE_WINDOWS, CHOICE_SMALL);
    if (few && model_isa_rounds(isa) < 2) continue;
    memset(choices, candidates[c], count);
    result = model_open_choosing(weights, bytes, max_batch, isa, choices, &network);
    if (result) break;
    h = header_of(network);
    for (size_t k = 0; k < count; ++k) times[k] = -1;
    result = time_all(network, times);
    for (size_t k = 0; k < count; ++k) {
      // By rules, unless another is clearly faster: times are noisy.
      if (c && (times[k] < 0 || times[k] >= 0.98 * least[k])) continue;
      least[k] = times[k];
      best[k] = candidates[c];
    }
    model_close(network);
  }
  if (!result && (fwrite(&h, sizeof h, 1, file) != 1 || fwrite(best, 1, count, file) != count))
    result = MODEL_CANNOT_WRITE;
  free(choices);
  free(best);
  free(times);
  free(least);
  return result;
}

int model_measure_file(const char *weights, const char *plan, int max_batch, const char *isa) {
  size_t bytes;
  unsigned char *data;
  if (!weights || !plan) return MODEL_BAD_ARGUMENT;
  int result = model_read_weights(weights, &data, &bytes);
  if (result) return result;
  FILE *file = fopen(plan, "wb");
  if (!file) {
    free(data);
    return MODEL_CANNOT_WRITE;
  }
  result = measure(data, bytes, max_batch, isa, file);
  free(data);
  if (fclose(file) != 0 && !result) result = MODEL_CANNOT_WRITE;
  if (result) remove(plan);
  return result;
}

int model_open_planned(const char *weights, const char *plan, int max_batch, const char *isa,
                       model_network **network) {
  if (!network) return MODEL_BAD_ARGUMENT;
  *network = NULL;
  if (!weights || !plan) return MODEL_BAD_ARGUMENT;
  const size_t count = (size_t)NETWORK->ops_count * LAYOUTS;
  unsigned char *choices = malloc(count + 1);
  if (!choices) return MODEL_NO_MEMORY;
  FILE *file = fopen(plan, "rb");
  header h = {.ops = 0};
  int result = MODEL_CANNOT_READ;
  if (file) {
    const int read = fread(&h, sizeof h, 1, file) == 1 && fread(choices, 1, count + 1, file) == count;
    result = ferror(file) ? MODEL_CANNOT_READ : read ? MODEL_OK : MODEL_NOT_A_PLAN;
    fclose(file);
  }
  if (!result) result = model_open_file_choosing(weights, max_batch, isa, choices, network);
  if (!result) {
    const header own = header_of(*network);
    if (memcmp(h.format, own.format, sizeof h.format) != 0 || memcmp(h.isa, own.isa, sizeof h.isa) != 0 ||
        h.fingerprint != own.fingerprint || h.ops != own.ops) {
      model_close(*network);
      *network = NULL;
      result = MODEL_NOT_A_PLAN;
    }
  }
  free(choices);
  return result;
}
