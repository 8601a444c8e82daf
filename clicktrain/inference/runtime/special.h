// Convolutions that are compiled by themselves. Several kernels at once: where the compiler knows such instructions.
#pragma once
#include "runtime.h"
#if defined(__x86_64__)
#define SPECIAL(NAME)                                                                                            \
  void NAME(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,           \
            const float *bias, const float *image, const float *residual, float *results, float *region,         \
            model_worker worker)
SPECIAL(model_run_columns);
SPECIAL(model_run_windows);
#if defined(__clang__) || __GNUC__ >= 10
#define MODEL_PAIRS
SPECIAL(model_run_pairs);
SPECIAL(model_run_column_pairs);
SPECIAL(model_run_window_pairs);
SPECIAL(model_run_point_pairs);
SPECIAL(model_run_column_fours);
SPECIAL(model_run_window_fours);
SPECIAL(model_run_point_fours);
extern const model_specials model_fours;  // empty where the network has no int8 numbers
#endif
#endif
