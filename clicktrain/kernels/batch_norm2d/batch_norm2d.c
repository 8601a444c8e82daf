// Batch norm of activations [B, C, H, W, V]: forward, given, affine, backward. LANES and DTYPE as in vector.h.
//
// All passes over one channel come before the next channel: its B pieces of H*W vectors usually stay in L2, so
// that memory is read once and written once. Channels are independent of each other: the result does not depend
// on the number of threads.
//
// Lanes are summed apart until the end, where the sums of padding lanes are dropped: loops over activations have
// no case for padding, and not even a NaN in it counts. Activations are widened where they are read and rounded
// once, where they are written; everything between is of `real` or double.
#include "kernels/native/vector.h"

// Vectors that are summed in `real` before the sum goes over to double.
#define PIECE 1024

// Bits, not products: what is masked out may be a NaN.
INLINE vec only(vec v, ivec lanes) { return (vec)((ivec)v & lanes); }
// v where `of` is above zero, or NaN as for torch: a diverged training has to stay visible.
INLINE vec where_positive(vec v, vec of) { return (vec)((ivec)v & ~(ivec)(of <= (vec){0})); }

INLINE ivec first_lanes(int64_t count) {
  ivec lanes;
  for (int l = 0; l < LANES; ++l) lanes[l] = l < count ? -1 : 0;
  return lanes;
}
INLINE void flush(double *restrict to, vec v, ivec lanes) {
  real part[LANES];
  v = only(v, lanes);
  memcpy(part, &v, sizeof v);
  for (int l = 0; l < LANES; ++l) to[l] += part[l];
}
INLINE double total(const double *from) {
  double s = 0;
  for (int l = 0; l < LANES; ++l) s += from[l];
  return s;
}

// Sums of x - center and of its square over one chunk, lane by lane.
NOINLINE void centered_sums(const stored *restrict x, int64_t area, real center, ivec lanes, double *restrict sum,
                   double *restrict square) {
  const vec k = splat(center);
  for (int64_t first = 0; first < area; first += PIECE) {
    const int64_t end = min64(first + PIECE, area);
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, q0 = {0}, q1 = {0}, q2 = {0}, q3 = {0};
    int64_t i = first;
    for (; i + 4 <= end; i += 4) {
      const vec a = widen(x[i]) - k, b = widen(x[i + 1]) - k;
      const vec c = widen(x[i + 2]) - k, d = widen(x[i + 3]) - k;
      s0 += a; s1 += b; s2 += c; s3 += d;
      q0 += a * a; q1 += b * b; q2 += c * c; q3 += d * d;
    }
    for (; i < end; ++i) {
      const vec a = widen(x[i]) - k;
      s0 += a; q0 += a * a;
    }
    flush(sum, (s0 + s1) + (s2 + s3), lanes);
    flush(square, (q0 + q1) + (q2 + q3), lanes);
  }
}

INLINE void scaled(const stored *restrict x, const stored *restrict residual, stored *restrict y,
                   int64_t area, real center, real scale, real shift, const int add, const int relu) {
  const vec k = splat(center), a = splat(scale), b = splat(shift);
  for (int64_t i = 0; i < area; ++i) {
    vec v = (widen(x[i]) - k) * a + b;
    if (add) v += widen(residual[i]);
    y[i] = narrow(relu ? where_positive(v, v) : v);
  }
}
// y = relu?((x - center) * scale + shift + residual) over one chunk.
NOINLINE void apply(const stored *x, const stored *residual, stored *y, int64_t area, real center, real scale,
            real shift, int64_t relu) {
  if (residual && relu) scaled(x, residual, y, area, center, scale, shift, 1, 1);
  else if (residual) scaled(x, residual, y, area, center, scale, shift, 1, 0);
  else if (relu) scaled(x, residual, y, area, center, scale, shift, 0, 1);
  else scaled(x, residual, y, area, center, scale, shift, 0, 0);
}

