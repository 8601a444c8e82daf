// What a processor can do at most: multiply_add (from registers), read_all (from a buffer), pass_over (reads one
// buffer, writes another). LANES as in vector.h; SUMS, 12 or 20, vectors that are summed up side by side.
#include "kernels/native/vector.h"
#ifndef SUMS
#define SUMS 12
#endif

#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#if SUMS == 20
#define EACH(X) TWELVE(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19)
#else
#define EACH(X) TWELVE(X)
#endif
#define START(i) vec a##i = splat((real)i);
// KEEP after every step: nothing is moved out of the loop, and nothing out of its register.
#define STEP(i) a##i = a##i * factor + term; KEEP(a##i);
#define PLUS(i) + a##i

int multiply_add(real *out, int64_t steps, int64_t threads) {
  int used = 1;
  (void)threads;
  PARALLEL {
    vec factor = splat(0.999f), term = splat(0.001f);
    KEEP(factor);
    KEEP(term);
    EACH(START)
    for (int64_t i = 0; i < steps; ++i) { EACH(STEP) }
    const vec total = EACH(PLUS);
    if (THREAD == 0) {
      used = THREADS;
      out[0] = lane_sum(total);
    } else {
      USE(total);
    }
  }
  return used;
}

int read_all(const vec *from, int64_t bytes, int64_t passes, int64_t threads) {
  int used = 1;
  (void)threads;
  PARALLEL {
    const int64_t count = bytes / (int64_t)sizeof(vec);
    const vec *p = from + THREAD * count;
    for (int64_t pass = 0; pass < passes; ++pass) {
      int64_t i = 0;
      for (; i + 8 <= count; i += 8) {
        vec t0 = p[i], t1 = p[i + 1], t2 = p[i + 2], t3 = p[i + 3];
        USE(t0); USE(t1); USE(t2); USE(t3);
        vec t4 = p[i + 4], t5 = p[i + 5], t6 = p[i + 6], t7 = p[i + 7];
        USE(t4); USE(t5); USE(t6); USE(t7);
      }
      for (; i < count; ++i) {
        vec t = p[i];
        USE(t);
      }
    }
    if (THREAD == 0) used = THREADS;
  }
  return used;
}

// In pieces, so that reading and writing go side by side. A rest shorter than a vector comes last.
#define PIECE 128
typedef real unaligned_t __attribute__((vector_size(VEC_BYTES), aligned(1), may_alias));
int pass_over(const char *from, int64_t bytes_read, char *to, int64_t bytes_written, int64_t stream,
              int64_t threads) {
  const int64_t size = (int64_t)sizeof(vec), in = bytes_read / size, out = bytes_written / size;
  const int64_t pieces = ((in > out ? in : out) + PIECE - 1) / PIECE;
  const unaligned_t *source = (const unaligned_t *)from;
  vec *target = (vec *)to;
  (void)threads;
  PARALLEL {
    vec zero = splat(0);
    for (int64_t k = pieces * THREAD / THREADS; k < pieces * (THREAD + 1) / THREADS; ++k) {
      const int64_t begin = k * PIECE, stop = begin + PIECE;
      for (int64_t i = begin; i < min64(stop, in); ++i) {
        vec t = source[i];
        USE(t);
      }
      for (int64_t i = begin; i < min64(stop, out); ++i) {
        KEEP(zero);
        if (stream) STREAM(&target[i], zero);
        else target[i] = zero;
      }
    }
    if (stream) DRAIN();
  }
  for (int64_t i = in * size; i < bytes_read; ++i) (void)((const volatile char *)from)[i];
  if (out * size < bytes_written) memset(to + out * size, 0, bytes_written - out * size);
  return 0;
}
