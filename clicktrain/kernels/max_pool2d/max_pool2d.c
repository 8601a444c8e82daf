// Max pooling of activations [B, C, H, W, V]: forward and backward. LANES and DTYPE as in vector.h.
#include "kernels/max_pool2d/windows.h"

int forward(const stored *x, stored *y, taps_t *taps, int64_t h, int64_t w, int64_t oh, int64_t ow,
            int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw,
            int64_t planes, int64_t threads) {
  pooled_t *const run = pooling(WINDOW);
  PARALLEL_FOR
  for (int64_t p = 0; p < planes; ++p)
    run(x + p * h * w, x + min64(p + 1, planes - 1) * h * w, y + p * oh * ow, taps + p * oh * ow, h, w, oh, ow, WINDOW);
  return 0;
}
int backward(const stored *gy, const taps_t *taps, stored *gx, int64_t h, int64_t w, int64_t oh, int64_t ow,
             int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw,
             int64_t planes, int64_t threads) {
  collected_t *const run = collecting(WINDOW);
  PARALLEL_FOR
  for (int64_t p = 0; p < planes; ++p)
    run(gy + p * oh * ow, taps + p * oh * ow, gx + p * h * w, h, w, oh, ow, WINDOW);
  return 0;
}
