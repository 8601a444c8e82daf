// What planning a convolution needs to know, and the memory that its tables are taken from.
#pragma once
#include <string.h>

#include "runtime.h"

#define NETWORK (&model_network_description)

typedef struct {
  const model_op *op;
  const model_value *in, *out;
  int layout, lanes, element;  // element: floats of one position
  int registers;
  const model_isa *isa;
  int taps, columns;           // of a kernel, of its rows
  int vectors;                 // most in a tile
  const unsigned char *bits;   // which weights are stored; NULL: all
  const float *values;         // these
  int form, passes;            // CHOICE_*, 0 by rules
  int in_place;                // results take the place of what is added: one pass, and no tile that is computed again
} model_problem;

// What can be measured about a convolution: a form with regions that fit L1, or L2; by rules where that cannot be.
enum { CHOICE_ROWS = 1, CHOICE_FLAT, CHOICE_TAPS, CHOICE_COLUMNS, CHOICE_WINDOWS, CHOICE_POINTWISE, CHOICES };
enum { CHOICE_SMALL = 1, CHOICE_LARGE };  // of columns and windows: as few kernels at once as there may be, or as many
#define CHOICE(form, passes) ((form) + 8 * (passes))

typedef struct { unsigned char *at; size_t left, used; } model_tables;

// NULL while bytes are counted only.
void *model_take(model_tables *, size_t bytes);

// FORM_TAPS: its time in cycles, as that of other forms, -1 where it cannot be; then its tables.
double model_plan_taps(const model_problem *, model_plan *);
int64_t model_tap_floats(const model_problem *, const model_plan *);  // of its region
int model_tap_tables(const model_problem *, model_plan *, model_tables *, int fill);

// The same for FORM_COLUMNS and FORM_WINDOWS, which have the same tables.
double model_plan_columns(const model_problem *, model_plan *);
double model_plan_windows(const model_problem *, model_plan *);
int model_set_tables(const model_problem *, model_plan *, model_tables *, int fill);

// And of FORM_POINTWISE.
double model_plan_pointwise(const model_problem *, model_plan *);
int model_pointwise_tables(const model_problem *, model_plan *, model_tables *, int fill);

// Numbers of kernels that a form may take at once here, the largest first, then 0.
static inline void model_togethers(const model_problem *p, int form, int found[4]) {
  int count = 0;
  for (int together = 4; together; together /= 2) {
    if (model_special_of(p->isa, form, together) && (together < 4 || p->op->most > 0)) found[count++] = together;
  }
  found[count] = 0;
  if (form == FORM_POINTWISE || !count) return;
  if (p->passes == CHOICE_SMALL) found[0] = found[count - 1];
  if (p->passes) found[1] = 0;
}

// About as many entries have `kernels` in `lists`, of which each ends with one that is not full.
static inline double model_entries(double kernels, double lists, int together) {
  if (lists > kernels) lists = kernels;
  return (kernels + lists * (together - 1) / 2) / together;
}

// Bits that are set; compilers would call a function for it.
static inline int model_ones(unsigned x) {
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  return (int)(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

// Taps of kernel number `k` that are stored, a bit each, of at most 9.
static inline unsigned model_kernel(const model_problem *p, int64_t k) {
  const int64_t at = k * p->taps, first = at / 8, last = (at + p->taps - 1) / 8;
  const unsigned word = (unsigned)p->bits[first] | (unsigned)p->bits[last] << (8 * (last - first));
  return word >> (at % 8) & ((1u << p->taps) - 1);
}

// 64 bits from number `at` on, of which it is a multiple; there are zeros after the last ones.
static inline uint64_t model_word(const unsigned char *bits, int64_t at) {
  uint64_t word;
  memcpy(&word, bits + at / 8, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

// The first kernel from number `k` on that has any; `end` if none has.
static inline int64_t model_next_kernel(const model_problem *p, int64_t k, int64_t end) {
  for (int64_t at = k * p->taps; at < end * p->taps; at = (at | 63) + 1) {
    const uint64_t word = model_word(p->bits, at & ~(int64_t)63) >> (at & 63);
    if (!word) continue;
    const int64_t found = (at + __builtin_ctzll(word)) / p->taps;
    return found < end ? found : end;
  }
  return end;
}

// A number as bfloat16.
static inline uint32_t model_rounded(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// A weight as its part of an entry of `together` kernels: bfloat16, or int8 in steps of `step`.
static inline uint32_t model_part(float weight, int together, float step) {
  if (together == 2) return model_rounded(weight);
  const float steps = weight / step;
  const int whole = steps > -127.5f && steps < 127.5f ? (int)(steps + (steps < 0 ? -0.5f : 0.5f)) : 0;
  return (uint32_t)whole & 0xff;
}

// What a step of int8 is worth for a filter's weights; no number if one of them is none.
static inline float model_step(const float *values, int64_t count) {
  float most = 0;
  for (int64_t k = 0; k < count; ++k) {
    const float size = values[k] < 0 ? -values[k] : values[k];
    if (!(size < 3e38f)) return __builtin_nanf("");
    if (size > most) most = size;
  }
  return most > 0 ? most / 127 : 1;
}

static inline int64_t model_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
