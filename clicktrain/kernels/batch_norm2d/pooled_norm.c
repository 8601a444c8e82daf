// Max pooling, batch norm, an addition and an activation of activations [B, C, H, W, V] as one operation: forward,
// given, backward. LANES and DTYPE as in vector.h, ACTIVATION as in activations.h.
//
// A chunk is pooled right before it is summed up, and its gradient is dealt out to the windows right after it was
// computed, from L1: what is as large as the images goes through memory once in each direction.
#include "kernels/batch_norm2d/statistics.h"
#include "kernels/max_pool2d/windows.h"

#define PLANES int64_t h, int64_t w, int64_t oh, int64_t ow
#define POOL \
  int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw

// The plane behind that of a block and channel, in the order of the loops.
INLINE int64_t next_plane(int64_t b, int64_t c, int64_t blocks, int64_t channels) {
  return b + 1 < blocks ? (b + 1) * channels + c : min64(c + 1, channels - 1);
}

// p gets the maxima, which the backward pass reads in place of x, and taps where they come from.
int forward(const stored *x, const stored *residual, stored *p, taps_t *taps, stored *y, const real *weight,
            const real *bias, real *mean, real *var, double eps, double low, double high, int64_t n,
            int64_t blocks, int64_t channels, PLANES, POOL, int64_t threads) {
  const int64_t area = oh * ow, stride = channels * area, whole = h * w;
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  pooled_t *const pool = pooling(WINDOW);
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    double sum[LANES] = {0}, square[LANES] = {0};
    real center = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      const ivec lanes = b == blocks - 1 ? last : all;
      const int64_t plane = b * channels + c, next = next_plane(b, c, blocks, channels);
      pool(x + plane * whole, x + next * whole, p + at, taps + at, h, w, oh, ow, WINDOW);
      if (b == 0) center = center_of(p + at, min64(n, LANES), area, lanes);
      centered_sums(p + at, area, center, lanes, sum, square);
    }
    const channel to = normalized(sum, square, (double)n * area, center, mean + c, var + c, weight ? weight[c] : 1,
                                  bias ? bias[c] : 0, eps, low, high);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      apply(p + at, residual ? residual + at : 0, y + at, area, to);
    }
  }
  return 0;
}

int given(const stored *x, const stored *residual, stored *y, const real *weight, const real *bias,
          const real *mean, const real *var, double eps, double low, double high, int64_t blocks,
          int64_t channels, PLANES, POOL, int64_t threads) {
  const int64_t area = oh * ow;
  pooled_t *const pool = pooling(WINDOW);
  PARALLEL_FOR
  for (int64_t i = 0; i < blocks * channels; ++i) {
    const int64_t c = i % channels, at = i * area;
    const channel to = known(mean[c], var[c], weight ? weight[c] : 1, bias ? bias[c] : 0, eps, low, high);
    const int64_t next = min64(i + 1, blocks * channels - 1);
    pool(x + i * h * w, x + next * h * w, y + at, 0, h, w, oh, ow, WINDOW);
    apply(y + at, residual ? residual + at : 0, y + at, area, to);
  }
  return 0;
}

// `scratch` has a channel of results for each thread.
int backward(const stored *gy, const stored *p, const stored *y, const stored *residual, const taps_t *taps,
             stored *gx, stored *gr, stored *scratch, const real *weight, const real *bias, const real *mean,
             const real *var, real *gweight, real *gbias, double eps, double low, double high, int64_t n,
             int64_t blocks, int64_t channels, PLANES, POOL, int64_t threads) {
  const int64_t area = oh * ow, stride = channels * area, whole = h * w;
  const ivec all = first_lanes(LANES), last = first_lanes(n - (blocks - 1) * LANES);
  const sources every = {gy, p, y, residual};
  collected_t *const collect = collecting(WINDOW);
  PARALLEL_FOR
  for (int64_t c = 0; c < channels; ++c) {
    stored *const own = scratch + THREAD * blocks * area;
    double sum[LANES] = {0}, product[LANES] = {0};
    const real scale = weight ? weight[c] : 1;
    const channel to = known(mean[c], var[c], scale, bias ? bias[c] : 0, eps, low, high);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      stored *const keep = gr ? gr + at : KEEPS_H ? own + b * area : 0;
      fetch_ahead(gy + at, stride, area, b, blocks);
      fetch_ahead(p + at, stride, area, b, blocks);
      grad_sums(chunk_of(every, at), keep, area, to, b == blocks - 1 ? last : all, sum, product);
    }
    const combination of = gradients(sum, product, (double)n * area, var[c], scale, eps, gweight + c, gbias + c);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c * area;
      stored *const kept = gr ? gr + at : KEEPS_H ? own + b * area : 0;
      grad_apply(chunk_of(every, at), kept, own, area, to, of, b == blocks - 1 ? last : all);
      collect(own, taps + at, gx + (b * channels + c) * whole, h, w, oh, ow, WINDOW);
    }
  }
  return 0;
}
