// What a compiler has to build and run to be used: vectors, threads, float, double and integers, all exact.
#include <stdint.h>
#include <string.h>
typedef float vec __attribute__((vector_size(64)));
// y = x * x + 3 over n vectors; the sum of all numbers is returned.
int64_t clicktrain_self_test(const float *x, float *y, int64_t n, int64_t threads) {
  double sum = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int64_t i = 0; i < n; ++i) {
    vec a;
    memcpy(&a, x + 16 * i, sizeof a);
    a = a * a + 3.0f;
    memcpy(y + 16 * i, &a, sizeof a);
  }
  for (int64_t i = 0; i < 16 * n; ++i) sum += y[i];
  return (int64_t)sum;
}
