// Opening weights, contexts, and calls. No instruction set is used here: see kernels.h.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NETWORK (&model_network_description)

struct model_context {
  const model_network *network;
  float *memory, *region;
  void *own;
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
    if ((!name || strcmp((*isa)->name, name) == 0) && (*isa)->available()) return *isa;
  }
  return NULL;
}

int model_open(const void *weights, size_t bytes, int max_batch, const char *isa, model_network **network) {
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
  made->blocks = max_batch > chosen->lanes / 2;
  const int failed = model_plan_all(made);
  if (failed) {
    model_close(made);
    return failed;
  }
  *network = made;
  return MODEL_OK;
}

int model_open_file(const char *path, int max_batch, const char *isa, model_network **network) {
  if (!network) return MODEL_BAD_ARGUMENT;
  *network = NULL;
  if (!path) return MODEL_BAD_ARGUMENT;
  FILE *file = fopen(path, "rb");
  if (!file) return MODEL_CANNOT_READ;
  const size_t bytes = (size_t)NETWORK->weight_bytes;
  unsigned char *weights = malloc(bytes + 1);
  // One byte more than there should be: a longer file is another file.
  const size_t got = weights ? fread(weights, 1, bytes + 1, file) : 0;
  const int unreadable = ferror(file);
  fclose(file);
  int result = !weights ? MODEL_NO_MEMORY : unreadable ? MODEL_CANNOT_READ : MODEL_OK;
  if (!result) result = model_open(weights, got, max_batch, isa, network);
  if (result) free(weights);
  else (*network)->own_weights = weights;
  return result;
}

void model_close(model_network *network) {
  if (!network) return;
  free(network->own_weights);
  free(network->own_tables);
  free(network->plans[SINGLE]);
  free(network);
}

static size_t memory_floats(const model_network *network) {
  const size_t single = (size_t)NETWORK->single, block = (size_t)NETWORK->block * (size_t)network->isa->lanes;
  return (network->blocks && block > single ? block : single) + MODEL_SLACK;
}

static size_t context_bytes(const model_network *network) {
  const size_t floats = memory_floats(network) + (size_t)network->region + 2 * MODEL_SLACK;
  return floats * sizeof(float) + 2 * MODEL_ALIGNMENT;
}

int model_context_new(const model_network *network, model_context **context) {
  if (!context) return MODEL_BAD_ARGUMENT;
  *context = NULL;
  if (!network) return MODEL_BAD_ARGUMENT;
  model_context *made = malloc(sizeof *made);
  void *own = calloc(1, context_bytes(network));
  if (!made || !own) {
    free(made);
    free(own);
    return MODEL_NO_MEMORY;
  }
  const size_t floats = (memory_floats(network) + 15) / 16 * 16;
  made->network = network;
  made->own = own;
  // Copies of images that are moved to the right begin before the first float.
  made->memory = (float *)(((uintptr_t)own + MODEL_ALIGNMENT - 1) / MODEL_ALIGNMENT * MODEL_ALIGNMENT) + MODEL_SLACK;
  made->region = made->memory + floats;
  *context = made;
  return MODEL_OK;
}

void model_context_free(model_context *context) {
  if (!context) return;
  free(context->own);
  free(context);
}

static void run_single(const model_context *context, const float *image, float *results) {
  const model_value *in = NETWORK->values + NETWORK->input, *out = NETWORK->values + NETWORK->output;
  const size_t size = (size_t)in->height * (size_t)in->width, count = (size_t)out->height * (size_t)out->width;
  const size_t from = (size_t)model_plane(in, SINGLE), to = (size_t)model_plane(out, SINGLE);
  for (int c = 0; c < in->channels; ++c)
    memcpy(context->memory + in->single + (size_t)c * from, image + (size_t)c * size, size * sizeof(float));
  context->network->isa->run(context->network, SINGLE, context->memory, context->region);
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
      network->isa->run(network, BLOCK, context->memory, context->region);
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
      "these instructions are unknown, or this processor does not have them",
      "the network is too large for this runtime",
  };
  return code >= 0 && code < (int)(sizeof words / sizeof *words) ? words[code] : "unknown error";
}

const char *model_isa_of(const model_network *network) { return network ? network->isa->name : NULL; }

const char *model_isa_name(int index) {
  for (const model_isa *const *isa = model_isas; *isa; ++isa) {
    if ((*isa)->available() && index-- == 0) return (*isa)->name;
  }
  return NULL;
}

size_t model_memory(const model_network *network) {
  if (!network) return 0;
  const size_t plans = (size_t)NETWORK->ops_count * LAYOUTS * sizeof(model_plan);
  return (size_t)NETWORK->weight_bytes + network->tables + plans + context_bytes(network);
}
