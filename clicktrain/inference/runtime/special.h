// Convolutions that are compiled by themselves. Pairs of bfloat16 numbers: where the compiler knows such
// instructions.
#pragma once
#include "runtime.h"
#if defined(__x86_64__)
void model_run_columns(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker);
void model_run_windows(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker);
#if defined(__clang__) || __GNUC__ >= 10
#define MODEL_PAIRS
void model_run_pairs(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker);
void model_run_column_pairs(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker);
void model_run_window_pairs(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker);
void model_run_pointwise(const model_op *op, const model_plan *plan, const model_value *in, const model_value *out,
                     const float *bias, const float *image, const float *residual, float *results, float *region,
                     model_worker worker);
#endif
#endif