int forward(const stored *x, const stored *residual, stored *y, const real *weight, const real *bias,
            real *mean, real *var, double eps, int64_t relu, int64_t n, int64_t blocks, int64_t channels,
            int64_t area, int64_t threads) {
  const int64_t stride = channels * area;
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    const stored *xc = x + c * area;
    // The mean of the first block is near enough to that of all: with it as the center, one reading gives both
    // sums. The mean of the squares is at most B times the variance, so rounding stays small: where the mean
    // lies d away from that of a share 1/B of the numbers, the variance is at least d * d / (B - 1).
    double sum[LANES] = {0}, square[LANES] = {0};
    centered_sums(xc, area, 0, blocks == 1 ? last : all, sum, square);
    const real center = total(sum) / ((double)min64(n, LANES) * area);
    memset(sum, 0, sizeof sum);
    memset(square, 0, sizeof square);
    for (int64_t b = 0; b < blocks; ++b)
      centered_sums(xc + b * stride, area, center, b == blocks - 1 ? last : all, sum, square);
    const double away = total(sum) / ((double)n * area);
    const double v = total(square) / ((double)n * area) - away * away, variance = v < 0 ? 0 : v;
    mean[c] = center + away;
    var[c] = variance;
    const double scale = (weight ? weight[c] : 1) / sqrt(variance + eps);
    const double shift = (bias ? bias[c] : 0) - away * scale;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      apply(x + at, residual ? residual + at : 0, y + at, area, center, scale, shift, relu);
    }
  }
  return 0;
}

// The statistics are known: the convolution that made x took them. Nothing has to stay in the cache for a second
// pass, so a few channels are read side by side: longer runs in the order of memory.
#define AT_ONCE 16
int given(const stored *x, const stored *residual, stored *y, const real *weight, const real *bias,
          const real *mean, const real *var, double eps, int64_t relu, int64_t blocks, int64_t channels,
          int64_t area, int64_t threads) {
  const int64_t run = max64(min64(AT_ONCE, channels / threads), 1);
  PARALLEL_FOR
  for (int64_t first = 0; first < channels; first += run) {
    const int64_t end = min64(first + run, channels);
    real scale[AT_ONCE];
    for (int64_t c = first; c < end; ++c) scale[c - first] = (weight ? weight[c] : 1) / sqrt(var[c] + eps);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t c = first; c < end; ++c) {
        const int64_t at = (b * channels + c) * area;
        const real shift = bias ? bias[c] : 0;
        apply(x + at, residual ? residual + at : 0, y + at, area, mean[c], scale[c - first], shift, relu);
      }
    }
  }
  return 0;
}

int affine(const stored *x, const stored *residual, stored *y, const real *scale, const real *shift,
           int64_t relu, int64_t blocks, int64_t channels, int64_t area, int64_t threads) {
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = (b * channels + c) * area;
      apply(x + at, residual ? residual + at : 0, y + at, area, 0, scale[c], shift[c], relu);
    }
  }
  return 0;
}

#define ADD_PRODUCT(j, at)                                                         \
  {                                                                                \
    const vec g = widen(gy[at]), h = relu ? where_positive(g, widen(y[at])) : g;   \
    s[j] += h;                                                                     \
    if (with_x) p[j] += h * (widen(x[at]) - k);                                    \
  }
