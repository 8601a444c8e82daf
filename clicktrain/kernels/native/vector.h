// Vector types and helpers of all kernels, in the vector extensions of GCC and Clang: AVX2, AVX-512 and NEON
// come from one text.
//
// Set before: LANES, elements of one vector; DTYPE, of the activations: FLOAT32, FLOAT64 or BFLOAT16.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef __has_builtin
#define __has_builtin(x) 0
#endif

#define FLOAT32 1
#define FLOAT64 2
#define BFLOAT16 3
#ifndef LANES
#define LANES 16
#endif
#ifndef DTYPE
#define DTYPE FLOAT32
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define NOINLINE static __attribute__((noinline, unused))
#define VECTOR_OF(bytes) __attribute__((vector_size(bytes), aligned(bytes)))
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)

// ---- threads

#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel num_threads(threads) if (threads > 1)")
#define PARALLEL_FOR _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")
#define BARRIER _Pragma("omp barrier")
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define PARALLEL
#define PARALLEL_FOR
#define BARRIER
#define THREAD 0
#define THREADS 1
#endif

// ---- types: `real` is what kernels compute in, `number` what activations are stored in

#if DTYPE == FLOAT64
#define REAL_BYTES 8
typedef double real;
typedef int64_t integer;
#else
#define REAL_BYTES 4
typedef float real;
typedef int32_t integer;
#endif
#define VEC_BYTES (LANES * REAL_BYTES)
typedef real vec VECTOR_OF(VEC_BYTES);
typedef integer ivec VECTOR_OF(VEC_BYTES);  // what comparisons of `vec` give: all bits of a lane set, or none

#if DTYPE == BFLOAT16
#define NUMBER_BYTES 2
typedef uint16_t number;
typedef int16_t number_bits;
typedef uint16_t stored __attribute__((vector_size(2 * LANES), aligned(2 * LANES), may_alias));
#else
#define NUMBER_BYTES REAL_BYTES
typedef real number;
typedef integer number_bits;
typedef vec stored;
#endif
#define STORED_BYTES (LANES * NUMBER_BYTES)

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- registers: compilers fold the load of a vector into each of its uses, which then wait for the load port.
// KEEP(v) holds v in a register, USE(v) needs it there. Vectors wider than a register are left to the compiler.

#if defined(__AVX512F__) && VEC_BYTES <= 64
#define IN_REGISTER "v"
#elif defined(__AVX__) && VEC_BYTES <= 32
#define IN_REGISTER "x"
#elif defined(__x86_64__) && VEC_BYTES <= 16
#define IN_REGISTER "x"
#elif defined(__aarch64__) && VEC_BYTES <= 16
#define IN_REGISTER "w"
#endif
#ifdef IN_REGISTER
#define KEEP(x) __asm__("" : "+" IN_REGISTER(x))
#define USE(x) __asm__ volatile("" : : IN_REGISTER(x))
#else
#define KEEP(x) ((void)(x))
#define USE(x) __asm__ volatile("" : : "m"(x))
#endif

// ---- lines that will be read soon

#define FETCH(p) __builtin_prefetch(p)

// ---- stores around the caches, for results too large to be found there again; DRAIN shows them to other threads

#if defined(__clang__)
#define STREAM(p, v) __builtin_nontemporal_store(v, p)
#elif defined(__AVX512F__) && STORED_BYTES == 64
#define STREAM_AS __builtin_ia32_movntps512
#elif defined(__AVX__) && STORED_BYTES == 32
#define STREAM_AS __builtin_ia32_movntps256
#elif defined(__SSE__) && STORED_BYTES == 16
#define STREAM_AS __builtin_ia32_movntps
#endif
#ifdef STREAM_AS
typedef float stream_t __attribute__((vector_size(STORED_BYTES), may_alias));
#define STREAM(p, v) STREAM_AS((float *)(p), (stream_t)(v))
#endif
#ifndef STREAM
#define STREAM(p, v) (*(p) = (v))
#endif
#if defined(__x86_64__)
#define DRAIN() __builtin_ia32_sfence()
#else
#define DRAIN() ((void)0)
#endif

// ---- sums over lanes of N reals: sumN(v); add_sums4_N(out, a, b, c, d) adds the sums of four vectors to out[0..3]

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define HALVES_4(v) SHUFFLE(v, v, 0, 1) + SHUFFLE(v, v, 2, 3)
#define HALVES_8(v) SHUFFLE(v, v, 0, 1, 2, 3) + SHUFFLE(v, v, 4, 5, 6, 7)
#define HALVES_16(v) SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
#define EVEN_4 0, 4, 2, 6
#define ODD_4 1, 5, 3, 7
#define LOW_4 0, 1, 4, 5
#define HIGH_4 2, 3, 6, 7
#define EVEN_8 0, 8, 2, 10, 4, 12, 6, 14
#define ODD_8 1, 9, 3, 11, 5, 13, 7, 15
#define LOW_8 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH_8 2, 3, 10, 11, 6, 7, 14, 15
#define EVEN_16 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define ODD_16 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW_16 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_16 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define SUM_FUNCTION(N, HALF)                                  \
  INLINE real sum##N(real##N v) { return sum##HALF(HALVES_##N(v)); }
