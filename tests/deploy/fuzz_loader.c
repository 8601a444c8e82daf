// Opens weights that were damaged at random, thousands of times: an error code or results, never a crash. Built with
// the network's own files under AddressSanitizer and UndefinedBehaviorSanitizer; bytes lie in memory of their exact size.
//   fuzz_loader weights.bin ROUNDS SEED FOLDER     (FOLDER: for files, which model_open_file reads)
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

#define HEADER 64
#define IMAGE ((size_t)MODEL_CHANNELS * MODEL_HEIGHT * MODEL_WIDTH)
#define BATCH 3

static uint64_t state;
static uint64_t draw(uint64_t below) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state % below;
}

static void seal(unsigned char *bytes, size_t count) {
  uint64_t sum = 0, size = count;
  for (size_t i = 0; HEADER + 8 * i + 8 <= count; ++i) {
    uint64_t word;
    memcpy(&word, bytes + HEADER + 8 * i, 8);
    sum += word * (2 * i + 1);
  }
  if (count < HEADER) return;
  memcpy(bytes + 24, &size, 8);
  memcpy(bytes + 32, &sum, 8);
}

// Opens, runs and closes; the code of opening.
static int try(const unsigned char *bytes, size_t count, const char *file) {
  static const int batches[] = {1, 2, BATCH, 64};
  static float images[IMAGE * BATCH], results[MODEL_RESULTS * BATCH];
  const char *isas[8] = {NULL};
  int known = 1;
  while (known < 8 && (isas[known] = model_isa_name(known - 1))) ++known;
  const int most = batches[draw(4)];
  const char *isa = isas[draw((uint64_t)known)];
  model_network *network;
  model_context *context;
  const int code =
      file ? model_open_file(file, most, isa, &network) : model_open(bytes, count, most, isa, &network);
  if (code) {
    if (network) abort();  // there is none after an error
    if (!strcmp(model_error(code), "unknown error")) abort();
    return code;
  }
  if (model_context_new(network, &context)) abort();
  for (size_t i = 0; i < IMAGE * BATCH; ++i) images[i] = (float)draw(1000) / 500 - 1;
  for (int n = 1; n <= BATCH && n <= most; ++n)
    if (model_run(context, images, IMAGE * (size_t)n, n, results, (size_t)MODEL_RESULTS * (size_t)n)) abort();
  model_context_free(context);
  model_close(network);
  return code;
}

int main(int arguments, char **argument) {
  if (arguments < 5) return 2;
  FILE *file = fopen(argument[1], "rb");
  if (!file) return 2;
  fseek(file, 0, SEEK_END);
  const size_t size = (size_t)ftell(file);
  rewind(file);
  unsigned char *good = malloc(size);
  if (!good || fread(good, 1, size, file) != size) return 2;
  fclose(file);
  state = 0x9e3779b97f4a7c15u ^ (uint64_t)strtoull(argument[3], NULL, 10) * 0xbf58476d1ce4e5b9u;
  char path[4096];
  snprintf(path, sizeof path, "%s/damaged.bin", argument[4]);
  long counts[16] = {0};
  for (long round = 0; round < strtol(argument[2], NULL, 10); ++round) {
    // The right size, one of a few bytes, a shorter or a longer one.
    const uint64_t kind = draw(10);
    const size_t count = kind == 0 ? draw(HEADER + 9) : kind == 1 ? draw(size) : kind == 2 ? size + draw(200) : size;
    unsigned char *bytes = malloc(count ? count : 1);
    if (!bytes) return 2;
    memset(bytes, 0, count);
    memcpy(bytes, good, count < size ? count : size);
    const size_t changes = count ? draw(40) : 0;
    for (size_t i = 0; i < changes; ++i) {
      // All over the file, or a word of extremes, or the header.
      const size_t at = draw(4) ? draw(count) : draw(count < HEADER ? count : HEADER);
      bytes[at] = draw(3) ? (unsigned char)draw(256) : (unsigned char)(draw(2) ? 0xff : 0);
    }
    if (draw(8) && count >= HEADER) memcpy(bytes, good, 24);  // so that more than the header is looked at
    if (draw(8)) seal(bytes, count);
    if (draw(20) == 0) {
      file = fopen(path, "wb");
      if (!file || fwrite(bytes, 1, count, file) != count) return 2;
      fclose(file);
      ++counts[try(NULL, 0, path)];
    } else {
      ++counts[try(bytes, count, NULL)];
    }
    free(bytes);
  }
  // Arguments at their ends.
  model_network *network;
  const int wrong[] = {0, -1, INT_MIN};
  for (int i = 0; i < 3; ++i)
    if (model_open(good, size, wrong[i], NULL, &network) != MODEL_BAD_ARGUMENT) abort();
  if (model_open(good, size, INT_MAX, NULL, &network) == MODEL_OK) model_close(network);
  if (model_open(NULL, size, 1, NULL, &network) != MODEL_BAD_ARGUMENT) abort();
  if (model_open(good, size, 1, NULL, NULL) != MODEL_BAD_ARGUMENT) abort();
  if (model_open(good + 1, size - 1, 1, NULL, &network) != MODEL_BAD_ARGUMENT) abort();  // not aligned
  if (model_open_file(argument[4], 1, NULL, &network) == MODEL_OK) abort();              // a folder
  for (int code = 0; code < 16; ++code) printf("%ld%c", counts[code], code < 15 ? ' ' : '\n');
  free(good);
  return 0;
}
