// Activation functions of vectors, and gradients through them: for every kernel that ends in one. Set before:
// ACTIVATION, one of the numbers below; `low` and `high` are the two numbers that some functions have.
//
// float64 calls the C library lane by lane, for tests. float32 is good to a few units in the last place, bfloat16
// to less than half a unit before the result is rounded: bounds stand at each function, tests/kernels/
// test_activations.py checks them. Coefficients are of least maximum error on the interval that is named.
#pragma once
#include "kernels/native/vector.h"

#define NONE 0
#define RELU 1
#define CLAMP 2      // to [low, high]: ReLU6, hardtanh
#define LEAKY 3      // times low below zero; low is positive
#define HARDSWISH 4
#define SILU 5
#define GELU 6       // by the normal distribution
#define GELU_TANH 7  // by the hyperbolic tangent
#ifndef ACTIVATION
#define ACTIVATION NONE
#endif

typedef struct { vec low, high; } limits;

// Bits, not products: what is masked out may be a NaN.
INLINE vec only(vec v, ivec lanes) { return (vec)((ivec)v & lanes); }
INLINE vec without(vec v, ivec lanes) { return (vec)((ivec)v & ~lanes); }
INLINE vec either(ivec lanes, vec a, vec b) { return (vec)(((ivec)a & lanes) | ((ivec)b & ~lanes)); }
// A diverged training has to stay visible: NaN where x is one.
INLINE vec or_nan(vec v, vec x) { return (vec)((ivec)v | (ivec)(x != x)); }

// The smaller and the larger one; b if either is no number.
#if defined(IN_REGISTER) && defined(__AVX__) && REAL_BYTES == 4
INLINE vec least(vec a, vec b) {
  vec v;
  __asm__("vminps %2, %1, %0" : "=" IN_REGISTER(v) : IN_REGISTER(a), IN_REGISTER "m"(b));
  return v;
}
INLINE vec most(vec a, vec b) {
  vec v;
  __asm__("vmaxps %2, %1, %0" : "=" IN_REGISTER(v) : IN_REGISTER(a), IN_REGISTER "m"(b));
  return v;
}
#else
INLINE vec least(vec a, vec b) { return either(a < b, a, b); }
INLINE vec most(vec a, vec b) { return either(a > b, a, b); }
#endif

#if DTYPE == FLOAT64
#define BY_LANE(name, expression)                           \
  INLINE vec name(vec v) {                                  \
    for (int l = 0; l < LANES; ++l) {                       \
      const double x = v[l];                                \
      v[l] = expression;                                    \
    }                                                       \
    return v;                                               \
  }
BY_LANE(sigmoid, 1 / (1 + exp(-x)))
BY_LANE(normal_below, 0.5 * erfc(-x * 0.70710678118654752440))
BY_LANE(normal_density, 0.39894228040143267794 * exp(-0.5 * x * x))
INLINE vec gelu(vec z) { return z * normal_below(z); }
INLINE vec gelu_slope(vec z) { return normal_below(z) + z * normal_density(z); }
#else

// Polynomials in pairs of terms, with squares of x beside them: short chains, since whole ones would wait for each
// other's results.
#define P1(x, a, b) ((a) + (x) * (b))
#define P3(x, xx, a, b, c, d) (P1(x, a, b) + (xx) * P1(x, c, d))
#define MAGIC 12582912.0f  // 1.5 * 2^23: a number that is added to it becomes a whole one, in its last bits
// p times 2 to the number in the last bits of `whole`. Unsigned: beyond the range it is anything, but not undefined.
typedef unsigned unsigned_bits VECTOR_OF(VEC_BYTES);
INLINE vec times_power(vec p, vec whole) { return (vec)((unsigned_bits)p + ((unsigned_bits)whole << 23)); }
#if DTYPE == BFLOAT16
// 2^t for |t| <= 126, to 7.5e-5 of it.
INLINE vec exp2_of(vec t) {
  const vec whole = t + MAGIC, f = t - (whole - MAGIC);
  const vec p = P3(f, f * f, 0.999928074f, 0.693260986f, 0.242611122f, 0.0551716686f);
  return times_power(p, whole);
}
INLINE vec exp_of(vec x) { return exp2_of(x * 1.44269504f); }
#else
// 2^t for |t| <= 126, to 1e-7 of it if t is exact.
INLINE vec exp2_of(vec t) {
  const vec whole = t + MAGIC, f = t - (whole - MAGIC), ff = f * f;
  const vec p = P3(f, ff, 1.0f, 0.693147206f, 0.240226469f, 0.0555032878f) +
      ff * ff * (P1(f, 0.00961848896f, 0.00133999312f) + ff * 0.000153458119f);
  return times_power(p, whole);
}
// e^x for |x| <= 87, to 1.5e-7 of it: ln 2 in two parts, of which the first has no last bits.
INLINE vec exp_of(vec x) {
  const vec whole = x * 1.44269504f + MAGIC, n = whole - MAGIC;
  const vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f, ff = f * f;
  const vec p = P3(f, ff, 1.0f, 1.00000004f, 0.499999921f, 0.166664201f) +
      ff * ff * (P1(f, 0.0416682262f, 0.00837482406f) + ff * 0.00138368354f);
  return times_power(p, whole);
}
#endif
// 1 / (1 + e^-x), 0 below -87; of NaN anything.
INLINE vec sigmoid(vec x) {
  return only(1.0f / (1.0f + exp_of(most(-x, splat(-87)))), x >= splat(-87));
}

