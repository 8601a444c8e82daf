// For processors with AVX-512 that multiply fours of int8 numbers (AVX512_VNNI): FORM_POINTWISE, with sums in int32.
#include "special.h"
#define SET(N)
#include "sets.h"  // whether there are int8 numbers
#undef SET
#if defined(MODEL_PAIRS) && MODEL_HAS_INT8
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif
#define LANES 16
#define FOURS
#include "pointwise.h"
SPECIAL(model_run_point_fours) {
  run_pointwise(op, plan, in, out, bias, image, residual, results, region, worker);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
const model_specials model_fours = {NULL, model_run_column_fours, model_run_window_fours, model_run_point_fours};
#elif defined(MODEL_PAIRS)
const model_specials model_fours = {NULL, NULL, NULL, NULL};
#endif
