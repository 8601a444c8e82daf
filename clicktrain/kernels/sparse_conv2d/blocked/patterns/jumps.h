// From the code of one kernel to that of the next: patterns follow each other at random, and a jump that was predicted
// wrongly costs half as much as a kernel in pairs. So each kernel finds the next one's code before it begins: what is
// in the pipeline by the end of it then hides most of that.
//
// BEGIN_KERNELS, then KERNEL(n): { FIND_NEXT ... JUMP } for each pattern, END_KERNELS. LABELS are those of all patterns
// and of the end, `none` is an entry with the number after the last pattern. GCC 12 cannot lower vectors that are wider
// than registers in functions that jump to labels: for these there is a switch.
#pragma once
#include "kernels/native/vector.h"

#if (defined(__AVX512F__) && VEC_BYTES <= 64) || (defined(__AVX2__) && VEC_BYTES <= 32) || \
    ((defined(__SSE2__) || defined(__aarch64__)) && VEC_BYTES <= 16)
#define BEGIN_KERNELS                               \
  static const void *const codes[] = {LABELS};      \
  const void *target;                               \
  FIND_NEXT JUMP
#define KERNEL(n) taps_##n
#define FIND_NEXT target = codes[(e == stop ? none : e)[1]];
#define JUMP goto *target;
#define END_KERNELS done:
#else
#define BEGIN_KERNELS \
  long next;          \
  FIND_NEXT again : switch (next) {
#define KERNEL(n) case n
#define FIND_NEXT next = (e == stop ? none : e)[1];
#define JUMP goto again;
#define END_KERNELS \
  default: break;   \
    }
#endif
