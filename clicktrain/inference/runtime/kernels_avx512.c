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
static const model_specials singles = {NULL, model_run_columns, model_run_windows, NULL};
const model_isa model_isa_avx512 = {"avx512", LANES, 32, available, run, enter, leave, 0, {&singles}};
#ifdef MODEL_PAIRS
static int has_pairs(void) { return processor_level() >= 3; }
static const model_specials pairs = {model_run_pairs, model_run_column_pairs, model_run_window_pairs,
                                     model_run_point_pairs};
const model_isa model_isa_pairs = {"avx512-bf16", LANES, 32, has_pairs, run, enter, leave, 1, {NULL, &pairs}};
// Layers whose inputs may be negative are computed with bfloat16 numbers, where there are any, or with float32.
static int has_fours(void) { return model_fours.windows && processor_level() >= 3 && processor_has_vnni(); }
static int has_int8(void) { return model_fours.windows && processor_level() == 2 && processor_has_vnni(); }
const model_isa model_isa_fours = {"avx512-int8", LANES, 32, has_fours, run, enter, leave, 2,
                                   {NULL, &pairs, &model_fours}};
const model_isa model_isa_int8 = {"avx512-int8", LANES, 32, has_int8, run, enter, leave, 2,
                                  {&singles, NULL, &model_fours}};
#endif
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