// The share of the normal distribution beyond a >= 0 is 2^P(a), as a whole to the relative error that is named:
// so the tail keeps its digits, where 1 + erf(x) loses them all. Beyond REACH it is 0.
#if DTYPE == BFLOAT16
#define REACH 8  // 1.2e-3; there it is 6e-16
INLINE vec log2_beyond(vec a) {
  const vec aa = a * a;
  return P1(a, -1.00171385f, -1.13379866f) +
      aa * P3(a, aa, -0.487466617f, -0.0358908194f, 0.00314975087f, -0.000115073836f);
}
#else
#define REACH 6  // 2e-7 near 0 to 1e-6 in the tail, by the rounding of P; there it is 1e-9
INLINE vec log2_beyond(vec a) {
  const vec aa = a * a, aaaa = aa * aa;
  return P3(a, aa, -0.999999976f, -1.15110542f, -0.459212638f, -0.0524579486f) +
      aaaa * (P3(a, aa, 0.0069548944f, 1.24299689e-05f, -0.000298749031f, 8.77324598e-05f) +
      aaaa * P3(a, aa, -1.45355209e-05f, 1.49415542e-06f, -8.88304505e-08f, 2.33965578e-09f));
}
#endif
INLINE vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE vec beyond(vec a) { return only(exp2_of(log2_beyond(a)), a <= splat(REACH)); }
INLINE vec gelu(vec z) {
  const vec tail = beyond(absolute(z));
  return z * either(z < (vec){0}, tail, 1.0f - tail);
}
#if DTYPE == BFLOAT16
// Its slope less 1/2 is odd; to 2^-12 everywhere.
INLINE vec gelu_slope(vec z) {
  const vec x = most(splat(-4.25f), least(splat(4.25f), z)), s = x * x, ss = s * s, ssss = ss * ss;
  const vec p = P3(s, ss, 0.79734576f, -0.263964837f, 0.0576501185f, -0.00838255481f) +
      ssss * (P3(s, ss, 0.0008348243f, -5.61002359e-05f, 2.41635079e-06f, -5.98773684e-08f) +
      ssss * 6.46255293e-10f);
  return x * p + 0.5f;
}
#else
// Below 0 it is the share beyond a = -z times a polynomial; to 2e-7 everywhere.
INLINE vec gelu_slope(vec z) {
  const vec a = absolute(z), aa = a * a, aaaa = aa * aa;
  const vec p = P3(a, aa, 1.00000011f, -0.797892844f, -0.636520324f, -0.10944937f) +
      aaaa * (P3(a, aa, 0.0200798274f, -0.000919859117f, -0.00056181137f, 0.000140258252f) +
      aaaa * -1.0960337e-05f);
  const vec tail = only(exp2_of(log2_beyond(a)) * p, a <= splat(REACH));
  return or_nan(either(z < (vec){0}, tail, 1.0f - tail), z);
}
#endif
#endif

INLINE vec silu_slope(vec z) {
  const vec s = sigmoid(z);
  return or_nan(s + z * s * (1 - s), z);
}
// By tanh(u) = 2 sigmoid(2u) - 1, with u = sqrt(2 / pi) (z + 0.044715 z^3).
INLINE vec twice_u(vec z) { return z * ((real)1.5957691216057308 + (real)0.07135481627260025 * z * z); }
INLINE vec gelu_tanh_slope(vec z) {
  const vec s = sigmoid(twice_u(z)), by_z = (real)1.5957691216057308 + (real)0.21406444881780076 * z * z;
  const vec rest = z * by_z * s * (1 - s);
  // So far out that z^3 is infinite, nothing is left of the second term.
  return or_nan(s + only(rest, rest == rest), z);
}
INLINE vec hardswish_share(vec z) { return most(splat(0), least(splat(6), z + 3)) * (real)(1.0 / 6); }

INLINE vec activated(vec z, limits to) {
  switch (ACTIVATION) {
    case RELU: return without(z, z <= (vec){0});  // NaN as for torch
    case CLAMP: return most(to.low, least(to.high, z));
    case LEAKY: return either(z < (vec){0}, z * to.low, z);
    case HARDSWISH: return z * hardswish_share(z);
    case SILU: return z * sigmoid(z);
    case GELU: return gelu(z);
    case GELU_TANH: return z * sigmoid(twice_u(z));
    default: return z;
  }
}
// The gradient of the argument z, from that of the result. The first three would take the result for z as well.
INLINE vec act_grad(vec g, vec z, limits to) {
  switch (ACTIVATION) {
    case RELU: return without(g, z <= (vec){0});
    case CLAMP: return without(g, (z <= to.low) | (z >= to.high));
    case LEAKY: return either(z < (vec){0}, g * to.low, g);
    case HARDSWISH: {
      const vec inside = either(z < splat(3), g * (z * (real)(1.0 / 3) + (real)0.5), g);
      return or_nan(without(inside, z <= splat(-3)), z);
    }
    case SILU: return g * silu_slope(z);
    case GELU: return g * gelu_slope(z);
    case GELU_TANH: return g * gelu_tanh_slope(z);
    default: return g;
  }
}