#define FOLD_FUNCTION(N, HALF)                                 \
  INLINE void add_fours_##N(real *out, real##N v) { add_fours_##HALF(out, HALVES_##N(v)); }
// Transposing adds: neighbors, then pairs of neighbors, until every lane holds a part of one of the four sums.
#define SUMS4_FUNCTION(N)                                                            \
  INLINE void add_sums4_##N(real *out, real##N a, real##N b, real##N c, real##N d) { \
    const real##N t = SHUFFLE(a, b, EVEN_##N) + SHUFFLE(a, b, ODD_##N);              \
    const real##N u = SHUFFLE(c, d, EVEN_##N) + SHUFFLE(c, d, ODD_##N);              \
    add_fours_##N(out, SHUFFLE(t, u, LOW_##N) + SHUFFLE(t, u, HIGH_##N));            \
  }
#else
#define SUM_FUNCTION(N, HALF)                   \
  INLINE real sum##N(real##N v) {               \
    real s = 0;                                 \
    for (int i = 0; i < N; ++i) s += v[i];      \
    return s;                                   \
  }
#define FOLD_FUNCTION(N, HALF)
#define SUMS4_FUNCTION(N) ONE_BY_ONE_FUNCTION(N)
#endif
#define ONE_BY_ONE_FUNCTION(N)                                                              \
  INLINE void add_sums4_##N(real *out, real##N a, real##N b, real##N c, real##N d) {        \
    out[0] += sum##N(a), out[1] += sum##N(b), out[2] += sum##N(c), out[3] += sum##N(d);     \
  }
#define REALS(N) typedef real real##N __attribute__((vector_size(N * REAL_BYTES)));

REALS(1)
INLINE real sum1(real1 v) { return v[0]; }
ONE_BY_ONE_FUNCTION(1)
#if LANES >= 2
REALS(2)
INLINE real sum2(real2 v) { return v[0] + v[1]; }
ONE_BY_ONE_FUNCTION(2)
#endif
#if LANES >= 4
REALS(4)
typedef real real4_anywhere __attribute__((vector_size(4 * REAL_BYTES), aligned(REAL_BYTES), may_alias));
INLINE void add_fours_4(real *out, real4 v) { *(real4_anywhere *)out += (real4_anywhere)v; }
SUM_FUNCTION(4, 2)
SUMS4_FUNCTION(4)
#endif
#if LANES >= 8
REALS(8)
SUM_FUNCTION(8, 4)
FOLD_FUNCTION(8, 4)
SUMS4_FUNCTION(8)
#endif
#if LANES >= 16
REALS(16)
SUM_FUNCTION(16, 8)
FOLD_FUNCTION(16, 8)
SUMS4_FUNCTION(16)
#endif
INLINE real lane_sum(vec v) { return PASTE(sum, LANES)(v); }
INLINE void add_lane_sums4(real *out, vec a, vec b, vec c, vec d) { PASTE(add_sums4_, LANES)(out, a, b, c, d); }

// ---- `widen` reads activations as they are computed with, `narrow` rounds to nearest even; NaN stays NaN

#if DTYPE != BFLOAT16
INLINE vec widen(stored v) { return v; }
INLINE stored narrow(vec v) { return v; }
#else
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
// GCC 12 finds no good instructions for these conversions, so they are named where they take whole registers.
INLINE bits spread(stored v) {
#if (defined(__AVX512F__) && LANES == 16) || (defined(__AVX2__) && LANES == 8)
  bits b;
  __asm__("vpmovzxwd %1, %0" : "=v"(b) : "vm"(v));
  return b;
#else
  return __builtin_convertvector(v, bits);
#endif
}
INLINE vec widen(stored v) { return (vec)(spread(v) << 16); }
// One number as `narrow` rounds it.
INLINE uint16_t round_bits(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  return x != x ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
#define UPPER_BYTES 2, 3, 6, 7, 10, 11, 14, 15  // of four numbers
INLINE stored narrow(vec v) {
#if defined(__AVX512BF16__) && LANES == 16
  stored s;  // the instruction also makes zeros of numbers under 1.2e-38
  __asm__("vcvtneps2bf16 %1, %0" : "=v"(s) : "v"(v));
  return s;
#else
  // The upper halves are kept. Not a number: all bits set.
  const bits b = (bits)v, near = (b + 0x7fff + ((b >> 16) & 1)) | (bits)(v != v);
#if defined(__AVX2__) && LANES == 8
  const uint8_t upper VECTOR_OF(32) = {UPPER_BYTES, UPPER_BYTES, UPPER_BYTES, UPPER_BYTES};
  bits moved;
  __asm__("vpshufb %2, %1, %0\n\tvpermq $8, %0, %0" : "=v"(moved) : "v"(near), "vm"(upper));
  stored s;
  memcpy(&s, &moved, sizeof s);
  return s;
#else
  return __builtin_convertvector(near >> 16, stored);
#endif
#endif
}
#endif
