// Statistics and gradients of a whole channel, from sums over its chunks.
#pragma once
#include "kernels/batch_norm2d/passes.h"

// The mean of the first block is near enough to that of all: with it as the center, one reading gives both sums.
// The mean of the squares is at most B times the variance, so rounding stays small: where the mean lies d away from
// that of a share 1/B of the numbers, the variance is at least d * d / (B - 1).
INLINE real center_of(const stored *first, int64_t images, int64_t area, ivec lanes) {
  double sum[LANES] = {0}, square[LANES] = {0};
  centered_sums(first, area, 0, lanes, sum, square);
  return total(sum) / ((double)images * area);
}
INLINE channel normalized(const double *sum, const double *square, double count, real center, real *mean, real *var,
                          real weight, real bias, double eps, double low, double high) {
  const double away = total(sum) / count, v = total(square) / count - away * away, variance = v < 0 ? 0 : v;
  *mean = center + away;
  *var = variance;
  const double scale = weight / sqrt(variance + eps);
  return (channel){center, scale, bias - away * scale, low, high};
}
// With the mean and variance known.
INLINE channel known(real mean, real var, real weight, real bias, double eps, double low, double high) {
  return (channel){mean, weight / sqrt(var + eps), bias, low, high};
}
// From sums of h and of h * (x - mean): the gradients of weight and bias, and how x's is put together.
INLINE combination gradients(const double *sum, const double *product, double count, real var, real weight,
                             double eps, real *gweight, real *gbias) {
  const double sum_g = total(sum), sum_gx = total(product);
  const double rstd = 1 / sqrt((double)var + eps), by_g = weight * rstd;
  *gbias = sum_g;
  *gweight = sum_gx * rstd;
  return (combination){by_g, -by_g * rstd * rstd * sum_gx / count, -by_g * sum_g / count};
}