INLINE void products(const stored *restrict gy, const stored *restrict x, const stored *restrict y,
                     int64_t area, real center, ivec lanes, double *restrict sum, double *restrict product,
                     const int relu, const int with_x) {
  const vec k = splat(center);
  for (int64_t first = 0; first < area; first += PIECE) {
    const int64_t end = min64(first + PIECE, area);
    vec s[4] = {{0}}, p[4] = {{0}};
    int64_t i = first;
    for (; i + 4 <= end; i += 4) {
      ADD_PRODUCT(0, i)
      ADD_PRODUCT(1, i + 1)
      ADD_PRODUCT(2, i + 2)
      ADD_PRODUCT(3, i + 3)
    }
    for (; i < end; ++i) {
      ADD_PRODUCT(0, i)
    }
    flush(sum, (s[0] + s[1]) + (s[2] + s[3]), lanes);
    flush(product, (p[0] + p[1]) + (p[2] + p[3]), lanes);
  }
}
// Sums of g and g * (x - center) over one chunk, lane by lane; g is gy where y, unless null, is positive.
NOINLINE void grad_sums(const stored *gy, const stored *x, const stored *y, int64_t area, real center, ivec lanes,
                double *sum, double *product) {
  if (y && x) products(gy, x, y, area, center, lanes, sum, product, 1, 1);
  else if (x) products(gy, x, y, area, center, lanes, sum, product, 0, 1);
  else if (y) products(gy, x, y, area, center, lanes, sum, product, 1, 0);
  else products(gy, x, y, area, center, lanes, sum, product, 0, 0);
}

INLINE void combined(const stored *restrict gy, const stored *restrict x, const stored *restrict y,
                     stored *restrict gx, stored *restrict gr, int64_t area, real center, real by_g,
                     real by_x, real plus, ivec lanes, const int relu, const int with_x, const int with_r) {
  const vec k = splat(center), kg = splat(by_g), kx = splat(by_x), k1 = splat(plus);
  for (int64_t i = 0; i < area; ++i) {
    const vec all = widen(gy[i]), g = only(relu ? where_positive(all, widen(y[i])) : all, lanes);
    gx[i] = narrow(with_x ? only(kg * g + (kx * (widen(x[i]) - k) + k1), lanes) : kg * g);
    if (with_r) gr[i] = narrow(g);
  }
}
// gx = by_g * g + by_x * (x - center) + plus (without x only the first term), gr = g, over one chunk.
NOINLINE void grad_apply(const stored *gy, const stored *x, const stored *y, stored *gx, stored *gr, int64_t area,
                 real center, real by_g, real by_x, real plus, ivec lanes) {
#define CASE(relu, with_x, with_r) \
  combined(gy, x, y, gx, gr, area, center, by_g, by_x, plus, lanes, relu, with_x, with_r)
  if (x && !y) CASE(0, 1, 0);
  else if (x && gr) CASE(1, 1, 1);
  else if (x) CASE(1, 1, 0);
  else if (!y) CASE(0, 0, 0);
  else if (gr) CASE(1, 0, 1);
  else CASE(1, 0, 0);
#undef CASE
}

// With mean and var: gradients of batch norm. Without: of the scaling by `weight`, which needs x only for that
// weight's own gradient (null: not wanted). y is null without ReLU, gr where nobody asks for it.
int backward(const stored *gy, const stored *x, const stored *y, stored *gx, stored *gr, const real *weight,
             const real *mean, const real *var, real *gweight, real *gbias, double eps, int64_t n,
             int64_t blocks, int64_t channels, int64_t area, int64_t threads) {
  const int64_t stride = channels * area;
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    double sum[LANES] = {0}, product[LANES] = {0};
    const real center = mean ? mean[c] : 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      const ivec lanes = b == blocks - 1 ? last : all;
      grad_sums(gy + at, x ? x + at : 0, y ? y + at : 0, area, center, lanes, sum, product);
    }
    const double count = (double)n * area, sum_g = total(sum), sum_gx = total(product);
    const double rstd = var ? 1 / sqrt((double)var[c] + eps) : 1, by_g = (weight ? weight[c] : 1) * rstd;
    const double by_x = -by_g * rstd * rstd * sum_gx / count, plus = -by_g * sum_g / count;
    gbias[c] = sum_g;
    gweight[c] = sum_gx * rstd;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      const ivec lanes = b == blocks - 1 ? last : all;
      grad_apply(gy + at, mean ? x + at : 0, y ? y + at : 0, gx + at, gr ? gr + at : 0, area, center, by_g,
                 by_x, plus, lanes);
    }
  }
  return 0;
}
