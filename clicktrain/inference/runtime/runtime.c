// Opening weights, contexts, and calls. No instruction set is used here: see kernels.h.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NETWORK (&model_network_description)

struct model_context {
  const model_network *network;
  float *memory, *regions;  // a region for each thread
  void *own;
  int threads;
  model_team *team;         // NULL for one thread
};

typedef struct {
  char magic[8];
  uint32_t version, order;
  uint64_t fingerprint, bytes, checksum;
  char rest[24];
} header;

static const char magic[8] = {'C', 'T', 'W', 'E', 'I', 'G', 'H', 'T'};

// Each word times an odd number of its own: no changed word goes unseen.
static uint64_t checksum(const unsigned char *bytes, size_t count) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count / 8; ++i) {
    uint64_t word;
    memcpy(&word, bytes + 8 * i, 8);
    sum += word * (2 * i + 1);
  }
  return sum;
}

static int check(const unsigned char *bytes, size_t count) {
  header h;
  if (count < sizeof h) return MODEL_NOT_WEIGHTS;
  memcpy(&h, bytes, sizeof h);
  if (memcmp(h.magic, magic, sizeof magic) != 0 || h.order != 0x01020304) return MODEL_NOT_WEIGHTS;
  if (h.version != 1) return MODEL_OTHER_VERSION;
  if (h.fingerprint != NETWORK->fingerprint) return MODEL_OTHER_NETWORK;
  if (h.bytes != count || count != (uint64_t)NETWORK->weight_bytes) return MODEL_NOT_WEIGHTS;
  return h.checksum == checksum(bytes + sizeof h, count - sizeof h) ? MODEL_OK : MODEL_DAMAGED;
}

static const model_isa *choose(const char *name) {
  for (const model_isa *const *isa = model_isas; *isa; ++isa) {
    if ((name ? strcmp((*isa)->name, name) == 0 : !(*isa)->rounds) && (*isa)->available()) return *isa;
  }
  return NULL;
}

static int point_to_constants(model_network *network) {
  network->constants = calloc((size_t)NETWORK->ops_count + 1, sizeof *network->constants);
  if (!network->constants) return MODEL_NO_MEMORY;
  for (int n = 0; n < NETWORK->ops_count; ++n) {
    const model_op *op = NETWORK->ops + n;
    const int has = op->kind == OP_CONV || op->kind == OP_LINEAR || op->kind == OP_AFFINE;
    if (has && op->bias >= 0) network->constants[n].bias = (const float *)(network->weights + op->bias);
    if (has && op->values >= 0) network->constants[n].values = (const float *)(network->weights + op->values);
  }
  return MODEL_OK;
}

int model_open_choosing(const void *weights, size_t bytes, int max_batch, const char *isa, const unsigned char *choices,
                        model_network **network) {
  if (!network) return MODEL_BAD_ARGUMENT;
  *network = NULL;
  if (!weights || max_batch < 1 || (uintptr_t)weights % sizeof(float)) return MODEL_BAD_ARGUMENT;
  const model_isa *chosen = choose(isa);
  if (!chosen) return MODEL_NO_SUCH_ISA;
  const int wrong = check(weights, bytes);
  if (wrong) return wrong;
  model_network *made = calloc(1, sizeof *made);
  if (!made) return MODEL_NO_MEMORY;
  made->weights = weights;
  made->isa = chosen;
  made->max_batch = max_batch;
  // Large images are computed one by one: activations of a block would come from memory each time.
  made->blocks = max_batch > chosen->lanes / 2 &&
                 NETWORK->block * chosen->lanes * (int64_t)sizeof(float) <= MODEL_BLOCK_BYTES;
  made->choices = choices;
  made->kept = bytes;
  int failed = model_plan_all(made);
  if (!failed) failed = point_to_constants(made);
  if (failed) {
    model_close(made);
    return failed;
  }
  made->choices = NULL;
  *network = made;
  return MODEL_OK;
}

int model_open(const void *weights, size_t bytes, int max_batch, const char *isa, model_network **network) {
  return model_open_choosing(weights, bytes, max_batch, isa, NULL, network);
}

int model_read_weights(const char *path, unsigned char **weights, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  if (!file) return MODEL_CANNOT_READ;
  const size_t wanted = (size_t)NETWORK->weight_bytes;
  *weights = malloc(wanted + 1);
  // One byte more than there should be: a longer file is another file.
  *bytes = *weights ? fread(*weights, 1, wanted + 1, file) : 0;
  const int result = !*weights ? MODEL_NO_MEMORY : ferror(file) ? MODEL_CANNOT_READ : MODEL_OK;
  fclose(file);
  if (result) free(*weights);
  return result;
}

