// Vectors of this set of instructions, loads and stores anywhere, and activation functions by number.
#pragma once
#include "activations.h"
#include "runtime.h"

typedef float anywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec get(const float *p) { return (vec)(*(const anywhere *)p); }
INLINE void put(float *p, vec v) { *(anywhere *)p = (anywhere)v; }
INLINE int least_int(int a, int b) { return a < b ? a : b; }
INLINE int most_int(int a, int b) { return a > b ? a : b; }

// Out of line: these are long, and rare.
NOINLINE vec activate_long(vec z, int act, float low) {
  switch (act) {
    case ACT_SILU: return or_nan(z * sigmoid(z), z);
    case ACT_GELU: return or_nan(gelu(z), z);
    case ACT_GELU_TANH: return or_nan(z * sigmoid(twice_u(z)), z);
    case ACT_SIGMOID: return or_nan(sigmoid(z), z);
    case ACT_TANH: return or_nan(2.0f * sigmoid(2.0f * z) - 1.0f, z);
    case ACT_ELU: {
      const vec below = low * (exp_of(most(splat(-87), least(z, splat(0)))) - 1.0f);
      return or_nan(either(z > (vec){0}, z, below), z);
    }
    default: return z;
  }
}

INLINE vec activate(vec z, int act, float low, float high) {
  switch (act) {
    case ACT_NONE: return z;
    case ACT_RELU: return without(z, z <= (vec){0});
    case ACT_CLAMP: return or_nan(most(splat(low), least(splat(high), z)), z);
    case ACT_LEAKY: return either(z < (vec){0}, z * low, z);
    case ACT_HARDSWISH: return or_nan(z * hardswish_share(z), z);
    case ACT_HARDSIGMOID: return or_nan(hardswish_share(z), z);
    default: return activate_long(z, act, low);
  }
}

#if defined(SHUFFLE) && LANES == 16
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#elif defined(SHUFFLE) && LANES == 8
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#elif defined(SHUFFLE) && LANES == 4
#define EVENS 0, 2, 4, 6
#endif

// `count` positions of a row (`element` floats each: 1, or LANES), every `step`-th. What it copies to is filled
// upwards: what is written too far is written again.
INLINE void copy_positions(float *to, const float *from, int64_t count, int64_t step, const int element) {
  if (element == 1 && step == 1) {
    for (int64_t k = 0; k < count; k += LANES) put(to + k, get(from + k));
#ifdef EVENS
  } else if (element == 1 && step == 2) {
    for (int64_t k = 0; k < count; k += LANES) {
      const vec a = get(from + 2 * k), b = get(from + 2 * k + LANES);
      put(to + k, (vec)SHUFFLE(a, b, EVENS));
    }
#endif
  } else if (element == 1) {
    for (int64_t k = 0; k < count; ++k) to[k] = from[k * step];
  } else {
    for (int64_t k = 0; k < count; ++k) put(to + k * LANES, get(from + k * step * LANES));
  }
}
