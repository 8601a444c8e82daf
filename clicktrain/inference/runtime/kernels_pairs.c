// For processors with AVX-512 that multiply pairs of bfloat16 numbers (AVX512_BF16): FORM_TAPS and FORM_POINTWISE, with
// sums in float32.
#include "special.h"
#ifdef MODEL_PAIRS
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#define LANES 16
#define PAIRS
#include "taps.h"
#include "pointwise.h"
SPECIAL(model_run_pairs) {
  run_taps(op, plan, in, out, bias, image, residual, results, region, worker);
}
SPECIAL(model_run_point_pairs) {
  run_pointwise(op, plan, in, out, bias, image, residual, results, region, worker);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