// Bytes from one place of the weights to the next.
static size_t bytes_at(int64_t at) {
  int64_t end = NETWORK->weight_bytes;
  for (int n = 0; n < NETWORK->ops_count; ++n) {
    const model_op *op = NETWORK->ops + n;
    if (op->kind != OP_CONV && op->kind != OP_LINEAR && op->kind != OP_AFFINE) continue;
    const int64_t others[] = {op->bias, op->values, op->bits};
    for (int k = 0; k < 3; ++k)
      if (others[k] > at && others[k] < end) end = others[k];
  }
  return (size_t)(end - at);
}

// Whether any plan reads an operation's weights where they are in the file.
static int reads_values(const model_network *network, int n) {
  if (!network->constants[n].values) return 0;
  if (NETWORK->ops[n].kind != OP_CONV) return 1;
  int reads = 0;
  for (int layout = 0; layout < (network->blocks ? LAYOUTS : 1); ++layout) {
    const int form = network->plans[layout][n].form;
    reads |= form != FORM_TAPS && form != FORM_COLUMNS && form != FORM_WINDOWS && form != FORM_POINTWISE;
  }
  return reads;
}

// Keep of a file only what is used: not which weights there are, and not what plans have in another order.
static void keep_used(model_network *network, unsigned char *file) {
  size_t bytes = 0;
  unsigned char *kept = NULL;
  for (int fill = 0; fill < 2; ++fill) {
    size_t at = 0;
    for (int n = 0; n < NETWORK->ops_count; ++n) {
      model_constants *constants = network->constants + n;
      const model_op *op = NETWORK->ops + n;
      const float **const parts[] = {constants->bias ? &constants->bias : NULL,
                                     reads_values(network, n) ? &constants->values : NULL};
      for (int k = 0; k < 2; ++k) {
        if (!parts[k]) continue;
        const size_t size = bytes_at(k ? op->values : op->bias);
        if (fill) *parts[k] = memcpy(kept + at, file + (k ? op->values : op->bias), size);
        at += size;
      }
    }
    bytes = at;
    if (!fill && !(kept = malloc(bytes + 1))) break;
  }
  network->own_weights = kept ? kept : file;
  network->weights = NULL;
  if (!kept) return;
  network->kept = bytes;
  for (int n = 0; n < NETWORK->ops_count; ++n)
    if (!reads_values(network, n)) network->constants[n].values = NULL;
  free(file);
}

int model_open_file_choosing(const char *path, int max_batch, const char *isa, const unsigned char *choices,
                             model_network **network) {
  if (!network) return MODEL_BAD_ARGUMENT;
  *network = NULL;
  if (!path) return MODEL_BAD_ARGUMENT;
  unsigned char *weights;
  size_t bytes;
  int result = model_read_weights(path, &weights, &bytes);
  if (result) return result;
  result = model_open_choosing(weights, bytes, max_batch, isa, choices, network);
  if (result) free(weights);
  else keep_used(*network, weights);
  return result;
}

int model_open_file(const char *path, int max_batch, const char *isa, model_network **network) {
  return model_open_file_choosing(path, max_batch, isa, NULL, network);
}

