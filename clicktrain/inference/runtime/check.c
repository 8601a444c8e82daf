// The self-test: opens the weights, computes results of stored images with every set of instructions of this
// processor, one by one and in batches, compares them with PyTorch's, and sees wrong input refused. 0: all is right.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

#define IMAGE ((size_t)MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH)
#define MOST 35  // images of a call

typedef struct { char magic[8]; int32_t images, unused; double tolerance; } header;

static unsigned char *read_file(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  if (!file) return NULL;
  size_t room = 1 << 16, used = 0, got;
  unsigned char *data = malloc(room);
  while (data && (got = fread(data + used, 1, room - used, file)) > 0) {
    used += got;
    if (used == room) {
      unsigned char *more = realloc(data, room *= 2);
      if (!more) free(data);
      data = more;
    }
  }
  fclose(file);
  *bytes = used;
  return data;
}

static int failures = 0;
static void expect(int right, const char *what) {
  if (right) return;
  printf("FAILED: %s\n", what);
  ++failures;
}

static void check_results(const unsigned char *weights, size_t bytes, const char *isa, int threads, const header *h,
                          const float *images, const double *wanted) {
  static const int batches[] = {1, 2, 19, MOST};
  static const int coarser[] = {1, 300, 3000};  // float32, bfloat16, int8
  const double allowed = h->tolerance * coarser[model_isa_rounds(isa)];
  model_network *network;
  model_context *context = NULL;
  const int code = model_open(weights, bytes, MOST, isa, &network);
  float *in = malloc(sizeof(float) * IMAGE * MOST), *out = malloc(sizeof(float) * MODEL_RESULTS * MOST);
  if (code || model_context_new_threads(network, threads, &context) || !in || !out) {
    printf("FAILED: %s: %s\n", isa, model_error(code ? code : MODEL_NO_MEMORY));
    ++failures;
  } else {
    double worst = 0;
    int wrong = 0;
    for (size_t b = 0; b < sizeof batches / sizeof *batches; ++b) {
      const int n = batches[b];
      for (int i = 0; i < n; ++i)
        memcpy(in + (size_t)i * IMAGE, images + (size_t)((i + n) % h->images) * IMAGE, sizeof(float) * IMAGE);
      wrong |= model_run(context, in, IMAGE * (size_t)n, n, out, (size_t)MODEL_RESULTS * (size_t)n) != MODEL_OK;
      for (int i = 0; i < n; ++i) {
        for (size_t k = 0; k < MODEL_RESULTS; ++k) {
          const double apart =
              fabs(out[(size_t)i * MODEL_RESULTS + k] - wanted[(size_t)((i + n) % h->images) * MODEL_RESULTS + k]);
          wrong |= apart != apart;
          if (apart > worst) worst = apart;
        }
      }
    }
    wrong |= !(worst <= allowed);
    printf("%-7s %d thread%s: largest difference %.3g (allowed %.3g), %.2f MB of memory: %s\n", model_isa_of(network),
           threads, threads > 1 ? "s" : "", worst, allowed, (double)model_memory(network) / 1048576,
            wrong ? "FAILED" : "ok");
    failures += wrong;
    expect(model_run(context, in, IMAGE, MOST + 1, out, MODEL_RESULTS) != MODEL_OK, "a batch that is too large");
    expect(model_run(context, in, IMAGE - 1, 1, out, MODEL_RESULTS) != MODEL_OK, "an image that is too small");
    expect(model_run(context, in, IMAGE, 1, out, MODEL_RESULTS + 1) != MODEL_OK, "room for other results");
    expect(model_run(context, NULL, IMAGE, 1, out, MODEL_RESULTS) != MODEL_OK, "no image");
  }
  free(in);
  free(out);
  model_context_free(context);
  model_close(network);
}

static void check_refusals(unsigned char *weights, size_t bytes) {
  model_network *network;
  expect(model_open(weights, bytes - 1, 1, NULL, &network) != MODEL_OK, "weights that are cut off");
  expect(model_open(weights, 0, 1, NULL, &network) != MODEL_OK, "no weights");
  expect(model_open(weights, bytes, 0, NULL, &network) != MODEL_OK, "a batch of none");
  expect(model_open(weights, bytes, 1, "abacus", &network) == MODEL_NO_SUCH_ISA, "unknown instructions");
  weights[bytes / 2] ^= 1;
  expect(model_open(weights, bytes, 1, NULL, &network) != MODEL_OK, "a changed bit");
  weights[bytes / 2] ^= 1;
  weights[0] ^= 1;
  expect(model_open(weights, bytes, 1, NULL, &network) == MODEL_NOT_WEIGHTS, "something else than weights");
  weights[0] ^= 1;
  expect(model_open_file("no/such/file", 1, NULL, &network) == MODEL_CANNOT_READ, "a file that is not there");
}

int main(int count, char **arguments) {
  size_t bytes = 0, stored = 0;
  unsigned char *weights = read_file(count > 1 ? arguments[1] : "weights.bin", &bytes);
  unsigned char *data = read_file(count > 2 ? arguments[2] : "check.bin", &stored);
  header h = {.images = 0};
  if (data && stored >= sizeof h) memcpy(&h, data, sizeof h);
  const size_t images = h.images > 0 ? (size_t)h.images : 0;
  if (!weights || !images || memcmp(h.magic, "CTCHECK1", 8) != 0 ||
      stored != sizeof h + images * (IMAGE * sizeof(float) + MODEL_RESULTS * sizeof(double))) {
    printf("FAILED: weights.bin or check.bin is missing or damaged\n");
    return 1;
  }
  double *wanted = malloc(images * MODEL_RESULTS * sizeof(double));
  float *first = malloc(images * IMAGE * sizeof(float));
  if (!wanted || !first) return 1;
  memcpy(first, data + sizeof h, images * IMAGE * sizeof(float));
  memcpy(wanted, data + sizeof h + images * IMAGE * sizeof(float), images * MODEL_RESULTS * sizeof(double));
  for (int i = 0; model_isa_name(i); ++i) {
    for (int threads = 1; threads <= 2; ++threads)
      check_results(weights, bytes, model_isa_name(i), threads, &h, first, wanted);
  }
  check_refusals(weights, bytes);
  free(wanted);
  free(first);
  free(weights);
  free(data);
  printf(failures ? "%d checks failed\n" : "all is right\n", failures);
  return failures != 0;
}
