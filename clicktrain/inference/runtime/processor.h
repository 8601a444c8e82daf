// What an x86-64 processor and its operating system can do, without a function of the compiler's own library.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>

// 3: what 2 is and AVX512_BF16, 2: AVX-512 (F, DQ, BW, VL), 1: AVX2 and FMA, 0: neither.
static inline int processor_level(void) {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const unsigned first = 1u << 12 | 1u << 27 | 1u << 28;  // FMA, XGETBV, AVX
  if ((c & first) != first) return 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5)) return 0;
  const unsigned second = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  if ((low & 0xe6) != 0xe6 || (b & second) != second) return 1;
  return a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5) ? 3 : 2;
}

// Whether one with AVX-512 multiplies int8 numbers, too.
static inline int processor_has_vnni(void) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & 1u << 11);
}
#endif
