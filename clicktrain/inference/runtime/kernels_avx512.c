// For processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "special.h"
#include "processor.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define LANES 16
#include "kernels.h"
static int available(void) { return processor_level() >= 2; }
const model_isa model_isa_avx512 = {"avx512", LANES, 32, available, run, enter, leave, NULL, model_run_columns,
                                      model_run_windows, NULL};
#ifdef MODEL_PAIRS
static int has_pairs(void) { return processor_level() >= 3; }
const model_isa model_isa_pairs = {"avx512-bf16", LANES, 32, has_pairs, run, enter, leave, model_run_pairs,
                                   model_run_column_pairs, model_run_window_pairs,
                                   model_run_pointwise};
#endif
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
