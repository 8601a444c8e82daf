// For every processor: SSE2, NEON, or what the compiler makes of vectors of four numbers.
#define LANES 4
#include "kernels.h"
#include "special.h"
static int available(void) { return 1; }
#if defined(__x86_64__) || defined(__SSE2__)
#define NAME "sse2"
#define REGISTERS 16
#elif defined(__aarch64__) || defined(__ARM_NEON)
#define NAME "neon"
#define REGISTERS 32
#else
#define NAME "plain"
#define REGISTERS 16
#endif
const model_isa model_isa_base = {NAME, LANES, REGISTERS, available, run, enter, leave, 0, {NULL}};

extern const model_isa model_isa_avx2, model_isa_avx512, model_isa_pairs, model_isa_fours, model_isa_int8;
const model_isa *const model_isas[] = {
#if defined(__x86_64__)
  &model_isa_avx512, &model_isa_avx2,
#endif
    &model_isa_base,
#ifdef MODEL_PAIRS
    &model_isa_pairs,
    &model_isa_fours, &model_isa_int8,
#endif
    NULL};
