// Batch norm of activations [B, C, H, W, V], an addition and an activation: forward, given, affine, and their
// gradients. LANES and DTYPE as in vector.h, ACTIVATION as in activations.h.
//
// All passes over one channel come before the next channel: its B pieces of H*W vectors usually stay in L2, so
// that memory is read once and written once. Channels are independent of each other: the result does not depend
// on the number of threads.
#include "kernels/batch_norm2d/statistics.h"

int forward(const stored *x, const stored *residual, stored *y, const real *weight, const real *bias,
            real *mean, real *var, double eps, double low, double high, int64_t n, int64_t blocks,
            int64_t channels, int64_t area, int64_t threads) {
  const int64_t stride = channels * area;
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    const stored *xc = x + c * area;
    const real center = center_of(xc, min64(n, LANES), area, blocks == 1 ? last : all);
    double sum[LANES] = {0}, square[LANES] = {0};
    for (int64_t b = 0; b < blocks; ++b) {
      fetch_ahead(xc + b * stride, stride, area, b, blocks);
      centered_sums(xc + b * stride, area, center, b == blocks - 1 ? last : all, sum, square);
    }
    const channel to = normalized(sum, square, (double)n * area, center, mean + c, var + c, weight ? weight[c] : 1,
                                  bias ? bias[c] : 0, eps, low, high);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      apply(x + at, residual ? residual + at : 0, y + at, area, to);
    }
  }
  return 0;
}

// The statistics are known: the convolution that made x took them. Nothing has to stay in the cache for a second
// pass, so a few channels are read side by side: longer runs in the order of memory.
#define AT_ONCE 16
int given(const stored *x, const stored *residual, stored *y, const real *weight, const real *bias,
          const real *mean, const real *var, double eps, double low, double high, int64_t blocks,
          int64_t channels, int64_t area, int64_t threads) {
  const int64_t run = max64(min64(AT_ONCE, channels / threads), 1);
  PARALLEL_FOR
  for (int64_t first = 0; first < channels; first += run) {
    const int64_t end = min64(first + run, channels);
    channel to[AT_ONCE];
    for (int64_t c = first; c < end; ++c)
      to[c - first] = known(mean[c], var[c], weight ? weight[c] : 1, bias ? bias[c] : 0, eps, low, high);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t c = first; c < end; ++c) {
        const int64_t at = (b * channels + c) * area;
        apply(x + at, residual ? residual + at : 0, y + at, area, to[c - first]);
      }
    }
  }
  return 0;
}

int affine(const stored *x, const stored *residual, stored *y, const real *scale, const real *shift, double low,
           double high, int64_t blocks, int64_t channels, int64_t area, int64_t threads) {
  PARALLEL_FOR
  for (int64_t i = 0; i < blocks * channels; ++i) {
    const int64_t c = i % channels, at = i * area;
    const channel to = {0, scale ? scale[c] : 1, shift ? shift[c] : 0, low, high};
    apply(x + at, residual ? residual + at : 0, y + at, area, to);
  }
  return 0;
}

// Of `forward` and `given`. y and residual are null where x is enough, gr where nobody asks for it.
int backward(const stored *gy, const stored *x, const stored *y, const stored *residual, stored *gx, stored *gr,
             const real *weight, const real *bias, const real *mean, const real *var, real *gweight, real *gbias,
             double eps, double low, double high, int64_t n, int64_t blocks, int64_t channels, int64_t area,
             int64_t threads) {
  const int64_t stride = channels * area;
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  const sources every = {gy, x, y, residual};
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    double sum[LANES] = {0}, product[LANES] = {0};
    const real scale = weight ? weight[c] : 1;
    const channel to = known(mean[c], var[c], scale, bias ? bias[c] : 0, eps, low, high);
    stored *const keep = gr ? gr : KEEPS_H ? gx : 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      fetch_ahead(gy + at, stride, area, b, blocks);
      fetch_ahead(x + at, stride, area, b, blocks);
      grad_sums(chunk_of(every, at), keep ? keep + at : 0, area, to, b == blocks - 1 ? last : all, sum, product);
    }
    const combination of = gradients(sum, product, (double)n * area, var[c], scale, eps, gweight + c, gbias + c);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      grad_apply(chunk_of(every, at), keep ? keep + at : 0, gx + at, area, to, of, b == blocks - 1 ? last : all);
    }
  }
  return 0;
}

// Of `affine`. x is null if neither the scale's gradient needs it (0 then) nor the activation's; gx and gr where
// nobody asks for them.
int affine_backward(const stored *gy, const stored *x, const stored *y, const stored *residual, stored *gx,
                    stored *gr, const real *scale, const real *shift, real *gscale, real *gshift, double low,
                    double high, int64_t n, int64_t blocks, int64_t channels, int64_t area, int64_t threads) {
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  const sources every = {gy, x, y, residual};
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    double sum[LANES] = {0}, product[LANES] = {0};
    const channel to = {0, scale ? scale[c] : 1, shift ? shift[c] : 0, low, high};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = (b * channels + c) * area;
      fetch_ahead(gy + at, channels * area, area, b, blocks);
      grad_scaled(chunk_of(every, at), gx ? gx + at : 0, gr ? gr + at : 0, area, to,
                  b == blocks - 1 ? last : all, sum, product);
    }
    gshift[c] = total(sum);
    gscale[c] = total(product);
  }
  return 0;
}
