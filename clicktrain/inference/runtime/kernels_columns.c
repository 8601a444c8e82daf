// For processors with AVX-512: columns.h, for the sets of taps of this network.
#if defined(__x86_64__)
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "special.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define LANES 16
#include "columns.h"
SPECIAL(model_run_columns) {
  run_columns(op, plan, in, out, bias, image, residual, results, region, worker);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
