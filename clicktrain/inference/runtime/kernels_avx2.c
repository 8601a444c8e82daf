// For processors with AVX2 and FMA.
#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "processor.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#include "kernels.h"
static int available(void) { return processor_level() >= 1; }
const model_isa model_isa_avx2 = {"avx2", LANES, 16, available, run, enter, leave, 0, {NULL}};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