double model_seconds(void) {
  struct timespec now;
  timespec_get(&now, TIME_UTC);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void model_close(model_network *network) {
  if (!network) return;
  free(network->own_weights);
  free(network->own_tables);
  free(network->constants);
  free(network->plans[SINGLE]);
  free(network);
}

static size_t memory_floats(const model_network *network) {
  const size_t single = (size_t)NETWORK->single, block = (size_t)NETWORK->block * (size_t)network->isa->lanes;
  return (network->blocks && block > single ? block : single) + MODEL_SLACK;
}

static size_t region_floats(const model_network *network) {
  return ((size_t)network->region + 15) / 16 * 16 + 2 * MODEL_SLACK;
}

static size_t context_bytes(const model_network *network, int threads) {
  const size_t floats = memory_floats(network) + (size_t)threads * region_floats(network) + 2 * MODEL_SLACK;
  return floats * sizeof(float) + 2 * MODEL_ALIGNMENT;
}

int model_context_new_threads(const model_network *network, int threads, model_context **context) {
  if (!context) return MODEL_BAD_ARGUMENT;
  *context = NULL;
  if (!network || threads < 1 || threads > MODEL_MOST_THREADS) return MODEL_BAD_ARGUMENT;
  model_context *made = calloc(1, sizeof *made);
  void *own = calloc(1, context_bytes(network, threads));
  if (!made || !own) {
    free(made);
    free(own);
    return MODEL_NO_MEMORY;
  }
  const size_t floats = (memory_floats(network) + 15) / 16 * 16;
  made->network = network;
  made->own = own;
  made->threads = threads;
  // Copies of images that are moved to the right begin before the first float.
  made->memory = (float *)(((uintptr_t)own + MODEL_ALIGNMENT - 1) / MODEL_ALIGNMENT * MODEL_ALIGNMENT) + MODEL_SLACK;
  made->regions = made->memory + floats;
  if (threads > 1 && !(made->team = model_team_new(threads))) {
    model_context_free(made);
    return MODEL_NO_THREADS_HERE;
  }
  *context = made;
  return MODEL_OK;
}

int model_context_new(const model_network *network, model_context **context) {
  return model_context_new_threads(network, 1, context);
}

void model_context_free(model_context *context) {
  if (!context) return;
  model_team_free(context->team);
  free(context->own);
  free(context);
}

typedef struct { const model_context *context; int layout; } part;

static void run_part(void *given, model_worker worker) {
  const part *p = given;
  const model_network *network = p->context->network;
  float *region = p->context->regions + (size_t)worker.number * region_floats(network);
  network->isa->run(network, p->layout, p->context->memory, region, worker);
}

static void run_all(const model_context *context, int layout) {
  part p = {context, layout};
  if (context->team) model_team_run(context->team, run_part, &p);
  else run_part(&p, (model_worker){NULL, 0, 1});
}

static void run_single(const model_context *context, const float *image, float *results) {
  const model_value *in = NETWORK->values + NETWORK->input, *out = NETWORK->values + NETWORK->output;
  const size_t size = (size_t)in->height * (size_t)in->width, count = (size_t)out->height * (size_t)out->width;
  const size_t from = (size_t)model_plane(in, SINGLE), to = (size_t)model_plane(out, SINGLE);
  for (int c = 0; c < in->channels; ++c)
    memcpy(context->memory + in->single + (size_t)c * from, image + (size_t)c * size, size * sizeof(float));
  run_all(context, SINGLE);
  for (int c = 0; c < out->channels; ++c)
    memcpy(results + (size_t)c * count, context->memory + out->single + (size_t)c * to, count * sizeof(float));
}

int model_run(model_context *context, const float *images, size_t image_floats, int batch, float *results,
              size_t result_floats) {
  const size_t in = (size_t)MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH, out = MODEL_RESULTS;
  if (!context || !images || !results || batch < 1 || batch > context->network->max_batch) return MODEL_BAD_ARGUMENT;
  if (image_floats != (size_t)batch * in || result_floats != (size_t)batch * out) return MODEL_BAD_ARGUMENT;
  const model_network *network = context->network;
  const int lanes = network->isa->lanes;
  for (int done = 0; done < batch;) {
    const int left = batch - done, count = left < lanes ? left : lanes;
    const float *image = images + (size_t)done * in;
    float *result = results + (size_t)done * out;
    if (network->blocks && left > lanes / 2) {
      network->isa->enter(image, count, context->memory);
      run_all(context, BLOCK);
      network->isa->leave(context->memory, count, result);
      done += count;
    } else {
      run_single(context, image, result);
      ++done;
    }
  }
  return MODEL_OK;
}

const char *model_error(int code) {
  static const char *const words[] = {"no error",
      "an argument is null, or sizes do not fit",
      "there is not enough memory",
      "the file cannot be read",
      "these are no weights of this network, or they are cut off",
      "the weights are of another version of the format",
      "the weights belong to another network",
      "the weights are damaged",
      "these instructions are unknown, this processor does not have them, or the network was exported without them",
      "the network is too large for this runtime",
      "threads cannot be started",
      "the plan is not of this network and these instructions, or is damaged",
      "the file cannot be written",
  };
  return code >= 0 && code < (int)(sizeof words / sizeof *words) ? words[code] : "unknown error";
}

const char *model_isa_of(const model_network *network) { return network ? network->isa->name : NULL; }

int model_int8_layers(const model_network *network, int batch) {
  const int layout = network && network->blocks && batch > network->isa->lanes / 2 ? BLOCK : SINGLE;
  int count = 0;
  for (int n = 0; network && n < NETWORK->ops_count; ++n) count += network->plans[layout][n].together == 4;
  return count;
}

const char *model_isa_name(int index) {
  for (const model_isa *const *isa = model_isas; *isa; ++isa) {
    if ((*isa)->available() && index-- == 0) return (*isa)->name;
  }
  return NULL;
}

int model_isa_rounds(const char *name) {
  const model_isa *isa = choose(name);
  return isa ? isa->rounds : 0;
}

size_t model_memory(const model_network *network) {
  if (!network) return 0;
  const size_t plans = (size_t)NETWORK->ops_count * LAYOUTS * sizeof(model_plan);
  return network->kept + network->tables + plans + context_bytes(network, 1);
}
